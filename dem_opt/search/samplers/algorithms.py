"""The search algorithms by the names that study files use."""

from dem_opt.config import ALGORITHMS
from dem_opt.search.samplers.earlier import Earlier
from dem_opt.search.samplers.grid import Grid
from dem_opt.search.samplers.optuna_sampler import REPLAYED, OptunaSampler, nsga2, tpe
from dem_opt.search.samplers.proposer import Proposer
from dem_opt.search.samplers.simplex_ehvi import SimplexEHVI
from dem_opt.search.samplers.simplex_gp import SimplexGP
from dem_opt.search.samplers.slsqp import SLSQP
from dem_opt.search.samplers.uniform import Uniform
from dem_opt.simplex import Space


def make_proposer(
    algorithm: str,
    space: Space,
    *,
    seed: int = 0,
    divisions: int = 10,
    trials: int | None = None,
    forwards: float | None = None,
    objectives: int = 1,
    gradients: bool = False,
    parts: int = 0,
    earlier: Earlier | None = None,
) -> Proposer:
    """The proposer of an algorithm over a space.

    Args:
        algorithm: "simplex-gp", "grid", "random", "tpe", "cmaes", "gradient" or "nsga2".
        space: The coefficients to choose from.
        seed: Seed of the starts that "gradient" draws; all other randomness comes with each proposal.
        divisions: Steps of the grid along an edge.
        trials: Budget of "simplex-gp" in trials, if any: its last trial completes the most promising stopped one.
        forwards: Likewise in forward-equivalents.
        objectives: 2 to search for the front between two losses, which "cmaes" and "gradient" cannot.
        gradients: Trials have their gradient: "simplex-gp" then begins with the centroid, without vertices.
        parts: Parts of the windows, on one of which "simplex-gp" then measures most gradients; 0 for all windows.
        earlier: Composites that were scored before, from which "simplex-gp" learns.

    Raises ValueError for an unknown algorithm.
    """
    match algorithm:
        case "simplex-gp" if objectives > 1:
            return SimplexEHVI(space)
        case "simplex-gp":
            return SimplexGP(space, trials, forwards, gradients, parts, earlier or Earlier())
        case "grid":
            return Grid(space, divisions)
        case "random":
            return Uniform(space)
        case "tpe":
            return OptunaSampler(space, tpe, objectives=objectives)
        case "nsga2":
            return OptunaSampler(space, nsga2, REPLAYED, objectives, is_replayed=True)
        case "cmaes":
            # Its library loads scipy.stats: half a second that the start of other searches does not pay.
            from dem_opt.search.samplers.cmaes import CMAES

            return CMAES(space)
        case "gradient":
            return SLSQP(space, seed)
        case _:
            raise ValueError(f"algorithm {algorithm!r} is none of {', '.join(ALGORITHMS)}")
