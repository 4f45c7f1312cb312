"""`SimplexSampler`: coefficients on a simplex for any Optuna study."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite
from threading import Lock
from typing import Any, NoReturn

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from dem_opt.search.samplers.algorithms import make_proposer
from dem_opt.search.samplers.history import HistoryReader, Trial, distributions, parameters
from dem_opt.search.samplers.proposer import propose
from dem_opt.simplex import Coefficients, Family, Space


class SimplexSampler(BaseSampler):
    """Sample the coefficients  {w : lower_i <= w_i <= upper_i, sum_i w_i = total}  in any Optuna study.

    The objective suggests every name with a range from 0 to the total::

        names = ["flour", "butter", "sugar"]
        study = optuna.create_study(sampler=SimplexSampler(names))

        def objective(trial):
            recipe = {name: trial.suggest_float(name, 0, 1) for name in names}
            ...

    All coefficients of a trial are chosen together.  Each is a multiple of 1e-9, and in these units their sum is exact.
    The vertices and the centroid are proposed first (by "simplex-gp", "tpe", "cmaes" and "nsga2").

    What is proposed follows from the seed and the study's trials alone, so a study that is loaded from its storage goes
    on as if it had never stopped.  Failed and pruned trials count as the worst value.  Trials that run at the same time
    (`n_jobs`, ask and tell) get different points.  Trials whose coefficients are not on the simplex, as another sampler
    would propose them, are passed over with a warning.  Processes that share a storage need a seed each.

    "gradient" needs the objective's gradient, and "simplex-gp" learns more with it::

        for name, slope in {"flour": 0.2, "butter": -1.3, "sugar": 0.4}.items():
            trial.set_user_attr(f"gradient.{name}", slope)

    Args:
        names: Names of the parameters.
        algorithm: "simplex-gp" (Bayesian optimization), "tpe", "cmaes", "nsga2", "random", "grid" or "gradient"
            (SLSQP).
        total: Sum of the coefficients, or the least and the greatest sum.
        bounds: Least and greatest coefficient by name, where not 0 to the total; equal bounds fix a coefficient.
        sums: Least and greatest sum of some coefficients, as `{("butter", "oil"): (0, 0.3)}`; none is in two of them.
        seed: Seed of all randomness.
        divisions: Steps of the grid along an edge; a study that is run by `optimize` ends with the last grid point.

    Raises:
        ValueError: For a space that is empty, and an unknown algorithm.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        algorithm: str = "simplex-gp",
        total: float | tuple[float, float] = 1.0,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        sums: Mapping[tuple[str, ...], tuple[float, float]] | None = None,
        seed: int = 0,
        divisions: int = 10,
    ) -> None:
        self._space = _space(names, total, bounds or {}, sums or {})
        self._proposer = make_proposer(algorithm, self._space, seed=seed, divisions=divisions)
        self._seed = seed
        self._lattice_size = self._space.lattice_size(divisions) if algorithm == "grid" else None
        self._reader = HistoryReader(self._space)
        # Optuna writes a coefficient when the objective suggests it.  Until then only this sampler knows what it chose
        # for a running trial, and other threads have to be told.
        self._chosen: dict[tuple[str, int], Coefficients] = {}
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock())

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All coefficients, always: they are chosen together."""
        return distributions(self._space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Choose the coefficients of a trial.  Raises ValueError for a study of several objectives."""
        if len(study.directions) > 1:
            raise ValueError(f"SimplexSampler optimizes one objective; this study has {len(study.directions)}")
        with self._lock:
            proposal = propose(self._proposer, self._trials(study), (), self._seed)
            self._chosen[study.study_name, trial.number] = proposal.coefficients
        return parameters(proposal.coefficients)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> NoReturn:
        """Raise ValueError: no parameter is drawn without the others."""
        if param_name in self._space.names:
            raise ValueError(
                f"the range of {param_name!r} does not contain its coefficient: suggest it from 0 to "
                f"{self._space.total:g}, and give narrower ranges to SimplexSampler as bounds"
            )
        raise ValueError(
            f"{param_name!r} is no coefficient of SimplexSampler ({', '.join(self._space.names)}): "
            "fix other parameters, or tune them in a study of their own"
        )

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Stop `study.optimize` after the last grid point."""
        if self._lattice_size is None:
            return
        with self._lock:
            taken = {other.coefficients for other in self._trials(study)}
        if len(taken) >= self._lattice_size:
            # Optuna refuses to stop a study that is asked and told.
            with suppress(RuntimeError):
                study.stop()

    def _trials(self, study: Study) -> list[Trial]:
        """The study's trials, with what was chosen for those that have not suggested all their coefficients yet."""
        history, name = self._reader.read(study), study.study_name
        chosen = {number: self._chosen[name, number] for number in history.incomplete if (name, number) in self._chosen}
        others = {key: point for key, point in self._chosen.items() if key[0] != name}
        self._chosen = others | {(name, number): point for number, point in chosen.items()}
        running = [Trial(number, point, "running") for number, point in chosen.items()]
        return sorted([*history.trials, *running], key=lambda trial: trial.number)


def _space(
    names: Sequence[str],
    total: float | tuple[float, float],
    bounds: Mapping[str, tuple[float, float]],
    sums: Mapping[tuple[str, ...], tuple[float, float]],
) -> Space:
    """The space of some arguments.  Raises ValueError where it has no point."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"names {list(names)!r}: at least one name, each once")
    if unknown := bounds.keys() - set(names):
        raise ValueError(f"bounds of {', '.join(sorted(unknown))}: no such name among {', '.join(names)}")
    least, greatest = (total, total) if isinstance(total, int | float) else total
    if not (isfinite(greatest) and 0 <= least <= greatest and greatest > 0):
        raise ValueError(f"total {total!r}: a positive sum, or the least and the greatest sum")
    summed = [name for members in sums for name in members]
    if unknown := set(summed) - set(names):
        raise ValueError(f"sums of {', '.join(sorted(unknown))}: no such name among {', '.join(names)}")
    if twice := {name for name in summed if summed.count(name) > 1}:
        raise ValueError(f"sums of {', '.join(sorted(twice))}: a name can be in one of them only")
    sums_by_name = {" + ".join(members): limits for members, limits in sums.items()}
    for what, (lower, upper) in {**bounds, **sums_by_name}.items():
        if not 0 <= lower <= upper <= greatest:
            raise ValueError(f"bounds of {what} {lower!r}, {upper!r}: 0 <= lower <= upper <= {greatest:g}")
    space = Space(
        tuple(names),
        float(greatest),
        None if least == greatest else float(least),
        tuple((name, float(lower), float(upper)) for name, (lower, upper) in bounds.items()),
        tuple(
            Family(" + ".join(members), members, float(lower), float(upper))
            for members, (lower, upper) in sums.items()
            if members
        ),
    )
    if space.is_empty:
        raise ValueError(f"bounds { {**bounds, **sums_by_name} }: no coefficients within them sum to {total!r}")
    return space
