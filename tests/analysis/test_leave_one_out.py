"""Laws of leave-one-out: the others keep their proportions, the total is the winner's, and nothing is made twice."""

import numpy as np
import pytest

from dem_opt.analysis.results import Entry, left_out_entries
from dem_opt.simplex import UNIT, Coefficients, Space
from dem_opt.storage.identity import StudyIdentity
from dem_opt.types import Composite

NAMES = ("a", "b", "c", "d")


def identity(names: tuple[str, ...], total: float = 1.0) -> StudyIdentity:
    return StudyIdentity("base", {name: f"hash {name}" for name in names}, Space(names, total), {}, {}, {})


def winner(study: StudyIdentity, point: Coefficients) -> Entry:
    return Entry(
        label="best of grid", role="best", algorithm="grid", coefficients=point, composite=study.composite(point)
    )


@pytest.mark.parametrize("total", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_others_grow_in_proportion_to_the_winners_total(total: float, count: int) -> None:
    rng = np.random.default_rng(0)
    study = identity(NAMES[:count], total)
    point = study.space.sample(rng)
    made = left_out_entries(study, winner(study, point))
    assert [entry.label for entry in made] == list(NAMES[:count])
    for entry in made:
        assert entry.role == "without" and entry.coefficients is not None and entry.forwards == 1
        units, before = entry.coefficients.units, point.units
        assert units[entry.label] == 0 and sum(units.values()) == sum(before.values())
        rest = sum(before.values()) - before[entry.label]
        for name in units.keys() - {entry.label}:
            assert units[name] == pytest.approx(before[name] * sum(before.values()) / rest, abs=2)
        assert entry.composite == study.composite(entry.coefficients)


def test_what_the_winner_has_nothing_of_is_not_left_out() -> None:
    study = identity(NAMES)
    point = Coefficients((("a", UNIT // 2), ("b", 0), ("c", UNIT // 2), ("d", 0)))
    made = left_out_entries(study, winner(study, point))
    assert [entry.composite for entry in made] == [Composite.single("hash c"), Composite.single("hash a")]


def test_a_winner_of_one_distribution_and_a_baseline_have_none() -> None:
    study = identity(NAMES)
    alone = Coefficients(tuple((name, UNIT * (name == "a")) for name in NAMES))
    assert left_out_entries(study, winner(study, alone)) == []
    base = Entry(label="base", role="base", coefficients=None, composite=Composite.single("base"))
    assert left_out_entries(study, base) == []


def test_bounds_that_forbid_a_winner_forbid_no_comparison() -> None:
    space = Space(("a", "b"), bounds=(("a", 0.2, 0.6),))
    study = StudyIdentity("base", {"a": "hash a", "b": "hash b"}, space, {}, {}, {})
    point = space.nearest(np.array([0.5, 0.5]))
    made = left_out_entries(study, winner(study, point))
    assert [entry.composite for entry in made] == [Composite.single("hash b"), Composite.single("hash a")]
