"""The ledger: every score ever measured, by content: (composite, corpus, scoring) -> nats per window.

Its tables are in `ledger_tables`.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from sqlalchemy import Connection, Engine, delete, func, inspect, select
from sqlalchemy.orm import Session

from dem_opt.errors import InputError
from dem_opt.storage.copies import copy_measurements
from dem_opt.storage.costs import CostTables, add_earlier_expenses, add_expense, forget_expenses, read_costs
from dem_opt.storage.engine import create_missing, exclusive, insert_into, masked
from dem_opt.storage.group_tables import (
    FoldGradients,
    GroupTables,
    GroupTrial,
    add_fold_gradients,
    read_composite,
    read_fold_gradients,
    read_group_trials,
    write_group_trial,
    written_composite,
)
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.leases import living_drivers
from dem_opt.storage.ledger_tables import (
    CompositeTable,
    ConfigurationTable,
    CorpusTable,
    GenerationTable,
    GradientTable,
    LedgerTables,
    LibrariesTable,
    SchemaTable,
    ScoreTable,
    StudyTable,
    stored_score,
)
from dem_opt.storage.part_tables import PartGradients, PartTables, add_part_gradients, read_part_gradients
from dem_opt.storage.retry import BRIEF, RetryPolicy, patient
from dem_opt.storage.trial_upgrade import upgrade_trials
from dem_opt.types import Composite, CorpusLayout, Cost, Expense, Folds, Gradient, PartGradient, Score

SCHEMA = 9
"""Version of the tables that this module reads and writes: 2 added gradients, 3 libraries, 4 configurations and
earlier generations, 5 layouts of corpora, 6 costs, 7 flat attributes of trials (`trial_upgrade`), 8 coefficients by
group (`group_tables`), 9 gradients of parts (`part_tables`).
"""

COSTS_SINCE = 6
"""Version of the tables from which on each evaluation's cost is kept."""


@dataclass(frozen=True)
class StudyRow:
    """A study in the ledger.

    Attributes:
        generation: Number of its present Optuna studies; a change of the identity begins the next one.
        scoring: Scoring fields, which may not change under the study.
        identity: Identity fields, whose change begins a new generation.
    """

    name: str
    generation: int
    scoring: dict[str, str]
    identity: dict[str, str]


