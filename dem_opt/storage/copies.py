"""Scores and gradients out of another ledger: they are by content, so they hold in any database."""

from collections.abc import Collection, Sequence

from sqlalchemy import Engine, RowMapping, Table, inspect, select, union
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from dem_opt.storage.engine import insert_into
from dem_opt.storage.group_tables import FOLD_GRADIENTS
from dem_opt.storage.ledger_tables import CompositeTable, ConfigurationTable, GradientTable, LedgerTables, ScoreTable
from dem_opt.storage.part_tables import PART_GRADIENTS

_COMPOSITES, _SCORES, _GRADIENTS = (
    LedgerTables.metadata.tables[table.__tablename__] for table in (CompositeTable, ScoreTable, GradientTable)
)

_BY_CONTENT = (_SCORES, _GRADIENTS, PART_GRADIENTS, FOLD_GRADIENTS)
"""Tables of what was measured of a composite on a corpus."""


def copy_measurements(
    source: Engine, target: Engine, scoring: str, corpora: Collection[str], differentiation: str
) -> int:
    """Copy the scores and gradients on some corpora from one ledger to another; return the number of scores.

    None are copied where a checkpoint was scored with another configuration in the source, where the source can't be
    read now, and where it is no ledger; one of an earlier release gives what its tables have.

    Args:
        source: Database that is read.
        target: Database whose ledger gets what it lacks.
        scoring: The study identity's `scoring`.
        corpora: Keys of the corpora.
        differentiation: The study identity's `differentiation`.
    """
    try:
        rows = _measurements(source, scoring, corpora, differentiation)
    except DBAPIError:
        return 0
    own = _configurations(target)
    if any(own.get(content, fields) != fields for content, fields in _configurations(source).items()):
        return 0
    with target.begin() as connection:
        for table, copies in rows.items():
            if copies:
                insert = insert_into(target, table).on_conflict_do_nothing()
                connection.execute(insert, [dict(row) for row in copies])
    return len(rows.get(_SCORES, ()))


def _measurements(
    source: Engine, scoring: str, corpora: Collection[str], differentiation: str
) -> dict[Table, Sequence[RowMapping]]:
    """Rows by table, the composites first, to which the others refer; none where there are no scores."""
    with source.connect() as connection:
        present = {table for table in _BY_CONTENT if inspect(connection).has_table(table.name)}
        if _SCORES not in present:
            return {}
        wanted = {
            table: (
                table.c.scoring == (scoring if table is _SCORES else differentiation),
                table.c.corpus.in_(corpora),
            )
            for table in present
        }
        measured = union(*(select(table.c.composite).where(*where) for table, where in wanted.items()))
        composites = select(_COMPOSITES).where(_COMPOSITES.c.key.in_(measured))
        rows = {_COMPOSITES: connection.execute(composites).mappings().all()}
        for table, where in wanted.items():
            columns = (column for column in table.c if column.name != "id")
            query = select(*columns).where(*where).order_by(*table.primary_key)
            rows[table] = connection.execute(query).mappings().all()
    return rows


def _configurations(engine: Engine) -> dict[str, str]:
    """The configurations that checkpoints were first scored with in a ledger, by content."""
    if not inspect(engine).has_table(ConfigurationTable.__tablename__):
        return {}
    with Session(engine) as session:
        return {row.content: row.fields for row in session.scalars(select(ConfigurationTable))}
