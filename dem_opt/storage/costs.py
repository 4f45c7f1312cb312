"""Costs of a study: windows that went forward through a model, an entry for each evaluation.

An evaluation's entry is written in the transaction of its scores, so that a crash neither loses nor repeats it.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine, String, case, delete, func, insert, literal, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from dem_opt.storage.identity import StudyIdentity
from dem_opt.types import GRADIENT_FORWARDS, SEARCH, SPLITS, Cost, Expense

EARLIER = "earlier releases"
"""Part of a study whose expenses follow from its scores: the release that measured them kept no costs."""


class CostTables(DeclarativeBase):
    """The tables of costs."""


class _Cost(CostTables):
    """The cost of one evaluation; `windows` counts those of an evaluation with a gradient GRADIENT_FORWARDS times."""

    __tablename__ = "dem_cost"

    id: Mapped[int] = mapped_column(primary_key=True)
    study: Mapped[str] = mapped_column(String, index=True)
    part: Mapped[str]
    windows: Mapped[float]
    seconds: Mapped[float]
    created: Mapped[str]


def add_expense(connection: Connection, expense: Expense) -> None:
    """Write the cost of one evaluation."""
    row = {name: getattr(expense, name) for name in ("study", "part", "windows", "seconds")}
    connection.execute(insert(_Cost).values(**row, created=datetime.now(UTC).isoformat()))


def forget_expenses(connection: Connection, study: str) -> None:
    """Remove the costs of a study."""
    connection.execute(delete(_Cost).where(_Cost.study == study))


def read_costs(engine: Engine, study: str, identity: StudyIdentity) -> tuple[Cost, ...]:
    """The costs of a study by part, in the order in which the parts began.

    The study of each of its placebos, NAME+KIND, is one part.  Forward-equivalents are windows over those of a full
    pass over the search split.
    """
    full_pass = sum(identity.sizes(SEARCH).values())
    of_placebo = func.substr(_Cost.study, 1, len(study) + 1) == f"{study}+"
    placebo = literal("placebo (") + func.substr(_Cost.study, len(study) + 2) + ")"
    part = case((of_placebo, placebo), else_=_Cost.part).label("part")
    entry = select(part, _Cost.id, _Cost.windows, _Cost.seconds).where((_Cost.study == study) | of_placebo).subquery().c
    query = (
        select(entry.part, func.count(), func.sum(entry.windows), func.sum(entry.seconds))
        .group_by(entry.part)
        .order_by(func.min(entry.id))
    )
    with Session(engine) as session:
        return tuple(
            Cost(part=part, evaluations=count, forwards=windows / full_pass, seconds=seconds)
            for part, count, windows, seconds in session.execute(query)
        )


def add_earlier_expenses(
    connection: Connection, studies: Mapping[str, StudyIdentity], score: Any, gradient: Any
) -> None:
    """Write the costs of studies whose release kept none, as far as their scores and gradients tell.

    An evaluation for each composite and split.  Scores that several studies share count for each of them.

    Args:
        connection: A transaction of the ledger's database.
        studies: Identities of the studies by name.
        score: The ledger's table of scores.
        gradient: The ledger's table of gradients.
    """
    for study, identity in studies.items():
        for split in SPLITS:
            keys = identity.keys(split)
            windows: dict[str, float] = {}
            seconds: dict[str, dict[str, float]] = {}
            rows = select(score.c.composite, score.c.windows, score.c.created, score.c.seconds).where(
                score.c.scoring == identity.scoring, score.c.corpus.in_(keys)
            )
            for composite, count, created, spent in connection.execute(rows):
                windows[composite] = windows.get(composite, 0.0) + count
                seconds.setdefault(composite, {})[created] = spent
            differentiated = select(gradient.c.composite).where(
                gradient.c.scoring == identity.differentiation, gradient.c.corpus.in_(keys)
            )
            for composite in connection.scalars(differentiated):
                windows[composite] = windows.get(composite, 0.0) + (GRADIENT_FORWARDS - 1) * identity.windows(split)
            for composite, count in windows.items():
                spent = sum(seconds.get(composite, {}).values())
                add_expense(connection, Expense(study=study, part=EARLIER, windows=count, seconds=spent))
