"""The front between two losses, from the ledger without a forward pass."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dem_opt.analysis.bootstrap import difference
from dem_opt.analysis.sampling import documents_of
from dem_opt.errors import InputError, nearest
from dem_opt.evaluation.objective import Objective, mean_nll
from dem_opt.pareto import MEAN, Axes, Front, FrontPoint, Gap, make_axis, non_dominated
from dem_opt.search.trials import coefficients_of, exceeded, recall
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import HELD_OUT, SEARCH, UNITS, Composite, Score

BATCH = 500
"""Composites whose scores are read at once."""

Scored = Mapping[Composite, Mapping[str, Score]]
"""Scores by corpus of the composites that have all windows of a split."""


def checked_axes(identity: StudyIdentity, names: Sequence[str], where: Path | None, field: str) -> Axes:
    """The axes that a user names: distributions or general corpora, or "mean" for the study's weighted mean.

    Raises:
        InputError: For a name that is none of these, and for one that is given twice.
    """
    own = {axis.name: axis for axis in identity.pareto or ()}  # the mean of such a study has weights of its own
    known = (*identity.weights, MEAN)
    for name in names:
        if name not in known:
            mend = f"no such distribution or general corpus, nor {MEAN!r}; {nearest(name, known)}"
            raise InputError(where, field, name, mend)
    if len(names) != 2 or names[0] == names[1]:
        raise InputError(where, field, " ".join(names), "must be two different names")
    first, second = (own.get(name) or make_axis(name, identity.weights) for name in names)
    return first, second


def front_between(ledger: Ledger, identity: StudyIdentity, axes: Axes) -> Front | None:
    """The front over the points of the study's space that have scores on both axes' corpora, whoever measured them.

    Returns:
        None where there is no such point.
    """
    points = {
        composite: point
        for composite in ledger.composites(identity.scoring)
        if (point := coefficients_of(identity, composite)) is not None
    }
    scored = _scored(ledger, identity, axes, list(points), SEARCH)
    if not scored:
        return None
    composites = list(scored)
    losses_N2 = np.array([_losses(scored[composite], axes, identity.unit) for composite in composites])
    on_front_N = non_dominated(losses_N2)
    ascending = np.lexsort((losses_N2[:, 1], losses_N2[:, 0])).tolist()
    on_front = {composites[place]: points[composites[place]] for place in ascending if on_front_N[place]}
    baselines = _baselines(ledger, identity, axes)
    worst = np.array([baseline.search for baseline in baselines.values()] or losses_N2).max(axis=0)
    return Front(
        names=(axes[0].name, axes[1].name),
        unit=UNITS[identity.unit],
        points=_front_points(ledger, identity, axes, on_front),
        dominated=tuple((float(first), float(second)) for first, second in losses_N2[~on_front_N]),
        baselines=baselines,
        reference=(float(worst[0]), float(worst[1])),
    )


def _scored(ledger: Ledger, identity: StudyIdentity, axes: Axes, composites: Sequence[Composite], split: str) -> Scored:
    """The scores on the axes' corpora of those composites that have them all, on all windows."""
    corpora = {name: identity.corpora[split][name] for axis in axes for name in axis.weights}
    keys, windows = set(corpora.values()), identity.windows(split)
    scored = {}
    for start in range(0, len(composites), BATCH):
        batch = composites[start : start + BATCH]
        for composite, known in zip(batch, ledger.look_up_all(batch, keys, identity.scoring), strict=True):
            if all(key in known and len(known[key].nats_W) >= windows for key in keys):
                scored[composite] = {name: known[key] for name, key in corpora.items()}
    return scored


def _losses(scores: Mapping[str, Score], axes: Axes, unit: str) -> tuple[float, float]:
    return mean_nll(scores, axes[0].weights, unit), mean_nll(scores, axes[1].weights, unit)


def _front_points(
    ledger: Ledger, identity: StudyIdentity, axes: Axes, points: Mapping[Composite, Coefficients]
) -> tuple[FrontPoint, ...]:
    """The points of the front, which ascend in the first loss, so that the ends are the best on either axis."""
    search, held_out = (_scored(ledger, identity, axes, list(points), split) for split in (SEARCH, HELD_OUT))
    documents, (first, *_), (*_, last) = documents_of(ledger, identity, SEARCH), points, points
    objectives = [Objective(axis.weights, unit=identity.unit) for axis in axes]

    def gaps(scores: Mapping[str, Score]) -> tuple[Gap, ...]:
        differences = (
            difference(scores, search[best], objective, documents)
            for best, objective in zip((first, last), objectives, strict=True)
        )
        return tuple(Gap(gap.mean, gap.low, gap.high, gap.sampled) for gap in differences)

    def violation(composite: Composite) -> float:
        return exceeded(ledger, identity, recall(ledger, identity, composite, SEARCH)) if identity.protect else 0.0

    return tuple(
        FrontPoint(
            coefficients=coefficients,
            search=_losses(search[composite], axes, identity.unit),
            held_out=_losses(held_out[composite], axes, identity.unit) if composite in held_out else None,
            gaps=gaps(search[composite]),
            violation=violation(composite),
        )
        for composite, coefficients in points.items()
    )


def _baselines(ledger: Ledger, identity: StudyIdentity, axes: Axes) -> dict[str, FrontPoint]:
    """Base and fine-tunes alone, as far as they are scored."""
    named = {"base": identity.base, **identity.fine_tunes}
    composites = {name: Composite.single(content) for name, content in named.items()}
    search, held_out = (_scored(ledger, identity, axes, [*composites.values()], split) for split in (SEARCH, HELD_OUT))
    return {
        name: FrontPoint(
            coefficients=None,
            search=_losses(search[composite], axes, identity.unit),
            held_out=_losses(held_out[composite], axes, identity.unit) if composite in held_out else None,
        )
        for name, composite in composites.items()
        if composite in search
    }
