"""Forward compute of many search algorithms on losses that are made up: `python benchmarks/rivals.py`.

The losses are quadratics in the coefficients, window by window, as a merge's loss nearly is, and their optimum is
known.  Everything is charged: a score of all windows is one forward-equivalent (FE), one with its gradient 3, a race
the windows that it saw.  A run ends at LEVELS[-1], or after BUDGET.  BoTorch and Ax take part where they are installed:
`pip install -c constraints.txt -e ".[rivals]"`.  `benchmarks/search.py` has real merges.

With `--ends`: where `simplex-gp` ends by itself, and what that costs against TRIALS trials.
"""

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from math import inf
from time import process_time
from typing import Protocol

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import GPSampler
from scipy.optimize import minimize

from dem_opt.config import GRADIENTS_FROM, PATIENCE, SearchSection
from dem_opt.evaluation.interim_analyses import replay
from dem_opt.evaluation.racing import CLEAR, Race
from dem_opt.search.samplers import Proposer, make_proposer, propose
from dem_opt.search.samplers.covariance import interpolate
from dem_opt.search.samplers.earlier import Earlier
from dem_opt.search.samplers.history import Trial
from dem_opt.search.samplers.optuna_sampler import OptunaSampler
from dem_opt.search.trial_attributes import TrialAttributes
from dem_opt.simplex import Coefficients, Space, project
from dem_opt.types import GRADIENT_FORWARDS, Score

Array = NDArray[np.float64]

WINDOWS = 16
PART = 2
"""Windows in a mini-batch: an eighth, as an interim analysis of a race sees at first."""

BUDGET = 60.0
TRIALS = SearchSection().trials
TOLERANCE = SearchSection().tolerance
LEVELS = (1e-2, 1e-3, 1e-4)
SIZES = (4, 8, 16, 32)
KINDS = ("plain", "weighted", "sparse", "duplicates", "harmful", "rough")
REPORTED = 100
"""First seed of the reported landscapes; settings were chosen on those from 0 on."""


