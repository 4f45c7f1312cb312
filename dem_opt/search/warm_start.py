"""Generations of a study: a changed identity begins a new one, which starts from the ledger's composites.

An identity that the study had before goes on with the trials that it has.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum, inf, isfinite
from pathlib import Path

import numpy as np

from dem_opt.errors import EvaluationError, InputError
from dem_opt.evaluation.objective import Objective
from dem_opt.grouping import same_search
from dem_opt.progress import Progress
from dem_opt.search.beginning import Beginning, Known
from dem_opt.search.samplers.earlier import FEWEST, Earlier, EarlierComposite
from dem_opt.search.trials import exceeded, objectives, recall
from dem_opt.simplex import Coefficients
from dem_opt.storage.identity import StudyIdentity, changes, refuse_other_scoring
from dem_opt.storage.leases import Lease
from dem_opt.storage.ledger import Ledger, StudyRow
from dem_opt.types import PENALTY, SEARCH, Score

CARRIED_OVER = 10
"""Composites of earlier generations that a new one begins with, where all their scores are known."""

SCORED_ANEW = 6
"""Composites that it begins with where each costs a pass over every new corpus."""

OBSERVED = 64
"""Composites of earlier generations that a search learns from without scoring them."""


def enter(
    name: str,
    identity: StudyIdentity,
    ledger: Ledger,
    lease: Lease,
    confirm: Callable[[], None],
    where: Path | None,
    progress: Progress,
) -> tuple[int, Beginning]:
    """Write down a study's first run, or a change of its identity; `confirm` raises where the turn to do so was lost.

    Returns:
        The study's generation, and what its searches begin with.

    Raises:
        InputError: Where new scores would not compare with those that the study has, and where other drivers are at
            work on the identity that it had before.
    """
    identity_fields, scoring_fields = identity.identity_fields(), identity.scoring_fields()
    row = ledger.study(name)
    if row is None:
        confirm()
        ledger.enter_study(StudyRow(name, 1, scoring_fields, identity_fields))
        return 1, Beginning()
    refuse_other_scoring(where, row.scoring, scoring_fields)
    change = changes(row.identity, identity_fields)
    if change and (others := lease.others()):
        mend = f"{change}, while it is driven by {' and '.join(others.values())}; stop them first"
        raise InputError(where, "name", name, mend)
    known = _find_search(ledger, name, identity_fields)
    generation = known or max(ledger.generations(name)) + 1
    confirm()
    ledger.enter_study(StudyRow(name, generation, row.scoring | scoring_fields, identity_fields))
    beginning = beginning_of(identity, sorted(_scored(ledger, identity))) if generation > 1 else Beginning()
    beginning = replace(beginning, known={point: _known(ledger, identity, point) for point in beginning.start})
    if change and generation == row.generation:
        progress.note(f"{name} has changed ({change}): the search of global coefficients stays")
    elif change:
        course = "goes on" if known else f"begins {describe_reuse(ledger, identity, beginning)}"
        progress.note(f"{name} has changed ({change}): generation {generation} {course}")
    return generation, beginning


def find_generation(ledger: Ledger, name: str, identity_fields: Mapping[str, str]) -> int | None:
    """Number of a study's generation with these identity fields, the present one or an earlier one, or None."""
    generations = ledger.generations(name)
    return next((number for number in sorted(generations) if generations[number] == identity_fields), None)


def _find_search(ledger: Ledger, name: str, identity_fields: Mapping[str, str]) -> int | None:
    """Number of a study's generation with this search of global coefficients, whatever its groups, or None."""
    generations = ledger.generations(name)
    return next((number for number in sorted(generations) if same_search(generations[number], identity_fields)), None)


