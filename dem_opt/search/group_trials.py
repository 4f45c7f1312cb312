"""Trials of a search of coefficients by group, as the ledger has measured them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import fsum, inf

import numpy as np

from dem_opt.evaluation.objective import Objective, violation
from dem_opt.grouping import GroupResult
from dem_opt.search.folds import cut, folds_of
from dem_opt.search.group_model import Array
from dem_opt.search.group_search import CHOSEN, WITH_GRADIENT, Measured, judgements
from dem_opt.search.trials import base_scores, recall
from dem_opt.simplex import Coefficients
from dem_opt.storage.group_tables import GroupTrial
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import PENALTY, SEARCH, Folds, ParameterGradient, Score


def search_key(identity: StudyIdentity, centre: Coefficients) -> str:
    """Key of the search from a centre: a hash of everything that its trials depend on."""
    fields = [identity.identity_fields(), identity.scoring_fields(), dict(centre.pairs)]
    return sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def study_folds(ledger: Ledger, identity: StudyIdentity) -> dict[str, Folds]:
    """Folds of the search split by corpus key; the base is scored on all of it."""
    scores = base_scores(ledger, identity)
    return folds_of(ledger, {identity.corpora[SEARCH][name]: score for name, score in scores.items()})


def search_documents(ledger: Ledger, identity: StudyIdentity) -> int | None:
    """Documents of the search split, those of all corpora together; None where the ledger does not know them."""
    layouts = [ledger.layout(key) for key in identity.keys(SEARCH)]
    if any(layout is None for layout in layouts):
        return None
    return sum(len({number for window in layout.documents_W for number in window}) for layout in layouts if layout)


def measured(ledger: Ledger, identity: StudyIdentity, folds: Mapping[str, Folds], trial: GroupTrial) -> Measured:
    """A trial with what the ledger has measured of it."""
    scores = {} if trial.failed else recall(ledger, identity, trial.composite, SEARCH)
    if not scores or trial.kind == CHOSEN:
        value = inf if trial.failed else 0.0
        return Measured(kind=trial.kind, shrink=trial.shrink, coefficients=trial.coefficients, value=value)
    objective = _FoldObjective(ledger, identity, folds)
    by_fold = [objective.on(scores, fold) for fold in range(2)]
    gradients: list[Array] = []
    gradient_GK = None
    if trial.kind in WITH_GRADIENT:
        products = ledger.fold_gradients(trial.composite, folds, identity.differentiation)
        gradients = [objective.gradient(scores, products, [fold]) for fold in range(2)]
        gradient_GK = objective.gradient(scores, products, [0, 1])
    return Measured(
        kind=trial.kind,
        shrink=trial.shrink,
        coefficients=trial.coefficients,
        value=objective.on(scores),
        fold_values=tuple(by_fold),
        fold_gradients_GK=tuple(gradients),
        gradient_GK=gradient_GK,
    )


@dataclass(frozen=True)
class _FoldObjective:
    """The penalized objective (see `TrialRecord.penalized`) on a fold of every corpus, with its gradient."""

    ledger: Ledger
    identity: StudyIdentity
    folds: Mapping[str, Folds]

    @property
    def _mean(self) -> Objective:
        return Objective(self.identity.weights, unit=self.identity.unit)

    def _cut(self, scores: Mapping[str, Score], fold: int | None) -> dict[str, Score]:
        if fold is None:
            return dict(scores)
        keys = self.identity.corpora[SEARCH]
        return {name: cut(score, self.folds[keys[name]][fold]) for name, score in scores.items()}

    def on(self, scores: Mapping[str, Score], fold: int | None = None) -> float:
        """The objective on a fold, or on all windows."""
        return self._mean(self._cut(scores, fold)) + PENALTY * violation(
            self._cut(scores, fold), self._base(fold), self.identity.protect, self.identity.unit
        )

    def _base(self, fold: int | None) -> dict[str, Score]:
        return self._cut(base_scores(self.ledger, self.identity), fold) if self.identity.protect else {}

    def gradient(
        self,
        scores: Mapping[str, Score],
        products: Mapping[str, Mapping[tuple[int, ...], ParameterGradient]],
        chosen: Sequence[int],
    ) -> Array:
        """d objective / d w on the chosen folds together, [G, K]."""
        fold = chosen[0] if len(chosen) == 1 else None
        on_fold, base, unit = self._cut(scores, fold), self._base(fold), self.identity.unit
        shares = self._mean.shares(on_fold)
        for name, allowance in self.identity.protect.items():
            if on_fold[name].loss(unit) > base[name].loss(unit) + allowance:
                shares[name] = shares.get(name, 0.0) + PENALTY
        groups = self.identity.groups
        assert groups is not None
        keys, names = self.identity.corpora[SEARCH], self.identity.space.names
        gradient_GK = np.zeros((len(groups.grouping), len(names)))
        for name, share in shares.items():
            scale = share / fsum(on_fold[name].sizes_W(unit))
            for number in chosen:
                by_parameter = products[keys[name]][self.folds[keys[name]][number]]
                gradient_GK += scale * self._by_group(by_parameter)
        return gradient_GK

    def _by_group(self, products: ParameterGradient) -> Array:
        """Sums of products over the parameters of each group, [G, K]; a parameter without gradient has none."""
        groups = self.identity.groups
        assert groups is not None
        contents = [self.identity.fine_tunes[name] for name in self.identity.space.names]
        return np.array(
            [
                [
                    fsum(products[parameter][content] for parameter in members if parameter in products)
                    for content in contents
                ]
                for _, members in groups.grouping.groups
            ]
        )


def group_result(ledger: Ledger, identity: StudyIdentity, centre: Coefficients | None) -> GroupResult | None:
    """The result of the search from the global coefficients; None where it has not ended."""
    if identity.groups is None or centre is None:
        return None
    trials = ledger.group_trials(search_key(identity, centre))
    if not trials or trials[-1].kind != CHOSEN:
        return None
    folds = study_folds(ledger, identity)
    known = [measured(ledger, identity, folds, trial) for trial in trials]
    return GroupResult(
        coefficients=trials[-1].coefficients,
        centre=centre,
        shrink=trials[-1].shrink,
        judgements=tuple(judgements(known)),
        forwards=sum(trial.forwards for trial in known),
        gradients=sum(trial.gradient_GK is not None for trial in known),
        seconds=sum(
            ledger.seconds(composite, identity.keys(SEARCH), identity.scoring)
            for composite in {trial.composite for trial in trials[1:]}
        ),
    )
