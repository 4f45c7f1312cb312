"""Coefficients by group in the ledger, on every kind of database."""

import json

import pytest
from sqlalchemy import text

from dem_opt.grouping import GroupedCoefficients, Grouping, GroupSettings, same_search
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.storage.group_tables import GroupTrial, read_composite, written_composite
from dem_opt.storage.ledger import SCHEMA, Ledger
from dem_opt.types import Composite, Score

GROUPING = Grouping((("embedding", ("embed",)), ("layers.0", ("q", "k")), ("layers.1", ("r", "s"))))
SCORE = Score((1.5, 2.5), (3, 4))


def coefficients(*units):
    rows = [Coefficients((("code", unit), ("math", UNIT - unit))) for unit in units]
    return GroupedCoefficients.of(GROUPING.names, rows)


def composite(*units):
    return Composite.grouped("base", {"code": "a", "math": "b"}, GROUPING, coefficients(*units))


@pytest.mark.parametrize("units", [(0, 0, 0), (UNIT, 0, 0), (1, 2, 3), (UNIT // 3, UNIT // 3, UNIT)])
def test_composites_come_back_from_the_ledger(engine, units):
    ledger = Ledger(engine)
    ledger.record(composite(*units), {"corpus": SCORE}, "scoring")
    assert ledger.composites("scoring") == [composite(*units)]
    assert ledger.look_up(composite(*units), ["corpus"], "scoring") == {"corpus": SCORE}
    assert read_composite(written_composite(composite(*units))) == composite(*units)


def test_composites_of_the_whole_model_are_written_as_ever():
    assert json.loads(written_composite(composite(5, 5, 5))) == {"a": 5, "b": UNIT - 5}


def test_gradients_of_folds_come_back_by_parameter(engine):
    ledger, folds = Ledger(engine), {"corpus": ((0, 2), (1,))}
    products = {
        fold: {"embed": {"a": 0.1 * place, "b": 1e-300}, "q": {"a": -0.0, "b": 1 / 3}}
        for place, fold in enumerate(folds["corpus"])
    }
    measured = composite(1, 2, 3)
    assert ledger.fold_gradients(measured, folds, "base") == {}
    ledger.record(measured, {"corpus": SCORE}, "scoring", differentiation="base", fold_gradients={"corpus": products})
    assert ledger.fold_gradients(measured, folds, "base") == {"corpus": products}
    assert ledger.fold_gradients(measured, {"corpus": ((0, 1), (2,))}, "base") == {}, "other folds"
    assert ledger.fold_gradients(measured, folds, "other") == {}


def test_trials_come_back_in_their_order_and_the_first_of_a_number_stays(engine):
    ledger = Ledger(engine)
    trials = [
        GroupTrial(
            number=n,
            kind="descent",
            shrink=float("inf") if n else 0.25,
            coefficients=coefficients(n, 2, 3),
            composite=composite(n, 2, 3),
            failed=n == 1,
        )
        for n in range(3)
    ]
    for trial in reversed(trials):
        ledger.add_group_trial("search", trial)
    ledger.add_group_trial(
        "search",
        GroupTrial(
            number=0, kind="fold 0", shrink=1.0, coefficients=coefficients(9, 9, 8), composite=composite(9, 9, 8)
        ),
    )
    assert ledger.group_trials("search") == trials and ledger.group_trials("other") == []


def test_a_database_of_the_schema_before_gets_the_tables(engine):
    Ledger(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE dem_fold_gradient"))
        connection.execute(text("DROP TABLE dem_group_trial"))
        connection.execute(text("DELETE FROM dem_schema"))
        connection.execute(text("INSERT INTO dem_schema VALUES (7)"))
    ledger = Ledger(engine)
    ledger.record(composite(1, 2, 3), {"corpus": SCORE}, "scoring")
    assert ledger.group_trials("search") == [] and ledger.composites("scoring") == [composite(1, 2, 3)]
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT max(version) FROM dem_schema")) == SCHEMA == 9


@pytest.mark.parametrize("shrink", [None, 0.0, 0.125])
def test_settings_are_identity_fields_that_change_no_search_of_global_coefficients(shrink):
    settings = GroupSettings(grouping=GROUPING, shrink=shrink, forwards=33.0)
    fields = {"base": "hash"} | settings.fields()
    assert GroupSettings.parse(fields) == settings and GroupSettings.parse({"base": "hash"}) is None
    assert same_search(fields, {"base": "hash"}) and not same_search(fields, {"base": "other"})
