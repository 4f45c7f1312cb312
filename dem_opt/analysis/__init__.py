"""Read a study: results table, regret of its searches, intervals, surrogate, vector geometry, costs.

`results.summarize` makes the table, `regret.compare` compares searches, `bootstrap.difference` gives intervals.  Runs
no forward pass.  Imports search and the packages below it; never planning.
"""
