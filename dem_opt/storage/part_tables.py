"""The table of gradients on parts of the search split."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from sqlalchemy import Connection, Engine, String, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from dem_opt.storage.engine import insert_into
from dem_opt.types import Composite, PartGradient, Score

PartGradients = Mapping[str, Mapping[range, PartGradient]]
"""By corpus key, then by the windows of a part."""


class PartTables(DeclarativeBase):
    """Tables of parts."""


class _PartGradient(PartTables):
    """Nats of a composite on some windows of a corpus, one after the other, and their gradient.

    `scoring` is the study identity's `differentiation`.  `nats_W`, `tokens_W` and `bytes_W` are little-endian float64
    and int64, a value for each window from `start` on; `gradient` is JSON, nats by content of the fine-tunes.
    """

    __tablename__ = "dem_part_gradient"

    composite: Mapped[str] = mapped_column(String(64), primary_key=True)
    corpus: Mapped[str] = mapped_column(primary_key=True)
    scoring: Mapped[str] = mapped_column(primary_key=True)
    start: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    stop: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    nats_W: Mapped[bytes]
    tokens_W: Mapped[bytes]
    bytes_W: Mapped[bytes]
    gradient: Mapped[str]


PART_GRADIENTS = PartTables.metadata.tables[_PartGradient.__tablename__]
"""The table, for copies out of another database."""


def add_part_gradients(
    connection: Connection, composite: Composite, gradients: PartGradients, differentiation: str
) -> None:
    """Write gradients of parts; along fine-tunes for which another study has measured one, that one stays."""
    for corpus, by_part in sorted(gradients.items()):
        for windows, measured in by_part.items():
            key = {
                "composite": composite.key,
                "corpus": corpus,
                "scoring": differentiation,
                "start": windows.start,
                "stop": windows.stop,
            }
            known = connection.scalar(select(_PartGradient.gradient).filter_by(**key))
            text = json.dumps(dict(measured.gradient) | (json.loads(known) if known else {}))
            columns = {
                "nats_W": np.array(measured.score.nats_W, dtype="<f8").tobytes(),
                "tokens_W": np.array(measured.score.tokens_W, dtype="<i8").tobytes(),
                "bytes_W": np.array(measured.score.bytes_W, dtype="<i8").tobytes(),
            }
            insert = insert_into(connection.engine, _PartGradient).values(key | columns | {"gradient": text})
            connection.execute(insert.on_conflict_do_update(index_elements=list(key), set_={"gradient": text}))


def read_part_gradients(
    engine: Engine, composite: Composite, windows: Mapping[str, Sequence[range]], differentiation: str
) -> dict[str, dict[range, PartGradient]]:
    """Gradients of the corpora of which all these parts were measured."""
    query = select(_PartGradient).where(
        _PartGradient.composite == composite.key,
        _PartGradient.scoring == differentiation,
        _PartGradient.corpus.in_(windows),
    )
    with Session(engine) as session:
        known = {(row.corpus, range(row.start, row.stop)): _measured(row) for row in session.scalars(query)}
    return {
        corpus: {part: known[corpus, part] for part in parts}
        for corpus, parts in windows.items()
        if all((corpus, part) in known for part in parts)
    }


def _measured(row: _PartGradient) -> PartGradient:
    nats_W = np.frombuffer(row.nats_W, dtype="<f8").tolist()
    tokens_W, bytes_W = (np.frombuffer(column, dtype="<i8").tolist() for column in (row.tokens_W, row.bytes_W))
    return PartGradient(Score(tuple(nats_W), tuple(tokens_W), tuple(bytes_W)), json.loads(row.gradient))