@dataclass(frozen=True, kw_only=True, order=True)
class Scored:
    """A composite of the ledger that tells something of the study; the most useful sorts first.

    Attributes:
        missing: Corpora of the search split that it has no scores on.
        violation: Violation over the scored corpora, in the objective's unit.
        objective: Objective over the scored corpora, in the objective's unit.
        key: The composite's key, which orders equals.
        units: Coefficients in units of 1e-9 by distribution, and by content of vectors that the study has not.
        losses: Loss by corpus that has a weight and a score, in the objective's unit.
    """

    missing: int
    violation: float
    objective: float
    key: str
    units: Mapping[str, int] = field(compare=False)
    losses: Mapping[str, float] = field(compare=False)


def beginning_of(identity: StudyIdentity, ranked: Sequence[Scored]) -> Beginning:
    """Choose starting points and earlier observations of a new generation from ranked composites."""
    inside = [each for each in ranked if each.units.keys() == set(identity.space.names)]
    points = {each.key: Coefficients(tuple(sorted(each.units.items()))) for each in inside}
    own = [(each, points[each.key]) for each in inside if identity.space.contains(points[each.key])]
    return Beginning(start=carried_over(own), earlier=earlier_composites(identity, ranked))


def carried_over(ranked: Sequence[tuple[Scored, Coefficients]]) -> list[Coefficients]:
    """The best composites of the ledger that the study's space still contains, as its coefficients.

    A composite of an earlier generation is a point of this one where it uses no other checkpoint: the face w_new = 0 of
    a simplex that has grown, or the rest of one that has shrunk.  Those with the most corpora scored come first, by
    their violation and objective over these (the mean, while regrets are not known).  Where corpora are missing, only
    they are measured: on the best of those, and on the points that are farthest from all chosen ones, since near the
    best the old corpora say little that is new.
    """
    least = min((each.missing for each, _ in ranked), default=0)
    if not least:
        return [point for _, point in ranked[:CARRIED_OVER]]
    most_scored = [point for each, point in ranked if each.missing == least]
    others = [point for each, point in ranked if each.missing != least]
    return (farthest_first(most_scored, SCORED_ANEW) + others)[:SCORED_ANEW]


