"""Write a composite as a checkpoint folder, prove it from disk, and describe it.

`writer` writes and compares, `model_card` describes. Imports analysis, planning and the packages below them; never
training or dashboards.
"""
