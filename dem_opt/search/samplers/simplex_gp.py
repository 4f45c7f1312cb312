"""Bayesian optimization on the simplex: the point where a Gaussian process expects the greatest improvement.

Shape suffixes beside the project's: N trials, M points, m of them still moving, F shares.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, ndtr
from threadpoolctl import threadpool_limits

from dem_opt.search.samplers import gp
from dem_opt.search.samplers.earlier import Earlier
from dem_opt.search.samplers.history import Trial, latest, thin, values_of
from dem_opt.search.samplers.observations import Measurement, compressed, most_gradients, observe
from dem_opt.search.samplers.proposer import Proposal, central_points, first_new, first_points
from dem_opt.simplex import Coefficients, Polytope, Space
from dem_opt.types import GRADIENT_FORWARDS

Array = NDArray[np.float64]

OBSERVATIONS, WITH_GRADIENTS = 200, 64
"""Trials that the process is fitted to at most, half the best and half the most recent; fewer with gradients."""

APART = 1e-6
"""Points closer than this in every share count as the same."""

RECENT = 8
"""Number of recent trials averaged to estimate the cost of the next one."""

_LEAST_COST = 1e-3
"""Forward-equivalents below which a cost is not divided by: a trial may lack almost nothing."""

_STARTS = 64
"""Points from which the acquisition function is climbed."""

_STEPS = 60
"""Most steps of each climb."""

_ARRIVED = 1e-8
"""A climb ends where a step changes no share by more."""

_LONGEST = 1e3
"""Longest step before projection: it reaches every corner, and loses few digits when it is projected."""

_ARMIJO = 1e-4
"""Part of the increase that the gradient promises which a step must keep."""


@dataclass(frozen=True)
class SimplexGP:
    """Expected improvement (Mockus 1978; Jones, Schonlau and Welch 1998) over the shares, for its cost.

    The first proposals are the study's starting points, the vertices and the centroid; where gradients are measured,
    vertices only for workers that would wait for the first value.  Then a Gaussian process is fitted to the trials.
    Running trials count as observed at their posterior mean ("kriging believer", Ginsbourger et al. 2010), failed ones
    as the worst value.  The estimate of a stopped trial enters with its standard error, and gradients as derivative
    observations.

    A stopped trial is proposed again, to be completed, where its expected improvement on the best whole trial is
    greater, for each forward-equivalent that it lacks, than that of a new trial for each that a new trial will take.

    With parts, only the gradient of one trial, the *anchor*, is of all windows: the centroid.  The others are of
    *probes*, which see one part of the windows, the next at each, and are corrected by the anchor's on the same part
    (`dem_opt.search.probes`).  The next trial is a probe, where most improvement on the lowest posterior mean is
    expected, or a whole trial, where most improvement on the best whole one is: whichever is expected to gain more for
    each forward-equivalent.  Only whole trials can win.

    What was scored before the search began, of other vectors or on a part of the corpora, is observed too
    (`dem_opt.search.samplers.earlier`).  Points then have shares of the other vectors, which are 0 in the space.

    Attributes:
        space: The coefficients to choose from.
        trials: Budget in trials, if any: the last trial completes the most promising stopped one.
        forwards: Likewise in forward-equivalents.
        gradients: Trials have their gradient.
        parts: Number of parts of the windows, of which a probe sees one; 0 where gradients are of all windows.
        earlier: Composites that were scored before the search began.
    """

    space: Space
    trials: int | None = None
    forwards: float | None = None
    gradients: bool = False
    parts: int = 0
    earlier: Earlier = field(default_factory=Earlier)

    def propose(self, trials: Sequence[Trial], start: Sequence[Coefficients], rng: np.random.Generator) -> Proposal:
        """The next point."""
        is_unknown = all(trial.objective is None for trial in trials)
        anchor = self._anchor(trials) if self.parts else None
        lacks_anchor = self.parts > 0 and anchor is None
        if (proposal := first_new(self._first(start, is_unknown or lacks_anchor), trials)) is not None:
            return proposal
        if self.space.is_point or is_unknown:
            return Proposal(self.space.sample(rng))
        # One thread is enough for matrices of this size, takes no core from a worker, and gives the same bits on
        # machines with other numbers of cores.
        with threadpool_limits(1, "blas"):
            process = self._process(trials)
            if anchor is not None:
                return self._probe_or_whole(process, trials, rng)
            new = self._new(process, self._best_mean(process), trials, rng, self._cost(trials))
            stopped = self._stopped(process, trials)
        if stopped is not None and (self._is_last(trials) or stopped.worth >= new.worth):
            return Proposal(stopped.coefficients, stopped.improvement)
        return Proposal(new.coefficients, new.improvement)

    def _first(self, start: Sequence[Coefficients], is_unknown: bool) -> list[Coefficients]:
        """The points to propose first; with gradients, vertices only for workers that wait for the first one."""
        landmarks = first_points(self.space, start)
        if not self.gradients:
            return landmarks
        anchor = [self.space.centroid()] if self.parts else []
        return [*central_points(self.space, start), *anchor, *(landmarks if is_unknown else [])]

    def _anchor(self, trials: Iterable[Trial]) -> Trial | None:
        """The first trial with the gradient of all windows."""
        return next((trial for trial in trials if trial.part is None and self._has_gradient(trial)), None)

    def _has_gradient(self, trial: Trial) -> bool:
        # A gradient along fewer distributions, of a study that had not all of them, is none along the simplex.
        return trial.objective is not None and trial.gradient.keys() >= set(self.space.names)

    def _probe_or_whole(
        self, process: gp.GaussianProcess, trials: Sequence[Trial], rng: np.random.Generator
    ) -> Proposal:
        """A probe, or a whole trial where that is expected to gain more for its cost, and as the last one."""
        probe = self._new(process, self._best_mean(process), trials, rng, GRADIENT_FORWARDS / self.parts)
        whole = [trial for trial in trials if trial.is_whole]
        running = [trial for trial in trials if trial.state == "running" and trial.part is None]
        # A whole trial that is still running is taken to be what the process expects of it.
        expected = process.mean(self._shares(running)).tolist()
        best = min(*(trial.objective for trial in whole if trial.objective is not None), *expected, inf)
        banked = self._new(process, best, [*whole, *running], rng, 1.0)
        if self._is_last(trials) or banked.worth >= probe.worth:
            return Proposal(banked.coefficients, banked.improvement)
        return Proposal(probe.coefficients, probe.improvement, is_probe=True)

    def _best_mean(self, process: gp.GaussianProcess) -> float:
        """The best posterior mean at observed points of the space.  With noise the best value is partly luck."""
        return float(process.mean(process.observations.points_NF[self._is_inside(process)]).min())

    def _is_inside(self, process: gp.GaussianProcess) -> NDArray[np.bool_]:
        """Which observed points are in the space: they have no share of another vector, [N]."""
        is_inside_N: NDArray[np.bool_] = (process.observations.points_NF[:, len(self.space.caps_F) :] == 0).all(axis=1)
        return is_inside_N

    def _process(self, trials: Sequence[Trial]) -> gp.GaussianProcess:
        """The process fitted to finished trials, with running ones at their posterior mean."""
        running = [trial for trial in trials if trial.state == "running"]
        anchor = self._anchor(trials)
        chosen = thin(latest(trials), WITH_GRADIENTS if self.gradients else OBSERVATIONS)
        return gp.fit(self._observations(_with(anchor, chosen), anchor)).believing(self._shares(running))

    def _new(
        self, process: gp.GaussianProcess, best: float, trials: Sequence[Trial], rng: np.random.Generator, cost: float
    ) -> "_Candidate":
        """The greatest expected improvement on a value, apart from all trials; else a draw."""
        is_inside_N, own = self._is_inside(process), len(self.space.caps_F)
        order_n = np.argsort(process.observations.values_N[is_inside_N], kind="stable")
        ranked_NF = process.observations.points_NF[is_inside_N][order_n, :own]

        def log_improvement(shares_MF: Array) -> tuple[Array, Array]:
            wide_MF = np.pad(shares_MF, ((0, 0), (0, process.observations.others)))
            value_M, gradient_MF = log_expected_improvement(process, best, wide_MF)
            return value_M, gradient_MF[:, :own]

        polytope, taken_NF = self.space.polytope, self._shares(trials)[:, :own]
        points_MF, log_M = maximize(log_improvement, polytope.project(starts(ranked_NF[:4], rng)), polytope)
        improvement_M = np.exp(log_M)
        for shares_F, improvement in zip(points_MF, improvement_M, strict=True):
            if np.abs(taken_NF - shares_F).max(axis=1, initial=0).min() > APART:
                return _Candidate(self.space.at(shares_F), float(improvement), cost)
        return _Candidate(self.space.sample(rng), float(improvement_M[0]), cost)

    def _stopped(self, process: gp.GaussianProcess, trials: Sequence[Trial]) -> "_Candidate | None":
        """The stopped trial that is most worth completing; None where none may improve on the whole ones."""
        running = {trial.coefficients for trial in trials if trial.state == "running"}
        measured = [trial for trial in latest(trials) if trial.objective is not None]
        early = (trial for trial in measured if trial.error and trial.part is None)
        stopped = [trial for trial in early if trial.coefficients not in running]
        whole = (trial.objective for trial in measured if not trial.error and trial.objective is not None)
        best = min(whole, default=inf)
        if not stopped or best == inf:
            return None
        log_improvement_M, _ = log_expected_improvement(process, best, self._shares(stopped))
        candidates = [
            _Candidate(trial.coefficients, improvement, 1 - trial.forwards)
            for trial, improvement in zip(stopped, np.exp(log_improvement_M).tolist(), strict=True)
        ]
        promising = (candidate for candidate in candidates if candidate.improvement > 0)
        return max(promising, key=lambda candidate: candidate.worth, default=None)

    def _cost(self, trials: Sequence[Trial]) -> float:
        """Forward-equivalents that a new trial may take: the mean of the latest that completed no other."""
        landmarks = set(self.space.landmarks())
        # Landmarks and probes never race, so they say nothing of the cost.  A whole trial of less than one
        # forward-equivalent completed another.
        others = (trial for trial in trials if trial.coefficients not in landmarks and trial.part is None)
        raced = [trial for trial in others if trial.error or trial.forwards >= 1]
        costs = [trial.forwards for trial in raced if trial.state != "running"][-RECENT:]
        return float(np.mean(costs)) if costs else 1.0

    def _is_last(self, trials: Sequence[Trial]) -> bool:
        """True if the next trial spends the budget."""
        spent = sum(trial.forwards for trial in trials)
        return (self.trials is not None and len(trials) + 1 >= self.trials) or (
            self.forwards is not None and spent + 1 >= self.forwards
        )

    def _observations(self, trials: Sequence[Trial], anchor: Trial | None) -> gp.Observations:
        """Values of finished trials; gradients of the best and the latest ones, as many as DERIVATIVES allow."""
        complete = thin([trial for trial in trials if self._has_gradient(trial)], most_gradients(self.space))
        steep = {trial.number for trial in _with(anchor, complete)}
        values = zip(trials, values_of(trials), strict=True)
        own_trials = [Measurement.of_trial(trial, value) for trial, value in values]
        measured = compressed(own_trials + self.earlier.measurements(self.space, trials))
        places = [place for place, trial in enumerate(trials) if trial.number in steep]
        own = next((measured[place] for place, trial in enumerate(trials) if trial is anchor), None)
        return observe(self.space, measured, places, own, self._others)

    def _shares(self, trials: Iterable[Trial]) -> Array:
        """Shares of trials, with those of other vectors, which are 0: [N, F]."""
        shares = [self.space.shares(trial.coefficients, self._others) for trial in trials]
        return np.array(shares).reshape(-1, len(self.space.caps_F) + len(self._others))

    @cached_property
    def _others(self) -> tuple[str, ...]:
        """Vectors that the space has not and earlier composites have."""
        return self.earlier.others(self.space)


def _with(anchor: Trial | None, trials: Sequence[Trial]) -> list[Trial]:
    """Trials and the anchor, in the order of their numbers."""
    by_number = {trial.number: trial for trial in [*trials, *([anchor] if anchor else [])]}
    return [by_number[number] for number in sorted(by_number)]


@dataclass(frozen=True)
class _Candidate:
    """A point that may be proposed: its expected improvement in the objective's unit, and its cost.

    The cost is in forward-equivalents.
    """

    coefficients: Coefficients
    improvement: float
    cost: float

    @property
    def worth(self) -> float:
        """Expected nats per token for each forward-equivalent."""
        return self.improvement / max(self.cost, _LEAST_COST)


def log_expected_improvement(process: gp.GaussianProcess, best: float, shares_MF: Array) -> tuple[Array, Array]:
    """log E[max(best - f, 0)] = log h(z) + log sigma  with  z = (best - mean) / sigma, and its gradient.

    Ament et al. (2023), "Unexpected improvements to expected improvement for Bayesian optimization", section 4.1:
    in logarithms, since far from the best trials the improvement itself underflows, and its gradient with it.

    Returns:
        Values [M] and gradients by shares [M, F].
    """
    posterior = process.posterior(shares_MF)
    sigma_M = np.sqrt(posterior.variance_M)
    z_M = (best - posterior.mean_M) / sigma_M
    log_h_M, slope_M = log_h(z_M)
    # dz = -d mean / sigma - z d sigma / sigma,  d log sigma = d variance / (2 variance)
    by_mean_M = -slope_M / sigma_M
    by_variance_M = (1 - slope_M * z_M) / (2 * posterior.variance_M)
    gradient_MF = (
        by_mean_M[:, None] * posterior.mean_gradient_MF + by_variance_M[:, None] * posterior.variance_gradient_MF
    )
    return log_h_M + np.log(sigma_M), gradient_MF


def log_h(z_M: Array) -> tuple[Array, Array]:
    """log h(z),  h(z) = phi(z) + z Phi(z),  and its derivative Phi(z) / h(z), for any z.

    Below -1 through Mills' ratio r = Phi / phi, as h = phi (1 + z r); below -300, where the sum would cancel,
    by the first terms of its expansion,  1 + z r = z^-2 - 3 z^-4 + 15 z^-6.
    """
    # Each branch is evaluated on all points, clipped to where it is finite; np.select then takes the right one.
    near_M, far_M = np.maximum(z_M, -1.0), np.minimum(z_M, -300.0)
    h_M = _density(near_M) + near_M * ndtr(near_M)
    middle_M = np.clip(z_M, -300.0, -1.0)
    mills_M = np.sqrt(np.pi / 2) * erfcx(-middle_M / np.sqrt(2))
    reduced_M = 1 + middle_M * mills_M
    expanded_M = far_M**-2 * (1 - 3 * far_M**-2 + 15 * far_M**-4)
    log_phi_M = -0.5 * z_M**2 - 0.5 * np.log(2 * np.pi)
    cases = [z_M > -1, z_M > -300]
    value_M = np.select(cases, [np.log(h_M), log_phi_M + np.log(reduced_M)], log_phi_M + np.log(expanded_M))
    slope_M = np.select(cases, [ndtr(near_M) / h_M, mills_M / reduced_M], -far_M - 2 / far_M)
    return value_M, slope_M


def _density(z_M: Array) -> Array:
    """phi(z)."""
    density_M: Array = np.exp(-0.5 * z_M**2) / np.sqrt(2 * np.pi)
    return density_M


def starts(best_NF: Array, rng: np.random.Generator) -> Array:
    """Starts of the climbs: uniform points, sparse points, and the best points with noise of several sizes."""
    shares = best_NF.shape[1]
    uniform_MF = rng.dirichlet(np.ones(shares), 4 * _STARTS)
    sparse_MF = rng.dirichlet(np.full(shares, 0.3), 4 * _STARTS)
    best_MF = np.resize(best_NF, (_STARTS, shares))
    radius_M1 = np.exp(rng.uniform(np.log(1e-4), np.log(0.1), (_STARTS, 1)))
    return np.concatenate([uniform_MF, sparse_MF, best_MF + radius_M1 * rng.normal(size=best_MF.shape)])


def maximize(
    function: Callable[[Array], tuple[Array, Array]], starts_MF: Array, polytope: Polytope
) -> tuple[Array, Array]:
    """Local maxima over a polytope of shares of a function that gives values with gradients, greatest first.

    Projected gradient ascent with Barzilai and Borwein's step (1988; projected as by Birgin, Martinez and Raydan 2000),
    shortened where Armijo's condition fails, from the most promising starts, all in one batch, which those that have
    arrived leave:

        x' = project(x + t g) ,    t <- |x' - x|^2 / -(x' - x)'(g' - g)

    The projection reaches faces and corners exactly.

    Returns:
        The points [M, F] and their values [M].
    """
    value_M = function(starts_MF)[0]
    points_MF = starts_MF[np.argsort(-value_M, kind="stable")[:_STARTS]]
    value_M, gradient_MF = _along(function, points_MF)
    step_M = 0.1 / _norm(gradient_MF)
    moving_m = np.arange(len(points_MF))
    for _ in range(_STEPS):
        points_mF, gradient_mF = points_MF[moving_m], gradient_MF[moving_m]
        step_m = np.minimum(step_M[moving_m], _LONGEST / _norm(gradient_mF))
        moved_mF = polytope.project(points_mF + step_m[:, None] * gradient_mF)
        new_value_m, new_gradient_mF = _along(function, moved_mF)
        change_mF = moved_mF - points_mF
        accepted_m = new_value_m >= value_M[moving_m] + _ARMIJO * (gradient_mF * change_mF).sum(axis=1)
        # Where the function is not concave along the step, Barzilai and Borwein's quotient says nothing: lengthen it.
        curvature_m = -(change_mF * (new_gradient_mF - gradient_mF)).sum(axis=1)
        squared_m = (change_mF**2).sum(axis=1)
        newton_m = np.divide(squared_m, curvature_m, out=10 * step_m, where=curvature_m > 1e-300)
        step_M[moving_m] = np.where(accepted_m, np.clip(newton_m, 0.1 * step_m, 10 * step_m), 0.2 * step_m)
        better_m = moving_m[accepted_m]
        points_MF[better_m], gradient_MF[better_m] = moved_mF[accepted_m], new_gradient_mF[accepted_m]
        value_M[better_m] = new_value_m[accepted_m]
        moving_m = moving_m[np.abs(change_mF).max(axis=1) > _ARRIVED]
        if not len(moving_m):
            break
    order_M = np.argsort(-value_M, kind="stable")
    return points_MF[order_M], value_M[order_M]


def _along(function: Callable[[Array], tuple[Array, Array]], points_MF: Array) -> tuple[Array, Array]:
    """The function's values and its gradients along the plane of constant sum.

    The projection would take the normal part out again, but the step's length must not count it.
    """
    value_M, gradient_MF = function(points_MF)
    return value_M, gradient_MF - gradient_MF.mean(axis=1, keepdims=True)


def _norm(gradient_MF: Array) -> Array:
    """Lengths, above 0 so that steps may be divided by them."""
    norm_M: Array = np.maximum(np.linalg.norm(gradient_MF, axis=1), 1e-12)
    return norm_M
