"""The work behind the commands: check, fine-tune, mix data, evaluate tasks, make the quickstart.

`dem_opt.study` calls these modules. They may import every package below them.
"""
