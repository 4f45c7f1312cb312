"""The search of coefficients by group: from the global coefficients down by gradients, then shrunk toward them.

    descent   projected quasi-Newton on the product of the groups' simplices (`group_model`), a gradient each
    folds     the model's optimum on each half of the search documents, for several strengths of the penalty
    shrunk    the optimum of all documents with the strength whose fold optima are best on the other half

A strength s of the penalty  s |w_p - w|^2 / 2 , summed over groups p, is judged by  the mean over both folds of the
objective on the fold that did not choose.  A fold has half of the documents, and a penalty that balances their noise is
proportional to one over their number: so all documents get half of the best strength.  Where no strength beats the
global coefficients, these are the result.

Everything is a function of the trials, and the search sees the search split alone.

Shape suffixes: G groups, F shares, K distributions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

import numpy as np

from dem_opt.grouping import GroupedCoefficients, GroupSettings, Judgement
from dem_opt.search.group_model import Array, Model, Point, curvature_of, tangential
from dem_opt.simplex import Coefficients, Space
from dem_opt.types import GRADIENT_FORWARDS

STRENGTHS = (0.0, 0.03, 0.2, 1.0)
"""Strengths that folds judge, in the mean curvature of the objective; the global coefficients are an infinite one.

From none to a penalty as steep as the objective, in steps of about 6; each costs 2 forward passes.  A strength between
them may be a little better than the best of these; a wrong one never wins over the global coefficients.
"""

CONVERGED = 3e-5
"""Decrease of the objective that the model expects of a step, in the objective's unit, below which a descent ends.

