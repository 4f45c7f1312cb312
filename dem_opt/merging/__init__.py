"""Merge checkpoints: keep base and vectors in flat segments and sum them.

`merged_model` holds the segments, `kernel` sums them (compiled or with torch), `dither` rounds sums stochastically,
`int8` and `streaming` trade memory for time. Imports checkpoints and the packages below it; never data or storage.
"""
