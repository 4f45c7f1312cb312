"""A study's searches: one Optuna study for each algorithm, seed and generation."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from dem_opt.config import ALGORITHMS, ONE_OBJECTIVE, StudyConfig
from dem_opt.errors import InputError, nearest
from dem_opt.evaluation.parts import part_count
from dem_opt.search.beginning import Beginning
from dem_opt.search.optuna_storage import study_names
from dem_opt.search.optuna_study import Search
from dem_opt.search.run_name import RunName
from dem_opt.storage.leases import Lease
from dem_opt.storage.retry import BRIEF, RetryPolicy


@dataclass(frozen=True)
class Runs:
    """The searches of one generation of a study, by label (see `RunName`).

    Attributes:
        config: The study.
        generation: Its generation, from 1.
        lease: Lease of the driver that proposes, if any.
        patience: How long to wait for a database that is away.
    """

    config: StudyConfig
    generation: int
    _: KW_ONLY
    lease: Lease | None = None
    patience: RetryPolicy = BRIEF

    def open(self, label: str, beginning: Beginning | None = None, gradients_fit: bool | None = None) -> Search:
        """Open the search of a run, or create it where there is none.

        Args:
            label: The run.
            beginning: What a new search begins with; nothing unless given.
            gradients_fit: Whether memory allows gradients; None where that is not known.

        Raises:
            InputError: For a search that asks for gradients where memory does not allow them.
        """
        run, search, space = RunName.parse(label, self.generation), self.config.search, self.config.space
        patience = self.config.patience(run.algorithm)
        own = {"algorithm": run.algorithm, "seed": search.seed + run.seed, "patience": patience}
        settings = search.model_copy(update=own)
        wanted = run.algorithm == "gradient" or (run.algorithm == "simplex-gp" and search.gradients is True)
        if wanted and gradients_fit is False:
            field, value = ("gradients", True) if search.gradients is True else ("algorithm", run.algorithm)
            mend = "the activations of a backward pass don't fit into memory; use a smaller evaluation.batch, or none"
            raise InputError(None, f"search.{field}", value, mend)
        gradients = run.algorithm == "simplex-gp" and self.config.measures_gradients(bool(gradients_fit))
        name = run.optuna_name(self.config.name)
        storage, unit = self.config.storage, self.config.objective.unit
        axes = [axis.name for axis in self.config.axes or ()]
        # Parts are judged as races are, by paired means.
        parts = part_count(self.config.evaluation.windows) if gradients and search.racing else 0
        return Search(
            storage, name, space, settings, beginning, gradients, self.lease, self.patience, unit, axes, parts
        )

    def beginning(self) -> Beginning | None:
        """Starting points and observations of the generation's first search, which its others share; None before it.

        Without this, a search would learn from the trials of those that it is compared with.
        """
        labels = self.labels()[:1]
        with self.existing(labels) as searches:
            return searches[labels[0]].beginning if labels else None

    def labels(self) -> list[str]:
        """The runs whose searches have been begun, in the order of algorithms and seeds."""
        names = (RunName.from_optuna(name, self.config.name) for name in study_names(self.config.storage))
        runs = [run for run in names if run is not None and run.generation == self.generation]
        return [run.label for run in sorted(runs, key=lambda run: (ALGORITHMS.index(run.algorithm), run.seed))]

    @contextmanager
    def existing(self, labels: Collection[str] | None = None) -> Iterator[dict[str, Search]]:
        """The searches that have been begun, by label, of all runs or of these; closed at the end."""
        begun = [label for label in self.labels() if labels is None or label in labels]
        with ExitStack() as stack:
            yield {label: stack.enter_context(closing(self.open(label))) for label in begun}


def run_names(algorithms: Sequence[str], seeds: int) -> list[str]:
    """Labels of a comparison's runs: every algorithm with every seed, but the grid, which has no seed, once."""
    return [
        RunName(algorithm, seed).label
        for algorithm in dict.fromkeys(algorithms)
        for seed in range(1 if algorithm == "grid" else seeds)
    ]


def grid_excess(config: StudyConfig) -> str:
    """Say why a comparison may not run the grid, which has too many points; empty where it may."""
    search, points = config.search, config.planned_trials("grid")
    if search.algorithm == "grid" or points <= search.grid_limit:
        return ""
    smaller = range(search.divisions - 1, 0, -1)
    fewer = next((n for n in smaller if 0 < config.space.lattice_size(n) <= search.grid_limit), None)
    reduced = f", or write search.divisions: {fewer} ({config.space.lattice_size(fewer):,} points)" if fewer else ""
    return (
        f"the grid of {search.divisions} divisions has {points:,} points, each a pass over the search split; raise the "
        f"limit to {points}{reduced}, or leave the grid out: --algorithms random,simplex-gp"
    )


def check_algorithms(config: StudyConfig, where: Path | None, algorithms: Sequence[str]) -> None:
    """Raise InputError for an algorithm that does not exist, or that can't search this study's space."""
    for algorithm in algorithms:
        mend = ""
        if algorithm not in ALGORITHMS:
            mend = f"no such algorithm; {nearest(algorithm, ALGORITHMS)}"
        elif algorithm == "gradient" and config.objective.function:
            mend = "a custom objective (objective.function) has no gradient"
        elif algorithm == "gradient" and config.objective.worst:
            mend = "a largest regret has no gradient where two are largest"
        elif algorithm in ONE_OBJECTIVE and config.objective.pareto:
            mend = "minimizes one number, and objective.pareto asks for a front"
        elif algorithm == "grid" and not config.space.lattice_size(config.search.divisions):
            mend = f"no point of the lattice of {config.search.divisions} divisions is within the bounds"
        elif algorithm == "grid" and (excess := grid_excess(config)):
            raise InputError(where, "search.grid_limit", config.search.grid_limit, excess)
        if mend:
            raise InputError(where, "algorithm", algorithm, mend)
