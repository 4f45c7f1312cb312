"""A study's searches: one Optuna study for each algorithm, seed and generation."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from dem_opt.config import ALGORITHMS, StudyConfig
from dem_opt.errors import InputError, nearest
from dem_opt.search.optuna_study import Search, study_names
from dem_opt.simplex import Coefficients
from dem_opt.storage.leases import Lease
from dem_opt.storage.retry import NO_RETRY, RetryPolicy

GRADIENTS_FROM = 7
"""From how many free shares on gradients are worth their cost: with fewer, racing gets further for it (LOG.md)."""


@dataclass(frozen=True)
class Runs:
    """The searches of one generation of a study.

    A run is named by its algorithm, and by ALGORITHM@k where its seed is the study's plus k.
    """

    config: StudyConfig
    generation: int
    lease: Lease | None = None
    patience: RetryPolicy = NO_RETRY

    def optuna_name(self, run: str) -> str:
        """What Optuna calls a run's study."""
        return f"{self.config.name}/{run}" + (f"#{self.generation}" if self.generation > 1 else "")

    def open(self, run: str, start: Sequence[Coefficients] = (), gradients_fit: bool | None = None) -> Search:
        """A run's search, made where there is none.

        gradients_fit  whether memory allows gradients, where that is known

        Raises InputError for a search that asks for gradients where it does not.
        """
        given, space = self.config.search, self.config.space
        algorithm, _, offset = run.partition("@")
        settings = given.model_copy(update={"algorithm": algorithm, "seed": given.seed + int(offset or 0)})
        asked = algorithm == "gradient" or (algorithm == "simplex-gp" and given.gradients is True)
        if asked and gradients_fit is False:
            field, value = ("gradients", True) if given.gradients is True else ("algorithm", algorithm)
            mend = "the activations of a backward pass don't fit into memory; use a smaller evaluation.batch, or none"
            raise InputError(None, f"search.{field}", value, mend)
        worth = bool(gradients_fit) and len(space.caps_F) >= GRADIENTS_FROM and not self.config.objective.worst
        gradients = algorithm == "simplex-gp" and (worth if given.gradients == "auto" else given.gradients)
        name = self.optuna_name(run)
        return Search(self.config.storage, name, space, settings, start, gradients, self.lease, self.patience)

    @contextmanager
    def there(self) -> Iterator[dict[str, Search]]:
        """The searches that have been begun, by run, in the order of algorithms and seeds; closed at the end."""
        begin, end = self.optuna_name("|").split("|")
        names = (name for name in study_names(self.config.storage) if name.startswith(begin) and name.endswith(end))
        runs = [run for name in names if "#" not in (run := name.removeprefix(begin).removesuffix(end))]
        runs.sort(key=lambda run: (ALGORITHMS.index(run.partition("@")[0]), len(run), run))
        with ExitStack() as opened:
            yield {run: opened.enter_context(closing(self.open(run))) for run in runs}


def run_names(algorithms: Sequence[str], seeds: int) -> list[str]:
    """The runs of a comparison: every algorithm with every seed, but the grid, which has none, once."""
    return [
        f"{algorithm}@{offset}" if offset else algorithm
        for algorithm in dict.fromkeys(algorithms)
        for offset in range(1 if algorithm == "grid" else seeds)
    ]


def check_algorithms(config: StudyConfig, where: object, algorithms: Sequence[str]) -> None:
    """Raise InputError for an algorithm that there is not, or that can't search this study's space."""
    for algorithm in algorithms:
        mend = ""
        if algorithm not in ALGORITHMS:
            mend = f"no such algorithm; {nearest(algorithm, ALGORITHMS)}"
        elif algorithm == "gradient" and config.objective.worst:
            mend = "a largest regret has no gradient where two are largest"
        elif algorithm == "grid" and not config.space.lattice_size(config.search.divisions):
            mend = f"no point of the lattice of {config.search.divisions} divisions is within the bounds"
        if mend:
            raise InputError(where, "algorithm", algorithm, mend)
