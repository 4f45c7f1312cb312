"""Every score ever measured, by content: (composite, corpus, scoring) -> nats per window."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

import numpy as np
from sqlalchemy import BigInteger, Connection, Engine, ForeignKey, String, UniqueConstraint, func, inspect, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from dem_opt.errors import InputError
from dem_opt.storage.engine import create_missing, insert_into, masked
from dem_opt.storage.retry import NO_RETRY, RetryPolicy, patient
from dem_opt.types import Composite, Gradient, Score

SCHEMA = 3
"""Version of the tables that this module reads and writes: 2 has gradients, 3 libraries."""


class _Tables(DeclarativeBase):
    """The ledger's tables."""


class _Schema(_Tables):
    """A version that the tables have been through; the highest is what they are."""

    __tablename__ = "dem_schema"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class _Composite(_Tables):
    """A composite in readable form: `terms` is JSON, {content hash: units of 1e-9}."""

    __tablename__ = "dem_composite"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    terms: Mapped[str]


class _Score(_Tables):
    """One composite's nats per window on one corpus, the first of its windows: little-endian float64 and int64.

    forward_tokens and seconds are those of the evaluations that measured it, all their corpora together.
    """

    __tablename__ = "dem_score"
    __table_args__ = (UniqueConstraint("composite", "corpus", "scoring"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    composite: Mapped[str] = mapped_column(ForeignKey(_Composite.key))
    corpus: Mapped[str]
    scoring: Mapped[str]
    windows: Mapped[int]
    nats_W: Mapped[bytes]
    tokens_W: Mapped[bytes]
    forward_tokens: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]
    created: Mapped[str]


class _Gradient(_Tables):
    """One composite's gradient on one corpus, over all its windows, as JSON: nats by content of the experts.

    scoring  hashes the base too, from which distribution vectors begin
    """

    __tablename__ = "dem_gradient"

    composite: Mapped[str] = mapped_column(ForeignKey(_Composite.key), primary_key=True)
    corpus: Mapped[str] = mapped_column(primary_key=True)
    scoring: Mapped[str] = mapped_column(primary_key=True)
    gradient: Mapped[str]


class _Study(_Tables):
    """A study's generation, and the fields behind its two hashes as JSON."""

    __tablename__ = "dem_study"

    name: Mapped[str] = mapped_column(primary_key=True)
    generation: Mapped[int]
    scoring: Mapped[str]
    question: Mapped[str]


class _Libraries(_Tables):
    """With what a study was last run: versions by name, as JSON."""

    __tablename__ = "dem_libraries"

    study: Mapped[str] = mapped_column(primary_key=True)
    versions: Mapped[str]


@dataclass(frozen=True)
class StudyRow:
    """What the ledger remembers of a study.

    generation  which Optuna study of the name is its present one
    scoring     field -> value of what may not change under the study
    question    field -> value of what begins a new generation when it changes
    """

    name: str
    generation: int
    scoring: dict[str, str]
    question: dict[str, str]


class Ledger:
    """The scores in a study's database.  Any number of drivers may write at once.

    While the database is away, whoever asks waits, as long as `patience` has it.
    """

    def __init__(self, engine: Engine, patience: RetryPolicy = NO_RETRY) -> None:
        """Creates the tables that are missing.

        Raises InputError where a newer version of dem_opt made them.
        """
        self.engine, self.patience = engine, patience
        self._refuse_newer()
        create_missing(engine, _Tables.metadata)
        with engine.begin() as connection:
            connection.execute(insert_into(engine, _Schema).values(version=SCHEMA).on_conflict_do_nothing())

    @staticmethod
    def is_in(engine: Engine) -> bool:
        """Whether a database has a ledger already."""
        return bool(inspect(engine).has_table(_Study.__tablename__))

    def look_up(self, composite: Composite, corpora: Collection[str], scoring: str) -> dict[str, Score]:
        """The scores of `composite` by corpus key, of those among `corpora` that have been measured, short ones too."""
        return self.look_up_all([composite], corpora, scoring)[0]

    @patient
    def look_up_all(
        self, composites: Sequence[Composite], corpora: Collection[str], scoring: str
    ) -> list[dict[str, Score]]:
        """The same for each of several composites, by one query."""
        keys = [composite.key for composite in composites]
        found: dict[str, dict[str, Score]] = {key: {} for key in keys}
        wanted = select(_Score).where(
            _Score.composite.in_(found), _Score.scoring == scoring, _Score.corpus.in_(corpora)
        )
        with Session(self.engine) as session:
            for row in session.scalars(wanted):
                found[row.composite][row.corpus] = _score(row)
        return [found[key] for key in keys]

    @patient
    def record(
        self,
        composite: Composite,
        scores: Mapping[str, Score],
        scoring: str,
        forward_tokens: int = 0,
        seconds: float = 0.0,
        gradients: Mapping[str, Gradient] | None = None,
        differentiation: str = "",
    ) -> None:
        """Writes the scores and gradients of `composite` by corpus key, all or none; committed when it returns.

        A score of fewer windows gives way to one of more, whose cost is added; another one stays as it is.
        Gradients have a key of their own beside the scoring's, `differentiation`: they depend on the base.
        forward_tokens and seconds are what measuring took.
        """
        made = {
            "composite": composite.key,
            "scoring": scoring,
            "forward_tokens": forward_tokens,
            "seconds": seconds,
            "created": datetime.now(UTC).isoformat(),
        }
        rows = [made | _columns(corpus, score) for corpus, score in sorted(scores.items())]
        if not rows:
            return
        terms = {"key": composite.key, "terms": json.dumps(dict(composite.terms))}
        with self.engine.begin() as connection:
            connection.execute(insert_into(self.engine, _Composite).values(terms).on_conflict_do_nothing())
            connection.execute(self._insert_longer(), rows)
            for corpus, gradient in sorted((gradients or {}).items()):
                self._add_gradient(connection, (composite.key, corpus, differentiation or scoring), gradient)

    def _add_gradient(self, connection: Connection, key: tuple[str, str, str], gradient: Gradient) -> None:
        """Writes a gradient, beside the experts that another study has measured it along."""
        table = _Gradient.__table__
        mine = (table.c.composite == key[0]) & (table.c.corpus == key[1]) & (table.c.scoring == key[2])
        known = connection.scalar(select(table.c.gradient).where(mine))
        text = json.dumps(dict(gradient) | (json.loads(known) if known else {}))
        row = {"composite": key[0], "corpus": key[1], "scoring": key[2], "gradient": text}
        connection.execute(
            insert_into(self.engine, _Gradient)
            .values(row)
            .on_conflict_do_update(index_elements=["composite", "corpus", "scoring"], set_={"gradient": text})
        )

    def _insert_longer(self) -> Any:
        """Inserts a score, or puts it in the place of one of fewer windows."""
        insert = insert_into(self.engine, _Score)
        new, old = insert.excluded, _Score.__table__.c
        replaced = {name: new[name] for name in ("windows", "nats_W", "tokens_W", "created")}
        added = {name: old[name] + new[name] for name in ("forward_tokens", "seconds")}
        return insert.on_conflict_do_update(
            index_elements=["composite", "corpus", "scoring"],
            set_={**replaced, **added},
            where=new.windows > old.windows,
        )

    @patient
    def gradients(self, composite: Composite, corpora: Collection[str], differentiation: str) -> dict[str, Gradient]:
        """The gradients of `composite` by corpus key, of those among `corpora` that have been measured."""
        wanted = select(_Gradient.corpus, _Gradient.gradient).where(
            _Gradient.composite == composite.key,
            _Gradient.scoring == differentiation,
            _Gradient.corpus.in_(corpora),
        )
        with Session(self.engine) as session:
            return {corpus: json.loads(gradient) for corpus, gradient in session.execute(wanted)}

    @patient
    def seconds(self, composite: Composite, corpora: Collection[str], scoring: str) -> float:
        """What measuring a composite on these corpora took; one evaluation of several corpora counts once."""
        evaluations = (
            select(_Score.created, _Score.seconds)
            .where(_Score.composite == composite.key, _Score.scoring == scoring, _Score.corpus.in_(corpora))
            .distinct()
        )
        with Session(self.engine) as session:
            return sum(seconds for _, seconds in session.execute(evaluations))

    @patient
    def seconds_per_token(self, scoring: str) -> float | None:
        """The median over evaluations of seconds for each forward token; None where nothing was measured."""
        evaluations = select(_Score.created, _Score.seconds, _Score.forward_tokens).distinct()
        wanted = evaluations.where(_Score.scoring == scoring, _Score.forward_tokens > 0)
        with Session(self.engine) as session:
            rates = [seconds / tokens for _, seconds, tokens in session.execute(wanted)]
        return median(rates) if rates else None

    @patient
    def composites(self, scoring: str) -> list[Composite]:
        """The composites with any score under `scoring`, in the order they were first recorded."""
        measured = (
            select(_Composite.terms)
            .join(_Score)
            .where(_Score.scoring == scoring)
            .group_by(_Composite.key)
            .order_by(func.min(_Score.id))
        )
        with Session(self.engine) as session:
            return [Composite.of(json.loads(terms)) for terms in session.scalars(measured)]

    @patient
    def study(self, name: str) -> StudyRow | None:
        """What was entered for a study, or None."""
        with Session(self.engine) as session:
            row = session.get(_Study, name)
        return (
            None
            if row is None
            else StudyRow(row.name, row.generation, json.loads(row.scoring), json.loads(row.question))
        )

    @patient
    def enter_study(self, row: StudyRow) -> None:
        """Writes what is to be remembered of a study, in place of what was."""
        known = {
            "generation": row.generation,
            "scoring": json.dumps(row.scoring),
            "question": json.dumps(row.question),
        }
        entry = insert_into(self.engine, _Study).values(name=row.name, **known)
        with self.engine.begin() as connection:
            connection.execute(entry.on_conflict_do_update(index_elements=["name"], set_=known))

    @patient
    def libraries(self, study: str) -> dict[str, str]:
        """Versions of the libraries that a study was last run with, by name; empty where nothing says so."""
        with Session(self.engine) as session:
            row = session.get(_Libraries, study)
        return {} if row is None else dict(json.loads(row.versions))

    @patient
    def enter_libraries(self, study: str, versions: Mapping[str, str]) -> None:
        """Writes with what a study is run."""
        known = {"versions": json.dumps(dict(versions))}
        entry = insert_into(self.engine, _Libraries).values(study=study, **known)
        with self.engine.begin() as connection:
            connection.execute(entry.on_conflict_do_update(index_elements=["study"], set_=known))

    def _refuse_newer(self) -> None:
        if not inspect(self.engine).has_table(_Schema.__tablename__):
            return
        with Session(self.engine) as session:
            version = session.scalar(select(func.max(_Schema.version))) or SCHEMA
        if version > SCHEMA:
            mend = f"its schema has version {version}, this dem_opt knows {SCHEMA}; use a newer dem_opt"
            raise InputError(None, "storage", masked(str(self.engine.url)), mend)


def _columns(corpus: str, score: Score) -> dict[str, object]:
    return {
        "corpus": corpus,
        "windows": len(score.nats_W),
        "nats_W": np.array(score.nats_W, dtype="<f8").tobytes(),
        "tokens_W": np.array(score.tokens_W, dtype="<i8").tobytes(),
    }


def _score(row: _Score) -> Score:
    nats_W = np.frombuffer(row.nats_W, dtype="<f8").tolist()
    tokens_W = np.frombuffer(row.tokens_W, dtype="<i8").tolist()
    return Score(tuple(nats_W), tuple(tokens_W))
