"""Search algorithms on the simplex.

`SimplexSampler` is a sampler for any Optuna study.  `Proposer` is the interface below it, which a dem_opt study uses
directly: a pure function of the trials and of a random generator, with one module for each algorithm.
"""

from dem_opt.search.samplers.algorithms import make_proposer
from dem_opt.search.samplers.proposer import Proposal, Proposer, propose
from dem_opt.search.samplers.simplex_sampler import SimplexSampler

__all__ = ["Proposal", "Proposer", "SimplexSampler", "make_proposer", "propose"]