A thousandth of what groups gain on the quickstart, and less than held-out splits can tell from 0.
"""

DESCENT, SHRUNK, CHOSEN = "descent", "shrunk", "chosen"
FOLDS = ("fold 0", "fold 1")
"""Kinds of trials; the last one of a search repeats the one that was chosen."""

WITH_GRADIENT = (DESCENT, SHRUNK)

MOST_SHRUNK = 2
"""Trials with the chosen strength, which begin at the best point of the descent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A trial as it was measured.

    Attributes:
        kind: See `GroupTrial`.
        shrink: Curvature of the penalty.
        coefficients: By group.
        value: Penalized objective (see `TrialRecord.penalized`) on all windows of the search split; infinite where it
            failed.
        fold_values: The same on each fold.
        fold_gradients_GK: Its gradient on each fold, by group and coefficient; empty without gradients.
        gradient_GK: The same of all windows; None without gradients.
    """

    kind: str
    shrink: float
    coefficients: GroupedCoefficients
    value: float
    fold_values: tuple[float, ...] = ()
    fold_gradients_GK: tuple[Array, ...] = ()
    gradient_GK: Array | None = None

    @property
    def forwards(self) -> float:
        """Forward-equivalents that the budget counts."""
        return GRADIENT_FORWARDS if self.kind in WITH_GRADIENT else 0.0 if self.kind == CHOSEN else 1.0


def judgements(trials: Sequence[Measured]) -> list[Judgement]:
    """The strengths that folds have judged, the global coefficients last; none where no fold was asked."""
    centre = trials[0]
    judged = []
    for strength in dict.fromkeys(trial.shrink for trial in trials if trial.kind in FOLDS):
        optima = {trial.kind: trial for trial in trials if trial.kind in FOLDS and trial.shrink == strength}
        if len(optima) < len(FOLDS) or inf in (trial.value for trial in optima.values()):
            continue
        gains = np.array(
            [
                [optima[kind].fold_values[fold] - centre.fold_values[fold] for fold in range(len(FOLDS))]
                for kind in FOLDS
            ]
        )
        judged.append(
            Judgement(
                shrink=strength,
                own=float(np.diag(gains).mean()),
                other=float((gains.sum() - np.trace(gains)) / (gains.size - len(FOLDS))),
            )
        )
    return [*judged, Judgement(shrink=inf, own=0.0, other=0.0)] if judged else []


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A trial to measure."""

    kind: str
    shrink: float
    coefficients: GroupedCoefficients


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupSearch:
    """A search.

    Attributes:
        space: The coefficients that a group can have.
        settings: The groups.
        centre: The global coefficients.
        start_nn: The curvature that it begins with.
    """

    space: Space
    settings: GroupSettings
    centre: Coefficients
    start_nn: Array = field(repr=False)

    def next(self, trials: Sequence[Measured]) -> list[Proposal]:
        """The next trials, which may be measured together; none where the search has ended.

        The last proposal, of the kind "chosen", is the result, and needs no measurement.
        """
        if trials and trials[-1].kind == CHOSEN:
            return []
        if not trials:
            return [Proposal(kind=DESCENT, shrink=self._own_shrink, coefficients=self._everywhere(self.centre))]
        if all(trial.kind == DESCENT for trial in trials):
            return self._descend(trials) or self._judge(trials)
        if trials[-1].kind in FOLDS and (missing := self._judge(trials)):
            return missing
        return self._shrink(trials)

    @property
    def _own_shrink(self) -> float:
        """The penalty of a descent: what the study file asks for, and none where folds choose it."""
        return self.settings.shrink or 0.0

    @property
    def _reserve(self) -> float:
        """Forward-equivalents that folds and shrunk trials take after a descent."""
        return (
            0.0 if self.settings.shrink is not None else len(STRENGTHS) * len(FOLDS) + GRADIENT_FORWARDS * MOST_SHRUNK
        )

    def _descend(self, trials: Sequence[Measured]) -> list[Proposal]:
        """The next step of the descent; none where it has converged or its budget ends."""
        spent = sum(trial.forwards for trial in trials)
        if spent + GRADIENT_FORWARDS > self.settings.forwards - self._reserve:
            return []
        return self._step(trials, DESCENT, self._own_shrink)

    def _step(self, trials: Sequence[Measured], kind: str, shrink: float) -> list[Proposal]:
        """The minimum of the model about the best point; half of the way to it after a failure."""
        model = self._model(trials, shrink, self._curvature(trials))
        shares_GF = model.minimum()
        if model.change(shares_GF) > -CONVERGED:
            return []
        failures = 0
        for trial in reversed(trials):
            if trial.value != inf:
                break
            failures += 1
        shares_GF = model.shares_GF + 0.5**failures * (shares_GF - model.shares_GF)
        return [Proposal(kind=kind, shrink=shrink, coefficients=self._at(shares_GF))]

    def _judge(self, trials: Sequence[Measured]) -> list[Proposal]:
        """The optima of folds that are not measured yet; the result where no fold is to be asked."""
        if self.settings.shrink is not None:
            return self._choose(trials, self.settings.shrink)
        known = {(trial.kind, trial.shrink) for trial in trials}
        descent = [trial for trial in trials if trial.kind == DESCENT]
        curvature_nn = self._curvature(descent)
        # Rounded, so that last bits which differ between machines make no other strengths of a search that goes on.
        mean_curvature = float(f"{np.trace(curvature_nn) / len(curvature_nn) / self._scale**2:.3g}")
        missing = [
            (part * mean_curvature, fold, kind)
            for part in STRENGTHS
            for fold, kind in enumerate(FOLDS)
            if (kind, part * mean_curvature) not in known
        ]
        return [
            Proposal(
                kind=kind,
                shrink=shrink,
                coefficients=self._at(self._model(descent, shrink, curvature_nn, fold).minimum()),
            )
            for shrink, fold, kind in missing
        ]

    def _shrink(self, trials: Sequence[Measured]) -> list[Proposal]:
        """The optimum of all windows with the strength that folds have chosen, then the result."""
        best = min(judgements(trials), key=lambda judged: judged.other, default=None)
        if best is None or best.shrink == inf or best.other >= 0:
            return [Proposal(kind=CHOSEN, shrink=inf, coefficients=self._everywhere(self.centre))]
        shrink = best.shrink / 2
        count = sum(trial.kind == SHRUNK for trial in trials)
        spent = sum(trial.forwards for trial in trials)
        may_step = count < MOST_SHRUNK and spent + GRADIENT_FORWARDS <= self.settings.forwards
        step = self._step(trials, SHRUNK, shrink) if may_step else []
        return step or self._choose(trials, shrink)

    def _choose(self, trials: Sequence[Measured], shrink: float) -> list[Proposal]:
        """The result: the best of the trials with gradients, penalty included."""
        best = min(self._steep(trials), key=lambda trial: self._penalized(trial, shrink))
        return [Proposal(kind=CHOSEN, shrink=shrink, coefficients=best.coefficients)]

    def _steep(self, trials: Sequence[Measured]) -> list[Measured]:
        return [trial for trial in trials if trial.gradient_GK is not None]

    def _penalized(self, trial: Measured, shrink: float) -> float:
        apart_GF = self._shares(trial.coefficients) - self._centre_F
        return trial.value + 0.5 * shrink * self._scale**2 * float((apart_GF**2).sum())

    def _model(self, trials: Sequence[Measured], shrink: float, curvature_nn: Array, fold: int | None = None) -> Model:
        """The model of all windows, or of a fold's, about the best point of all windows."""
        best = min(self._steep(trials), key=lambda trial: self._penalized(trial, shrink))
        gradient_GK = best.gradient_GK if fold is None else best.fold_gradients_GK[fold]
        assert gradient_GK is not None
        return Model(
            self._shares(best.coefficients),
            tangential(gradient_GK @ self.space.jacobian()),
            curvature_nn,
            self._centre_F,
            self.space.polytope,
            shrink * self._scale**2,
        )

    def _curvature(self, trials: Sequence[Measured]) -> Array:
        """The curvature after all trials with gradients."""
        points = [
            Point(self._shares(trial.coefficients), trial.value, trial.gradient_GK @ self.space.jacobian())
            for trial in trials
            if trial.gradient_GK is not None
        ]
        return curvature_of(self.start_nn, points)

    @cached_property
    def _centre_F(self) -> Array:
        return self.space.shares(self.centre)

    @cached_property
    def _scale(self) -> float:
        """Coefficient of a share of 1 above its lower bound."""
        return float(self.space.jacobian().max())

    def _shares(self, coefficients: Mapping[str, Coefficients]) -> Array:
        return np.array([self.space.shares(coefficients[name]) for name in self.settings.grouping.names])

    def _at(self, shares_GF: Array) -> GroupedCoefficients:
        rows = [self.space.at(shares_F) for shares_F in shares_GF]
        return GroupedCoefficients.of(self.settings.grouping.names, rows)

    def _everywhere(self, coefficients: Coefficients) -> GroupedCoefficients:
        names = self.settings.grouping.names
        return GroupedCoefficients.of(names, [coefficients] * len(names))
