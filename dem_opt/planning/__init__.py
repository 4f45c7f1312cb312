"""Predict a study before it runs, and check its inputs.

`plan` counts bytes, passes and minutes; `inputs` checks that checkpoints and data fit together. Imports search and
the packages below it; never analysis.
"""
