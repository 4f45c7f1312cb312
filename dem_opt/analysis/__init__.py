"""Read a study: ranked composites, regret of its searches, intervals, surrogate, geometry of the vectors, costs.

`results` ranks, `regret` compares searches, `bootstrap` gives intervals, `surrogate` is the Gaussian process for
figures. Runs no forward pass. Imports search and the packages below it; never planning.
"""
