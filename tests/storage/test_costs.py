"""Costs by part, of a study and its placebos."""

from types import SimpleNamespace
from typing import Any

from sqlalchemy import Engine

from dem_opt.storage.ledger import Ledger
from dem_opt.types import Cost, Expense

IDENTITY: Any = SimpleNamespace(sizes=lambda split: {"one": 6, "two": 4})
"""Ten windows in the search split."""


def test_a_study_s_placebos_are_parts_of_it_and_other_studies_are_not(engine: Engine) -> None:
    spent = [
        ("a", "baselines", 10.0),
        ("a", "random", 20.0),
        ("a+permuted", "random", 30.0),
        ("a+permuted", "final table", 5.0),
        ("a_+random", "random", 40.0),
        ("ab", "random", 50.0),
        ("a", "random", 10.0),
    ]
    ledger = Ledger(engine)
    for study, part, windows in spent:
        ledger.spend(Expense(study=study, part=part, windows=windows, seconds=1.0))
    assert ledger.costs("a", IDENTITY) == (
        Cost(part="baselines", evaluations=1, forwards=1.0, seconds=1.0),
        Cost(part="random", evaluations=2, forwards=3.0, seconds=2.0),
        Cost(part="placebo (permuted)", evaluations=2, forwards=3.5, seconds=2.0),
    )
    assert ledger.costs("nothing", IDENTITY) == ()
