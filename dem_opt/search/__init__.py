"""Search the simplex: ask for coefficients, score the composite, record it, tell the sampler.

`loop` is that loop, `optuna_study` keeps trials in Optuna, `samplers` propose. Optuna enters here. Imports
evaluation, tracking, compute and the packages below them.
"""
