"""Command line: parse a command, call `dem_opt.study`, show what comes of it.

`parser` declares the commands, `main` runs one, `console` draws progress and tables, `json_output` writes the same for
programs, `reports` and `baselines` print results. Nothing imports this package. `dem-opt --help` loads without torch.
"""
