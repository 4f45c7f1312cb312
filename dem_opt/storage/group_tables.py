"""Tables of coefficients by group of parameters: gradients of folds by parameter, and the trials of their search."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256

import numpy as np
from sqlalchemy import Connection, Engine, String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from dem_opt.grouping import GroupedCoefficients
from dem_opt.simplex import Coefficients
from dem_opt.storage.engine import insert_into
from dem_opt.types import Composite, Folds, Gradient, ParameterGradient

FoldGradients = Mapping[str, Mapping[tuple[int, ...], ParameterGradient]]
"""By corpus key, then by the windows of a fold, then by parameter."""


class GroupTables(DeclarativeBase):
    """Tables of coefficients by group."""


class _FoldGradient(GroupTables):
    """Gradient of a composite's nats on a fold of a corpus, by parameter.

    `scoring` is the study identity's `differentiation`, `fold` hashes the windows.  `parameters` and `contents` are
    JSON lists, `products` is little-endian float64, a row for each parameter.
    """

    __tablename__ = "dem_fold_gradient"

    composite: Mapped[str] = mapped_column(String(64), primary_key=True)
    corpus: Mapped[str] = mapped_column(primary_key=True)
    scoring: Mapped[str] = mapped_column(primary_key=True)
    fold: Mapped[str] = mapped_column(String(64), primary_key=True)
    parameters: Mapped[str]
    contents: Mapped[str]
    products: Mapped[bytes]


FOLD_GRADIENTS = GroupTables.metadata.tables[_FoldGradient.__tablename__]
"""The table, for copies out of another database."""


class _GroupTrial(GroupTables):
    """A trial of a search of coefficients by group; `coefficients` is JSON, units of 1e-9 by group and distribution."""

    __tablename__ = "dem_group_trial"

    search: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[str]
    shrink: Mapped[float]
    coefficients: Mapped[str]
    composite: Mapped[str] = mapped_column(String(64))
    failed: Mapped[bool]
    created: Mapped[str]


@dataclass(frozen=True, kw_only=True)
class GroupTrial:
    """A trial of a search of coefficients by group.

    Attributes:
        number: Its number in the search, from 0.
        kind: "descent" or "shrunk", with a gradient; "fold 0" or "fold 1", the optimum of a fold; "chosen", the result.
        shrink: Curvature of the penalty.
        coefficients: By group.
        composite: That of the coefficients.
        failed: The composite could not be scored.
    """

    number: int
    kind: str
    shrink: float
    coefficients: GroupedCoefficients
    composite: Composite
    failed: bool = False


def written_composite(composite: Composite) -> str:
    """A composite as the ledger keeps it."""
    if not composite.parts:
        return json.dumps(dict(composite.terms))
    parts = [[parameters, dict(terms)] for parameters, terms in composite.parts]
    return json.dumps([dict(composite.terms), parts])


def read_composite(text: str) -> Composite:
    """The inverse of `written_composite`."""
    written = json.loads(text)
    if isinstance(written, dict):
        return Composite.of(written)
    terms, parts = written
    return Composite(
        Composite.of(terms).terms,
        tuple((tuple(parameters), Composite.of(part).terms) for parameters, part in parts),
    )


def add_fold_gradients(
    connection: Connection, composite: Composite, gradients: FoldGradients, differentiation: str
) -> None:
    """Write gradients of folds; those that are known stay."""
    for corpus, by_fold in sorted(gradients.items()):
        for fold, products in by_fold.items():
            parameters = list(products)
            contents = list(products[parameters[0]])
            rows = [[products[parameter][content] for content in contents] for parameter in parameters]
            row = {
                "composite": composite.key,
                "corpus": corpus,
                "scoring": differentiation,
                "fold": _key(fold),
                "parameters": json.dumps(parameters),
                "contents": json.dumps(contents),
                "products": np.array(rows, dtype="<f8").tobytes(),
            }
            connection.execute(insert_into(connection.engine, _FoldGradient).values(row).on_conflict_do_nothing())


def read_fold_gradients(
    engine: Engine, composite: Composite, folds: Mapping[str, Folds], differentiation: str
) -> dict[str, dict[tuple[int, ...], ParameterGradient]]:
    """Gradients of the corpora of which all folds were measured."""
    query = select(_FoldGradient).where(
        _FoldGradient.composite == composite.key,
        _FoldGradient.scoring == differentiation,
        _FoldGradient.corpus.in_(folds),
    )
    with Session(engine) as session:
        known = {(row.corpus, row.fold): _products(row) for row in session.scalars(query)}
    return {
        corpus: {fold: known[corpus, _key(fold)] for fold in of_corpus}
        for corpus, of_corpus in folds.items()
        if all((corpus, _key(fold)) in known for fold in of_corpus)
    }


def _products(row: _FoldGradient) -> dict[str, Gradient]:
    parameters, contents = json.loads(row.parameters), json.loads(row.contents)
    products_PN = np.frombuffer(row.products, dtype="<f8").reshape(len(parameters), len(contents))
    return {
        parameter: dict(zip(contents, products_N, strict=True))
        for parameter, products_N in zip(parameters, products_PN.tolist(), strict=True)
    }


def _key(fold: tuple[int, ...]) -> str:
    return sha256(repr(fold).encode()).hexdigest()


def read_group_trials(engine: Engine, search: str) -> list[GroupTrial]:
    """The trials of a search in the order of their numbers."""
    query = select(_GroupTrial).where(_GroupTrial.search == search).order_by(_GroupTrial.number)
    with Session(engine) as session:
        return [_trial(session, row) for row in session.scalars(query)]


def _trial(session: Session, row: _GroupTrial) -> GroupTrial:
    written = json.loads(row.coefficients)
    coefficients = GroupedCoefficients(
        tuple((group, Coefficients(tuple(sorted(units.items())))) for group, units in written["groups"])
    )
    return GroupTrial(
        number=row.number,
        kind=row.kind,
        shrink=row.shrink,
        coefficients=coefficients,
        composite=read_composite(written["composite"]),
        failed=row.failed,
    )


def write_group_trial(engine: Engine, search: str, trial: GroupTrial) -> None:
    """Write a trial; one of this number that is there stays."""
    groups = [[group, coefficients.units] for group, coefficients in trial.coefficients.rows]
    row = {
        "search": search,
        "number": trial.number,
        "kind": trial.kind,
        "shrink": trial.shrink,
        "coefficients": json.dumps({"groups": groups, "composite": written_composite(trial.composite)}),
        "composite": trial.composite.key,
        "failed": trial.failed,
        "created": datetime.now(UTC).isoformat(),
    }
    with engine.begin() as connection:
        connection.execute(insert_into(engine, _GroupTrial).values(row).on_conflict_do_nothing())