class Ledger:
    """The scores in a study's database.  Any number of drivers may write at once.

    While the database is away, methods wait and try again, as long as `patience` says.
    """

    def __init__(self, engine: Engine, patience: RetryPolicy = BRIEF) -> None:
        """Create the tables that are missing, and upgrade what an earlier release has written.

        Raises:
            InputError: A newer version of dem_opt made the tables, or an earlier one is at work on them.
        """
        self.engine, self.patience = engine, patience
        is_present = self._version() == SCHEMA
        self._make_tables()
        if not is_present:
            self._upgrade()

    @patient
    def _make_tables(self) -> None:
        for tables in (LedgerTables, CostTables, GroupTables, PartTables):
            create_missing(self.engine, tables.metadata)

    @patient
    def _upgrade(self) -> None:
        """Rewrite what earlier releases have written, in one transaction with the new version's number."""
        with exclusive(self.engine) as connection:
            version = connection.scalar(select(func.max(SchemaTable.version)))
            if version is not None and version >= SCHEMA:
                return  # another process has done it meanwhile
            if version is not None and (drivers := living_drivers(connection)):
                mend = f"{drivers[0]} drives a study in it with an earlier release; first wait for it, or stop it"
                raise InputError(None, "storage", masked(str(self.engine.url)), mend)
            if version is not None and version < COSTS_SINCE:
                rows = connection.execute(select(StudyTable.name, StudyTable.identity, StudyTable.scoring))
                studies = {
                    name: StudyIdentity.recall(json.loads(identity), json.loads(scoring))
                    for name, identity, scoring in rows
                }
                add_earlier_expenses(connection, studies, ScoreTable.__table__, GradientTable.__table__)
            upgrade_trials(connection)
            connection.execute(insert_into(self.engine, SchemaTable).values(version=SCHEMA))

    @staticmethod
    def is_in(engine: Engine) -> bool:
        """The database has a ledger already."""
        return bool(inspect(engine).has_table(StudyTable.__tablename__))

    def look_up(self, composite: Composite, corpora: Collection[str], scoring: str) -> dict[str, Score]:
        """The scores of `composite` by corpus key, where measured; short ones too."""
        return self.look_up_all([composite], corpora, scoring)[0]

    @patient
    def look_up_all(
        self, composites: Sequence[Composite], corpora: Collection[str], scoring: str
    ) -> list[dict[str, Score]]:
        """The same for each of several composites, by one query."""
        keys = [composite.key for composite in composites]
        scores: dict[str, dict[str, Score]] = {key: {} for key in keys}
        measured = (ScoreTable.composite, ScoreTable.corpus, ScoreTable.nats_W, ScoreTable.tokens_W)
        query = (
            select(*measured, CorpusTable.bytes_W)
            .outerjoin(CorpusTable, CorpusTable.key == ScoreTable.corpus)
            .where(ScoreTable.composite.in_(scores), ScoreTable.scoring == scoring, ScoreTable.corpus.in_(corpora))
        )
        with Session(self.engine) as session:
            for composite, corpus, nats_W, tokens_W, bytes_W in session.execute(query):
                scores[composite][corpus] = stored_score(nats_W, tokens_W, bytes_W or b"")
        return [scores[key] for key in keys]

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
        expense: Expense | None = None,
        fold_gradients: FoldGradients | None = None,
        part_gradients: PartGradients | None = None,
    ) -> None:
        """Write scores and gradients of a composite by corpus key, all or none; committed when it returns.

        A score of more windows replaces one of fewer, and its cost is added; otherwise the stored one stays.

        Args:
            scores: By corpus key.
            scoring: The study identity's `scoring`.
            forward_tokens: Tokens that the measurement took.
            seconds: Wall time that it took.
            gradients: By corpus key.
            differentiation: The study identity's `differentiation`: gradients depend on the base too.
            expense: What the study that asked for the measurement has spent on it.
            fold_gradients: By corpus key, then by the windows of a fold.
            part_gradients: By corpus key, then by the windows of a part.
        """
        columns = {
            "composite": composite.key,
            "scoring": scoring,
            "forward_tokens": forward_tokens,
            "seconds": seconds,
            "created": datetime.now(UTC).isoformat(),
        }
        rows = [columns | ScoreTable.columns(corpus, score) for corpus, score in sorted(scores.items())]
        if not rows and not part_gradients:
            return
        terms = {"key": composite.key, "terms": written_composite(composite)}
        with self.engine.begin() as connection:
            connection.execute(insert_into(self.engine, CompositeTable).values(terms).on_conflict_do_nothing())
            if rows:
                connection.execute(self._insert_longer(), rows)
            for corpus, gradient in sorted((gradients or {}).items()):
                self._add_gradient(connection, (composite.key, corpus, differentiation or scoring), gradient)
            add_fold_gradients(connection, composite, fold_gradients or {}, differentiation)
            add_part_gradients(connection, composite, part_gradients or {}, differentiation)
            if expense is not None:
                add_expense(connection, expense)

    @patient
    def spend(self, expense: Expense) -> None:
        """Write down what a study has spent on a measurement that is not recorded."""
        with self.engine.begin() as connection:
            add_expense(connection, expense)

    @patient
    def costs(self, study: str, identity: StudyIdentity) -> tuple[Cost, ...]:
        """The costs of a study by part, in forward-equivalents of its search split."""
        return read_costs(self.engine, study, identity)

    def _add_gradient(self, connection: Connection, key: tuple[str, str, str], gradient: Gradient) -> None:
        """Write a gradient; along fine-tunes for which another study has measured it, that one stays."""
        table = GradientTable.__table__
        same = (table.c.composite == key[0]) & (table.c.corpus == key[1]) & (table.c.scoring == key[2])
        known = connection.scalar(select(table.c.gradient).where(same))
        text = json.dumps(dict(gradient) | (json.loads(known) if known else {}))
        row = {"composite": key[0], "corpus": key[1], "scoring": key[2], "gradient": text}
        connection.execute(
            insert_into(self.engine, GradientTable)
            .values(row)
            .on_conflict_do_update(index_elements=["composite", "corpus", "scoring"], set_={"gradient": text})
        )

    def _insert_longer(self) -> Any:
        """An INSERT of scores that replaces those of fewer windows."""
        insert = insert_into(self.engine, ScoreTable)
        new, old = insert.excluded, ScoreTable.__table__.c
        replaced = {name: new[name] for name in ("windows", "nats_W", "tokens_W", "created")}
        added = {name: old[name] + new[name] for name in ("forward_tokens", "seconds")}
        return insert.on_conflict_do_update(
            index_elements=["composite", "corpus", "scoring"],
            set_={**replaced, **added},
            where=new.windows > old.windows,
        )

    @patient
    def gradients(self, composite: Composite, corpora: Collection[str], differentiation: str) -> dict[str, Gradient]:
        """The gradients of `composite` by corpus key, where measured."""
        query = select(GradientTable.corpus, GradientTable.gradient).where(
            GradientTable.composite == composite.key,
            GradientTable.scoring == differentiation,
            GradientTable.corpus.in_(corpora),
        )
        with Session(self.engine) as session:
            return {corpus: json.loads(gradient) for corpus, gradient in session.execute(query)}

    @patient
    def fold_gradients(self, composite: Composite, folds: Mapping[str, Folds], differentiation: str) -> FoldGradients:
        """The gradients of `composite` by corpus key and fold, then by parameter, where all folds were measured."""
        return read_fold_gradients(self.engine, composite, folds, differentiation)

    @patient
    def part_gradients(
        self, composite: Composite, windows: Mapping[str, Sequence[range]], differentiation: str
    ) -> dict[str, dict[range, PartGradient]]:
        """The gradients of `composite` by corpus key and part, where all these parts were measured."""
        return read_part_gradients(self.engine, composite, windows, differentiation)

    @patient
    def group_trials(self, search: str) -> list[GroupTrial]:
        """The trials of a search of coefficients by group, in their order; `search` is its key."""
        return read_group_trials(self.engine, search)

    @patient
    def add_group_trial(self, search: str, trial: GroupTrial) -> None:
        """Write down a trial of such a search, unless another driver has."""
        write_group_trial(self.engine, search, trial)

    @patient
    def seconds(self, composite: Composite, corpora: Collection[str], scoring: str) -> float:
        """Wall time of measuring a composite on these corpora; an evaluation of several corpora counts once."""
        evaluations = (
            select(ScoreTable.created, ScoreTable.seconds)
            .where(ScoreTable.composite == composite.key, ScoreTable.scoring == scoring, ScoreTable.corpus.in_(corpora))
            .distinct()
        )
        with Session(self.engine) as session:
            return sum(seconds for _, seconds in session.execute(evaluations))

    @patient
    def seconds_per_token(self, scoring: str) -> tuple[float, ...]:
        """The 5%, 50% and 95% quantiles over evaluations of the seconds for each forward token; () without any."""
        evaluations = select(ScoreTable.created, ScoreTable.seconds, ScoreTable.forward_tokens).distinct()
        query = evaluations.where(ScoreTable.scoring == scoring, ScoreTable.forward_tokens > 0)
        with Session(self.engine) as session:
            rates = [seconds / tokens for _, seconds, tokens in session.execute(query)]
        return tuple(np.quantile(rates, (0.05, 0.5, 0.95)).tolist()) if rates else ()

    @patient
    def composites(self, scoring: str) -> list[Composite]:
        """The composites with any score under `scoring`, in the order they were first recorded."""
        measured = (
            select(CompositeTable.terms)
            .join(ScoreTable)
            .where(ScoreTable.scoring == scoring)
            .group_by(CompositeTable.key)
            .order_by(func.min(ScoreTable.id))
        )
        with Session(self.engine) as session:
            return [read_composite(terms) for terms in session.scalars(measured)]

    @patient
    def study(self, name: str) -> StudyRow | None:
        """The row of a study, or None."""
        with Session(self.engine) as session:
            row = session.get(StudyTable, name)
        return (
            None
            if row is None
            else StudyRow(row.name, row.generation, json.loads(row.scoring), json.loads(row.identity))
        )

    @patient
    def studies(self) -> list[StudyRow]:
        """Rows of all studies, in the order of their names."""
        with Session(self.engine) as session:
            rows = session.scalars(select(StudyTable).order_by(StudyTable.name))
            return [
                StudyRow(row.name, row.generation, json.loads(row.scoring), json.loads(row.identity)) for row in rows
            ]

    @patient
    def generations(self, name: str) -> dict[int, dict[str, str]]:
        """The identity fields of a study's generations by number, as far as they are known."""
        query = select(GenerationTable.number, GenerationTable.identity).where(GenerationTable.study == name)
        with Session(self.engine) as session:
            present = session.get(StudyTable, name)
            known = {number: json.loads(identity) for number, identity in session.execute(query)}
        return known | ({} if present is None else {present.generation: json.loads(present.identity)})

    @patient
    def forget_study(self, name: str) -> None:
        """Remove the rows, the costs and the library versions of a study; its scores and gradients stay."""
        with self.engine.begin() as connection:
            forget_expenses(connection, name)
            connection.execute(delete(GenerationTable).where(GenerationTable.study == name))
            connection.execute(delete(LibrariesTable).where(LibrariesTable.study == name))
            connection.execute(delete(StudyTable).where(StudyTable.name == name))

    @patient
    def copy_scores(self, source: Engine, scoring: str, corpora: Collection[str], differentiation: str) -> int:
        """Copy the scores and gradients on some corpora out of another ledger (`copy_measurements`)."""
        return copy_measurements(source, self.engine, scoring, corpora, differentiation)

    @patient
    def count_scores(self) -> int:
        """Number of scores, those of all studies together."""
        with Session(self.engine) as session:
            return session.scalar(select(func.count()).select_from(ScoreTable)) or 0

    @patient
    def enter_study(self, row: StudyRow) -> None:
        """Write the row of a study, or replace it; the identity of the generation that it replaces is kept."""
        columns = {
            "generation": row.generation,
            "scoring": json.dumps(row.scoring),
            "question": json.dumps(row.identity),
        }
        entry = insert_into(self.engine, StudyTable).values({"name": row.name, **columns})
        generation = insert_into(self.engine, GenerationTable).on_conflict_do_nothing()
        with self.engine.begin() as connection:
            for study, number, identity in connection.execute(
                select(StudyTable.name, StudyTable.generation, StudyTable.identity).where(StudyTable.name == row.name)
            ).all():
                connection.execute(generation.values(study=study, number=number, identity=identity))
            connection.execute(entry.on_conflict_do_update(index_elements=["name"], set_=columns))

    @patient
    def libraries(self, study: str) -> dict[str, str]:
        """Versions of the libraries of a study's last run by name; empty where it was never run."""
        with Session(self.engine) as session:
            row = session.get(LibrariesTable, study)
        return {} if row is None else dict(json.loads(row.versions))

    @patient
    def enter_libraries(self, study: str, versions: Mapping[str, str]) -> None:
        """Record the library versions of the run."""
        columns = {"versions": json.dumps(dict(versions))}
        entry = insert_into(self.engine, LibrariesTable).values(study=study, **columns)
        with self.engine.begin() as connection:
            connection.execute(entry.on_conflict_do_update(index_elements=["study"], set_=columns))

    @patient
    def first_configurations(self, contents: Collection[str], configuration: str) -> set[str]:
        """The configurations that checkpoints were first scored with; the given one for those that are new."""
        rows = [{"content": content, "fields": configuration} for content in sorted(contents)]
        with self.engine.begin() as connection:
            connection.execute(insert_into(self.engine, ConfigurationTable).on_conflict_do_nothing(), rows)
        query = select(ConfigurationTable.fields).where(ConfigurationTable.content.in_(contents))
        with Session(self.engine) as session:
            return set(session.scalars(query))

    @patient
    def enter_layouts(self, layouts: Mapping[str, CorpusLayout]) -> None:
        """Write the layouts of corpora by key; they take the place of earlier ones."""
        if not layouts:
            return
        rows = [{"key": key} | CorpusTable.columns(layout) for key, layout in sorted(layouts.items())]
        insert = insert_into(self.engine, CorpusTable)
        replaced = {name: insert.excluded[name] for name in ("bytes_W", "documents")}
        with self.engine.begin() as connection:
            connection.execute(insert.on_conflict_do_update(index_elements=["key"], set_=replaced), rows)

    @patient
    def layout(self, corpus: str) -> CorpusLayout | None:
        """Bytes and documents of a corpus's windows; None where no release that knows them has had its data files."""
        with Session(self.engine) as session:
            row = session.get(CorpusTable, corpus)
        return None if row is None else row.layout

    @patient
    def _version(self) -> int:
        """The version of the tables; 0 where there are none."""
        if not inspect(self.engine).has_table(SchemaTable.__tablename__):
            return 0
        with Session(self.engine) as session:
            version = session.scalar(select(func.max(SchemaTable.version))) or 0
        if version > SCHEMA:
            mend = f"its schema has version {version}, this dem_opt knows {SCHEMA}; use a newer dem_opt"
            raise InputError(None, "storage", masked(str(self.engine.url)), mend)
        return version
