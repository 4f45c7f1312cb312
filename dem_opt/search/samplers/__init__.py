"""Samplers on the simplex: Optuna samplers whose parameters are the coefficients themselves."""

from dem_opt.config import SearchSection
from dem_opt.search.samplers.cmaes import CMAES
from dem_opt.search.samplers.grid import Grid
from dem_opt.search.samplers.optuna_sampler import OptunaSampler, tpe
from dem_opt.search.samplers.sampler import Proposer, SimplexSampler
from dem_opt.search.samplers.simplex_gp import SimplexGP
from dem_opt.search.samplers.slsqp import SLSQP
from dem_opt.search.samplers.uniform import Uniform
from dem_opt.simplex import Space

__all__ = ["SimplexSampler", "make_sampler"]


def make_sampler(search: SearchSection, space: Space) -> SimplexSampler:
    """The sampler that a study file's `search` section asks for."""
    return SimplexSampler(space, _proposer(search, space), search.seed)


def _proposer(search: SearchSection, space: Space) -> Proposer:
    match search.algorithm:
        case "simplex-gp":
            return SimplexGP(space, search.trials, search.forwards)
        case "grid":
            return Grid(space, search.divisions)
        case "random":
            return Uniform(space)
        case "tpe":
            return OptunaSampler(space, tpe)
        case "cmaes":
            return CMAES(space)
        case "gradient":
            return SLSQP(space, search.seed)
