"""Search the simplex: ask for coefficients, score the composite, record it, tell the study.

`loop.Driver` is that loop, `optuna_study.Search` keeps trials in Optuna, `samplers` propose.  `samplers.SimplexSampler`
works in any Optuna study.  Optuna enters here.  Imports evaluation, tracking, compute and the packages below them.
"""