def earlier_composites(identity: StudyIdentity, ranked: Sequence[Scored]) -> Earlier:
    """Choose at most OBSERVED composites as earlier observations of a search.

    A vector outside the study is admitted if at least FEWEST composites use it: a single one says nothing about the
    others.  Of more than OBSERVED composites, half are the best and half are farthest from each other.  Regrets are
    against fine-tunes that may not be scored yet, and a front has two losses: both get no observations.
    """
    if identity.worst or identity.pareto:
        return Earlier()
    names, uses = set(identity.space.names), Counter[str]()
    for each in ranked:
        uses.update(each.units.keys() - names)
    others = {name for name, count in uses.most_common(len(names)) if count >= FEWEST}
    usable = [each for each in ranked if each.units.keys() <= names | others]
    wide = {
        each.key: Coefficients(tuple(sorted({**dict.fromkeys(others, 0), **each.units}.items()))) for each in usable
    }
    by_point = {wide[each.key]: each for each in usable}
    spread = farthest_first([wide[each.key] for each in usable[OBSERVED // 2 :]], OBSERVED // 2)
    chosen = usable[: OBSERVED // 2] + [by_point[point] for point in spread]
    is_mean = not (identity.function or identity.protect)
    total = fsum(identity.weights.values())
    weights = {name: weight / total for name, weight in identity.weights.items() if weight} if is_mean else {}
    composites = []
    for each in chosen:
        is_complete = each.losses.keys() == weights.keys() if is_mean else not each.missing
        value = each.objective + PENALTY * each.violation if is_complete and isfinite(each.objective) else None
        if is_mean or value is not None:
            composites.append(EarlierComposite(each.units, each.losses if is_mean else {}, value, each.violation))
    return Earlier(composites, weights, identity.unit)


def _scored(ledger: Ledger, identity: StudyIdentity) -> Iterator[Scored]:
    """The ledger's composites with a total that the space has and a score on some corpus of the objective."""
    objective = objectives(ledger, identity).get(SEARCH, Objective(identity.weights, unit=identity.unit))
    names = {content: name for name, content in identity.fine_tunes.items()}
    for composite in ledger.composites(identity.scoring):
        contents = {content: units for content, units in composite.terms if content != identity.base}
        if composite.parts or not identity.space.least_units <= sum(contents.values()) <= identity.space.total_units:
            continue
        scores = recall(ledger, identity, composite, SEARCH)
        weights = {name: identity.weights[name] for name in scores}
        if any(weights.values()):
            units = {names.get(content, content): count for content, count in contents.items()}
            yield Scored(
                missing=len(identity.corpora[SEARCH]) - len(scores),
                violation=exceeded(ledger, identity, scores),
                objective=_ranking(identity, replace(objective, weights=weights), scores),
                key=composite.key,
                units=dict.fromkeys(identity.space.names, 0) | units,
                losses={name: scores[name].loss(identity.unit) for name, weight in weights.items() if weight},
            )


def _known(ledger: Ledger, identity: StudyIdentity, point: Coefficients) -> Known:
    """Look up how much of a starting point the ledger has."""
    composite, sizes = identity.composite(point), identity.sizes(SEARCH)
    scores = ledger.look_up(composite, tuple(sizes), identity.scoring)
    gradients = ledger.gradients(composite, tuple(sizes), identity.differentiation)
    vectors = set(identity.fine_tunes.values())
    steep = sum(sizes[key] for key, gradient in gradients.items() if vectors <= gradient.keys())
    scored = sum(min(len(score.nats_W), sizes[key]) for key, score in scores.items())
    return Known(scored / sum(sizes.values()), steep / sum(sizes.values()))


def _ranking(identity: StudyIdentity, objective: Objective, scores: Mapping[str, Score]) -> float:
    """Return the objective over the scored corpora; a custom one needs all of them, so the mean until then."""
    is_whole = scores.keys() == identity.corpora[SEARCH].keys()
    try:
        return (objective if is_whole else replace(objective, function=None))(scores)
    except EvaluationError:
        return inf


def describe_reuse(ledger: Ledger, identity: StudyIdentity, beginning: Beginning) -> str:
    """The part of a sentence that says what a new generation takes over from the ledger, and why that holds."""
    start = beginning.start
    known = len({each.coefficients for each in beginning.earlier.composites}.difference(start))
    also = f"; the search learns from {known} more that were scored before" if known else ""
    if not start:
        return f"with no composite that is measured{also}"
    scores = [recall(ledger, identity, identity.composite(point), SEARCH) for point in start]
    kept = [name for name in identity.corpora[SEARCH] if all(name in by_name for by_name in scores)]
    new = [name for name in identity.corpora[SEARCH] if name not in kept]
    why = (
        f"with {len(start)} composites whose checkpoints and windows are the same, so scores on {', '.join(kept)} hold"
    )
    return f"{why}; " + (f"of these only {', '.join(new)} is scored" if new else "none of these is scored again") + also


def farthest_first(ranked: Sequence[Coefficients], most: int) -> list[Coefficients]:
    """Farthest-first traversal (Gonzalez 1985): the first point, then always the one farthest from those chosen.

    The distance is the greatest difference of a coefficient; of equals the first is chosen.
    """
    if not ranked:
        return []
    units_NK = np.array([[units for _, units in point.pairs] for point in ranked]).reshape(len(ranked), -1)
    chosen, distance_N = list[int](), np.full(len(ranked), np.inf)
    while len(chosen) < min(most, len(ranked)) and distance_N.max() > 0:
        chosen.append(int(distance_N.argmax()))
        distance_N = np.minimum(distance_N, np.abs(units_NK - units_NK[chosen[-1]]).max(axis=1))
    return [ranked[place] for place in chosen]