@dataclass(frozen=True)
class Landscape:
    """Losses of C = N corpora in nats per token over N shares x, by window:  c + l'x + x'Hx / 2 .

    plain       Vectors of different lengths, nearly orthogonal.  Each is of use for its own corpus.
    weighted    Corpora of different weights.
    sparse      Only a quarter of the corpora count, three at least.
    duplicates  The last quarter of the vectors are near-duplicates of the first.
    harmful     The last quarter of the vectors make every corpus worse.
    rough       Sines of three directions are added: the loss is not convex.
    """

    kind: str
    size: int
    seed: int
    constant_CW: Array = field(init=False)
    slope_CWN: Array = field(init=False)
    form_CWNN: Array = field(init=False)
    weights_C: Array = field(init=False)
    waves_3N: Array = field(init=False)

    def __post_init__(self) -> None:
        size, quarter = self.size, max(self.size // 4, 1)
        rng = np.random.default_rng([KINDS.index(self.kind), size, self.seed])
        vectors = rng.normal(size=(size + 4, size)) / np.sqrt(size + 4)
        if self.kind == "duplicates":
            vectors[:, -quarter:] = vectors[:, :quarter] + 0.15 * vectors[:, -quarter:]
        common = np.concatenate([vectors, 0.35 * rng.normal(size=(2, size))]) * np.exp(0.25 * rng.normal(size=size))
        constants, slopes, forms = [], [], []
        for corpus in range(size):
            own = np.concatenate([common, 0.6 * rng.normal(size=(size, size)) / np.sqrt(size)])
            gain_N = -0.05 * rng.uniform(size=size)
            gain_N[corpus] = -rng.uniform(0.5, 0.9)
            if self.kind == "duplicates" and (twin := _twin(corpus, size, quarter)) is not None:
                gain_N[twin] = gain_N[corpus]
            # Windows differ in how much the vectors change them, and in which way.
            scale_W = np.exp(0.3 * rng.normal(size=WINDOWS))
            roots_W = own + 0.3 * rng.normal(size=(WINDOWS, *own.shape)) / np.sqrt(size)
            forms.append(0.45 * scale_W[:, None, None] * (roots_W.transpose(0, 2, 1) @ roots_W))
            slopes.append(scale_W[:, None] * gain_N + 0.06 * rng.normal(size=(WINDOWS, size)))
            constants.append(3 + 0.4 * rng.normal(size=WINDOWS))
        weights_C = np.exp(0.7 * rng.normal(size=size)) if self.kind == "weighted" else np.ones(size)
        if self.kind == "sparse":
            weights_C[max(quarter, 3) :] = 0
        if self.kind == "harmful":
            weights_C[-quarter:] = 0
            for slope_WN in slopes:
                slope_WN[:, -quarter:] += 0.5
        waves_3N = 3.0 * rng.normal(size=(3, size)) if self.kind == "rough" else np.zeros((3, size))
        values = {"constant_CW": constants, "slope_CWN": slopes, "form_CWNN": forms}
        for name, value in values.items():
            object.__setattr__(self, name, np.array(value))
        object.__setattr__(self, "weights_C", weights_C / weights_C.sum())
        object.__setattr__(self, "waves_3N", waves_3N)

    @cached_property
    def space(self) -> Space:
        """The simplex."""
        return Space(tuple(f"d{number:02}" for number in range(self.size)))

    def _wave(self, x_N: Array) -> float:
        return 0.05 * float(np.sin(self.waves_3N @ x_N).sum())

    def nats(self, x_N: Array) -> Array:
        """Nats of each window, [C, W]."""
        bowl_CW: Array = 0.5 * np.einsum("cwij,i,j->cw", self.form_CWNN, x_N, x_N)
        return self.constant_CW + self.slope_CWN @ x_N + bowl_CW + self._wave(x_N)

    @cached_property
    def _means(self) -> tuple[float, Array, Array]:
        return (
            float(self.weights_C @ self.constant_CW.mean(axis=1)),
            np.einsum("c,cwi->i", self.weights_C, self.slope_CWN) / WINDOWS,
            np.einsum("c,cwij->ij", self.weights_C, self.form_CWNN) / WINDOWS,
        )

    def value(self, x_N: Array) -> float:
        """The objective."""
        constant, slope_N, form_NN = self._means
        return float(constant + slope_N @ x_N + 0.5 * x_N @ form_NN @ x_N) + self._wave(x_N)

    def gradient(self, x_N: Array, windows: Sequence[int] | None = None) -> Array:
        """The objective's gradient, of all windows or of some."""
        _, slope_N, form_NN = self._means
        if windows is not None:
            slope_N = np.einsum("c,cwi->i", self.weights_C, self.slope_CWN[:, windows]) / len(windows)
            form_NN = np.einsum("c,cwij->ij", self.weights_C, self.form_CWNN[:, windows]) / len(windows)
        wave_N = 0.05 * np.cos(self.waves_3N @ x_N) @ self.waves_3N
        return np.asarray(slope_N + form_NN @ x_N + wave_N)

    @cached_property
    def lowest(self) -> float:
        """The lowest objective, from many starts where it is not convex."""
        rng = np.random.default_rng(0)
        starts = [np.full(self.size, 1 / self.size), *rng.dirichlet(np.full(self.size, 0.5), 30)]
        return min(
            descend(self.value, self.gradient, start)[1] for start in starts[: None if self.kind == "rough" else 2]
        )

    def scores(self, x_N: Array) -> dict[str, Score]:
        """Scores by corpus of those that count."""
        by_name = zip(self.space.names, self.nats(x_N).tolist(), self.weights_C, strict=True)
        return {name: Score(tuple(nats), (1,) * WINDOWS) for name, nats, weight in by_name if weight}


def _twin(corpus: int, size: int, quarter: int) -> int | None:
    """The near-duplicate of a vector among the first and the last quarter."""
    if corpus < quarter:
        return corpus + size - quarter
    return corpus - (size - quarter) if corpus >= size - quarter else None


def descend(value: Callable[[Array], float], gradient: Callable[[Array], Array], start_N: Array) -> tuple[Array, float]:
    """SLSQP on the simplex."""
    found = minimize(
        value,
        start_N,
        jac=gradient,
        method="SLSQP",
        bounds=[(0.0, 1.0)] * len(start_N),
        constraints={"type": "eq", "fun": lambda at_N: at_N.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-15, "maxiter": 300},
    )
    point_N = project(found.x, np.ones(len(start_N)))
    return point_N, value(point_N)


class Loss(Protocol):
    """A loss that is searched by values: a `Landscape`, or real merges."""

    @property
    def seed(self) -> int:
        """Seed of the search."""

    @property
    def size(self) -> int:
        """Number of shares."""

    @property
    def space(self) -> Space:
        """The simplex."""

    def value(self, x_N: Array) -> float:
        """The objective."""


Step = tuple[float, float]
"""Cost of a trial in FE, and its objective; infinite where not all windows were scored."""


def searched(
    landscape: Landscape,
    algorithm: str,
    gradients: bool,
    races: bool,
    trials: list[Trial] | None = None,
    start: Sequence[Coefficients] = (),
    cost_of: Callable[[Coefficients], float] = lambda point: 1.0,
    earlier: Earlier | None = None,
    in_flight: int = 1,
) -> Iterator[Step]:
    """A search algorithm of the product, or Optuna's GPSampler; races, gradients and probes as a study has them.

    Args:
        landscape: The losses.
        algorithm: The algorithm.
        gradients: Trials have their gradient.
        races: Trials may be stopped early, and gradients are of parts of the windows.
        trials: A list that trials are appended to.
        start: Points that a study begins with that goes on from another.
        cost_of: Cost of a score without gradient, in FE: such a study knows some corpora's scores.
        earlier: What was scored before.
        in_flight: Trials under way when one is proposed, itself counted; a worker each, or proposals made ahead.
    """
    parts = WINDOWS // PART if gradients and races else 0
    space, trials = landscape.space, [] if trials is None else trials
    if algorithm == "gp-sampler":
        proposer: Proposer = OptunaSampler(space, lambda seed: GPSampler(seed=seed))
    else:
        proposer = make_proposer(algorithm, space, gradients=gradients, parts=parts, earlier=earlier)
    plain = {*start, *space.landmarks()} - ({space.centroid()}.difference(start) if gradients else set())
    while True:
        known = [*trials[: len(trials) - in_flight + 1], *map(running, trials[len(trials) - in_flight + 1 :])]
        proposal = propose(proposer, known, start, landscape.seed)
        point, promise = proposal.coefficients, proposal.expected_improvement
        x_N, number = space.shares(point), len(trials)
        if proposal.is_probe:
            trials.append(replace(probed(landscape, point, known), expected_improvement=promise))
            yield trials[-1].forwards, inf
            continue
        charged = sum(trial.forwards for trial in known if trial.coefficients == point)
        is_raced = races and not parts and not charged and point not in plain
        race = race_for(landscape, point, known) if is_raced else None
        ended = replay(race, landscape.scores(x_N), dict.fromkeys(landscape.scores(x_N), WINDOWS))
        assert ended is not None
        seen = len(next(iter(ended.values())).nats_W)
        if race is not None and seen < WINDOWS:
            estimate = race.estimate(ended)
            attributes = TrialAttributes(error=max(estimate.error, 1e-12), forwards=seen / WINDOWS)
            objective, value = race.goal + estimate.difference, inf
        else:
            steep = gradients and (
                point == space.centroid() if parts else algorithm == "gradient" or point not in plain
            )
            slopes = dict(zip(space.names, landscape.gradient(x_N).tolist(), strict=True)) if steep else {}
            cost = GRADIENT_FORWARDS if steep else max(cost_of(point) - charged, 0.0)
            means = {name: score.nll for name, score in landscape.scores(x_N).items()}
            attributes = TrialAttributes(gradient=slopes, forwards=cost, nll=means)
            objective = value = landscape.value(x_N)
        trial = Trial(number, point, "complete", objective=objective, attributes=attributes)
        trials.append(replace(trial, expected_improvement=promise))
        yield attributes.forwards, value


def running(trial: Trial) -> Trial:
    """The trial as it was before it had a score."""
    return replace(trial, state="running", objective=None, attributes=TrialAttributes())


def probed(landscape: Landscape, point: Coefficients, trials: Sequence[Trial]) -> Trial:
    """A probe as a study has it: the gradient of one part of the windows, corrected by the centroid's."""
    part = sum(trial.part is not None for trial in trials) % (WINDOWS // PART)
    windows, x_N = range(PART * part, PART * (part + 1)), landscape.space.shares(point)
    centre_N = landscape.space.shares(landscape.space.centroid())
    common_N = landscape.gradient(centre_N) - landscape.gradient(centre_N, list(windows))
    slope_N = landscape.gradient(x_N, list(windows)) + common_N
    race = race_for(landscape, point, trials)
    assert race is not None
    scores = {
        name: Score(score.nats_W[windows.start : windows.stop], score.tokens_W[: len(windows)])
        for name, score in landscape.scores(x_N).items()
    }
    estimate = race.beginning_with(dict.fromkeys(race.control, windows)).estimate(scores)
    attributes = TrialAttributes(
        gradient=dict(zip(landscape.space.names, slope_N.tolist(), strict=True)),
        error=max(estimate.error, 1e-12),
        forwards=GRADIENT_FORWARDS * PART / WINDOWS,
    )
    objective = race.goal + estimate.difference
    return Trial(len(trials), point, "complete", objective=objective, attributes=attributes, part=part)


def race_for(landscape: Landscape, point: Coefficients, trials: Sequence[Trial]) -> Race | None:
    """The race against the best whole trial, with a control from the nearest ones (`dem_opt.search.trials`)."""
    whole = [trial for trial in trials if trial.is_whole]
    if not whole:
        return None
    shares_TN = np.array([landscape.space.shares(trial.coefficients) for trial in whole])
    nearest = np.argsort(np.abs(shares_TN - landscape.space.shares(point)).sum(axis=1), kind="stable")[:32]
    weights_T = interpolate(shares_TN[nearest], landscape.space.shares(point))
    nats_CW = np.einsum("t,tcw->cw", weights_T, np.array([landscape.nats(shares_TN[i]) for i in nearest]))
    counted = [place for place, weight in enumerate(landscape.weights_C) if weight]
    names = landscape.space.names
    control = {names[i]: Score(tuple(nats_CW[i].tolist()), (1,) * WINDOWS) for i in counted}
    goal = min(trial.objective for trial in whole if trial.objective is not None)
    return Race(control, {names[i]: float(landscape.weights_C[i]) for i in counted}, goal, CLEAR)


def quadratic_fit(landscape: Loss) -> Iterator[Step]:
    """A quadratic regression on random composites, with a ridge, and its minimum after each eight (as MAP's surrogate).

    MAP: Li et al. (2024), "MAP: Low-compute model merging with amortized Pareto fronts via quadratic approximation".
    """
    rng, points, values = np.random.default_rng(landscape.seed), list[Array](), list[float]()
    upper = np.triu_indices(landscape.size)

    def features(x_N: Array) -> Array:
        return np.concatenate([[1.0], x_N, np.outer(x_N, x_N)[upper]])

    while True:
        drawn = [rng.dirichlet(np.ones(landscape.size)) for _ in range(8)]
        for x_N in drawn:
            points.append(x_N)
            values.append(landscape.value(x_N))
            yield 1.0, values[-1]
        design = np.array([features(x_N) for x_N in points])
        own = design @ design.T + 1e-6 * np.eye(len(points))
        mean = float(np.mean(values))
        theta = design.T @ np.linalg.solve(own, np.array(values) - mean)

        def model(x_N: Array, theta: Array = theta) -> float:
            return float(features(x_N) @ theta)

        def slope(x_N: Array, theta: Array = theta) -> Array:
            form_NN = np.zeros((landscape.size, landscape.size))
            form_NN[upper] = theta[landscape.size + 1 :]
            return theta[1 : landscape.size + 1] + (form_NN + form_NN.T) @ x_N

        found, _ = descend(model, slope, points[int(np.argmin(values))])
        points.append(found)
        values.append(landscape.value(found))
        yield 1.0, values[-1]


def adam(landscape: Landscape, rate: float = 0.05) -> Iterator[Step]:
    """Projected Adam on the gradient of an eighth of the windows a step: AdaMerging's way, with the loss for entropy.

    The point is scored on all windows after every eighth step: a choice among steps needs that.
    Yang et al. (2024), "AdaMerging: Adaptive model merging for multi-task learning".
    """
    rng, x_N = np.random.default_rng(landscape.seed), np.full(landscape.size, 1 / landscape.size)
    first_N, second_N, caps_N = np.zeros(landscape.size), np.zeros(landscape.size), np.ones(landscape.size)
    step = 0
    while True:
        for _ in range(8):
            step += 1
            slope_N = landscape.gradient(x_N, rng.choice(WINDOWS, PART, replace=False).tolist())
            slope_N = slope_N - slope_N.mean()
            first_N, second_N = 0.9 * first_N + 0.1 * slope_N, 0.99 * second_N + 0.01 * slope_N**2
            away_N = (first_N / (1 - 0.9**step)) / (np.sqrt(second_N / (1 - 0.99**step)) + 1e-8)
            x_N = project(x_N - rate / np.sqrt(step) * away_N, caps_N)
            yield GRADIENT_FORWARDS * PART / WINDOWS, inf
        yield 1.0, landscape.value(x_N)


def botorch(landscape: Loss) -> Iterator[Step]:
    """BoTorch's default process with log expected improvement under the constraint that shares sum to 1.

    The first points are the vertices and the centroid.
    """
    # Large packages that the project does not need otherwise.
    import torch
    from botorch.acquisition import LogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.optim import optimize_acqf
    from gpytorch.mlls import ExactMarginalLogLikelihood

    torch.manual_seed(landscape.seed)
    size = landscape.size
    points = [*np.eye(size), np.full(size, 1 / size)]
    values = [landscape.value(x_N) for x_N in points]
    yield from ((1.0, value) for value in values)
    box = torch.stack([torch.zeros(size), torch.ones(size)]).double()
    plane = (torch.arange(size), torch.ones(size).double(), 1.0)
    while True:
        y_T = -torch.tensor(values).double()[:, None]
        y_T = (y_T - y_T.mean()) / y_T.std()
        process = SingleTaskGP(torch.from_numpy(np.array(points)), y_T)
        fit_gpytorch_mll(ExactMarginalLogLikelihood(process.likelihood, process))
        improvement = LogExpectedImprovement(process, best_f=y_T.max())
        found, _ = optimize_acqf(improvement, box, 1, num_restarts=4, raw_samples=128, equality_constraints=[plane])
        points.append(project(found[0].numpy(), np.ones(size)))
        values.append(landscape.value(points[-1]))
        yield 1.0, values[-1]


def ax(landscape: Loss) -> Iterator[Step]:
    """Ax as it comes, under the constraint that shares sum to 1: centroid, four points of Sobol's, its processes."""
    # Large packages that the project does not need otherwise.
    from ax.api.client import Client
    from ax.core.experiment import Experiment
    from ax.core.parameter import ParameterType, RangeParameter
    from ax.core.parameter_constraint import ParameterConstraint
    from ax.core.search_space import SearchSpace

    names = landscape.space.names
    shares = [RangeParameter(name, ParameterType.FLOAT, 0.0, 1.0) for name in names]
    # `Client.configure_experiment` takes inequalities alone; N - 1 free shares that sum to 1 at most take more trials.
    plane = ParameterConstraint(equality=" + ".join(names) + " == 1")
    client = Client()
    client.set_experiment(Experiment(SearchSpace(shares, [plane])))
    client.configure_optimization("-loss")
    client.configure_generation_strategy(initialization_random_seed=landscape.seed)
    while True:
        [(number, proposal)] = client.get_next_trials(1).items()
        point_N = project(np.array([proposal[name] for name in names], dtype=np.float64), np.ones(len(names)))
        value = landscape.value(point_N)
        client.complete_trial(number, {"loss": value})
        yield 1.0, value


RIVALS: dict[str, Callable[[Landscape], Iterator[Step]]] = {
    "simplex-gp": lambda at: searched(at, "simplex-gp", at.size >= GRADIENTS_FROM, True),
    "simplex-gp, probes": lambda at: searched(at, "simplex-gp", True, True),
    "simplex-gp, gradients of all windows": lambda at: searched(at, "simplex-gp", True, False),
    "SLSQP with gradients": lambda at: searched(at, "gradient", True, False),
    "Adam on an eighth of the windows": adam,
    "quadratic fit to random points": quadratic_fit,
    "BoTorch": botorch,
    "Ax": ax,
    "TPE": lambda at: searched(at, "tpe", False, False),
    "Optuna's GPSampler": lambda at: searched(at, "gp-sampler", False, False),
    "CMA-ES": lambda at: searched(at, "cmaes", False, False),
    "random": lambda at: searched(at, "random", False, False),
    "grid": lambda at: searched(at, "grid", False, False),
}

PACKAGES = {"BoTorch": "botorch", "Ax": "ax"}
"""Packages of rivals that are not the project's."""


def forwards_until(landscape: Landscape, steps: Iterator[Step]) -> tuple[list[float], float]:
    """Forward-equivalents to each regret of LEVELS, infinite beyond BUDGET; and seconds of the processor a trial."""
    began, spent, best, trials = process_time(), 0.0, inf, 0
    reached = dict.fromkeys(LEVELS, inf)
    for cost, value in steps:
        spent, best, trials = spent + cost, min(best, value - landscape.lowest), trials + 1
        if spent > BUDGET:
            break
        reached |= {level: spent for level in LEVELS if best <= level and reached[level] == inf}
        if best <= LEVELS[-1]:
            break
    return [reached[level] for level in LEVELS], (process_time() - began) / trials


def at_the_end(landscape: Landscape, gradients: bool, patience: int) -> tuple[int, float, float]:
    """Trials, forward-equivalents and regret of `simplex-gp` where it ends, after TRIALS trials at the latest."""
    trials, spent, best = list[Trial](), 0.0, inf
    for cost, value in searched(landscape, "simplex-gp", gradients, True, trials):
        spent, best = spent + cost, min(best, value)
        if has_ended(trials, patience):
            break
    return len(trials), spent, best - landscape.lowest


def has_ended(trials: Sequence[Trial], patience: int = PATIENCE) -> bool:
    """True where a search ends: little is expected of its last proposals, or the budget is spent."""
    promises = [trial.expected_improvement for trial in trials[-patience:]]
    promise_little = all(promise is not None and promise < TOLERANCE for promise in promises)
    return len(trials) == TRIALS or (len(promises) == patience and promise_little)


def print_ends(sizes: Sequence[int], seeds: range) -> None:
    """A table of searches that end by themselves, and of those with all their trials."""
    print("| distributions | ends after | trials | FE | regret: median, upper quartile, worst |\n|---|---|---|---|---|")
    for size in sizes:
        landscapes = [Landscape(kind, size, seed) for kind in KINDS for seed in seeds]
        for gradients in (False, True):
            for patience in (PATIENCE, TRIALS):
                ended = [at_the_end(landscape, gradients, patience) for landscape in landscapes]
                trials, spent = (np.median([row[column] for row in ended]) for column in (0, 1))
                regrets = np.quantile([row[2] for row in ended], [0.5, 0.75, 1.0], method="higher")
                name = f"{size}, {'probes' if gradients else 'values and races'}"
                shown = ", ".join(f"{regret:.1e}" for regret in regrets)
                print(f"| {name} | {patience} | {trials:.0f} | {spent:.1f} | {shown} |", flush=True)


def cell(values: Sequence[float]) -> str:
    """Median [quartiles]; what is beyond the budget as "more"."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75], method="inverted_cdf")
    shown = ["more" if value == inf else f"{value:.3g}" for value in (middle, low, high)]
    return "more" if low == inf else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def main() -> None:
    """One table for each number of distributions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--tuned", action="store_true", help="the landscapes that settings were chosen on")
    parser.add_argument("--ends", action="store_true", help="where simplex-gp ends by itself, instead of the rivals")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.disable(logging.WARNING)  # Ax has a line for each trial
    first = 0 if arguments.tuned else REPORTED
    if arguments.ends:
        print_ends(arguments.sizes, range(first, first + arguments.seeds))
        return
    for size in arguments.sizes:
        print(f"\n| {size} distributions | 1e-2 | 1e-3 | 1e-4 | seconds a trial |\n|---|---|---|---|---|", flush=True)
        landscapes = [Landscape(kind, size, first + seed) for kind in KINDS for seed in range(arguments.seeds)]
        for name in arguments.rivals:
            is_missing = name in PACKAGES and find_spec(PACKAGES[name]) is None
            if is_missing or (name == "grid" and size > SIZES[0]):
                continue
            runs = [forwards_until(landscape, RIVALS[name](landscape)) for landscape in landscapes]
            cells = [cell([reached[level] for reached, _ in runs]) for level in range(len(LEVELS))]
            seconds = np.median([seconds for _, seconds in runs])
            print(f"| {name} | " + " | ".join(cells) + f" | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
