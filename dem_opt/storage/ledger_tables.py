"""The ledger's tables, and how a score and a corpus's layout are written in them.

The column names are those of databases on disk; a name that differs from its attribute is given explicitly.
"""

import json
from functools import lru_cache

import numpy as np
from sqlalchemy import BigInteger, ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dem_opt.types import CorpusLayout, Score


class LedgerTables(DeclarativeBase):
    """The ledger's tables."""


class SchemaTable(LedgerTables):
    """A version that the tables have had; the highest is their present one."""

    __tablename__ = "dem_schema"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class CompositeTable(LedgerTables):
    """A composite; `terms` is JSON, {content hash: units of 1e-9}, or a list of these with parts by parameters."""

    __tablename__ = "dem_composite"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    terms: Mapped[str]


class ScoreTable(LedgerTables):
    """One composite's nats on the first windows of one corpus.

    `nats_W` and `tokens_W` are little-endian float64 and int64, a value for each window.  `forward_tokens` and
    `seconds` are those of the evaluations that measured it, all their corpora together.
    """

    __tablename__ = "dem_score"
    __table_args__ = (UniqueConstraint("composite", "corpus", "scoring"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    composite: Mapped[str] = mapped_column(ForeignKey(CompositeTable.key))
    corpus: Mapped[str]
    scoring: Mapped[str]
    windows: Mapped[int]
    nats_W: Mapped[bytes]
    tokens_W: Mapped[bytes]
    forward_tokens: Mapped[int] = mapped_column(BigInteger)
    seconds: Mapped[float]
    created: Mapped[str]

    @staticmethod
    def columns(corpus: str, score: Score) -> dict[str, object]:
        """The columns that a score fills."""
        return {
            "corpus": corpus,
            "windows": len(score.nats_W),
            "nats_W": np.array(score.nats_W, dtype="<f8").tobytes(),
            "tokens_W": np.array(score.tokens_W, dtype="<i8").tobytes(),
        }


def stored_score(nats_W: bytes, tokens_W: bytes, bytes_W: bytes) -> Score:
    """A score from its columns in `ScoreTable`, and its corpus's bytes of each window in `CorpusTable`; b"" without."""
    windows = len(nats_W) // 8
    return Score(tuple(np.frombuffer(nats_W, "<f8").tolist()), _counts(tokens_W), _counts(bytes_W)[:windows])


@lru_cache(maxsize=1024)
def _counts(stored_W: bytes) -> tuple[int, ...]:
    """Counts of windows, which all composites share."""
    return tuple(np.frombuffer(stored_W, "<i8").tolist())


class GradientTable(LedgerTables):
    """One composite's gradient on one corpus, over all its windows, as JSON: nats by content of the fine-tunes.

    `scoring` is the study identity's `differentiation`, which hashes the base too.
    """

    __tablename__ = "dem_gradient"

    composite: Mapped[str] = mapped_column(ForeignKey(CompositeTable.key), primary_key=True)
    corpus: Mapped[str] = mapped_column(primary_key=True)
    scoring: Mapped[str] = mapped_column(primary_key=True)
    gradient: Mapped[str]


class StudyTable(LedgerTables):
    """A study's generation, and the fields that guard it, as JSON."""

    __tablename__ = "dem_study"

    name: Mapped[str] = mapped_column(primary_key=True)
    generation: Mapped[int]
    scoring: Mapped[str]
    identity: Mapped[str] = mapped_column("question")


class GenerationTable(LedgerTables):
    """The identity fields of a generation of a study, as JSON; databases of earlier releases lack the earlier ones."""

    __tablename__ = "dem_generation"

    study: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    identity: Mapped[str]


class LibrariesTable(LedgerTables):
    """Versions of the libraries of a study's last run by name, as JSON."""

    __tablename__ = "dem_libraries"

    study: Mapped[str] = mapped_column(primary_key=True)
    versions: Mapped[str]


class ConfigurationTable(LedgerTables):
    """The configuration that a checkpoint's scores under the plain scoring key were measured with, as JSON.

    It is the first that the ledger met; scores of early releases, which knew none, are taken to be of that one.
    """

    __tablename__ = "dem_configuration"

    content: Mapped[str] = mapped_column(String(64), primary_key=True)
    fields: Mapped[str]


class CorpusTable(LedgerTables):
    """Layout of a corpus's windows, as the data files last had it; early releases have not written any.

    `bytes_W` is little-endian int64.  `documents` is JSON: for each window a list of [document, scored tokens].
    """

    __tablename__ = "dem_corpus"

    key: Mapped[str] = mapped_column(primary_key=True)
    bytes_W: Mapped[bytes]
    documents: Mapped[str]

    @staticmethod
    def columns(layout: CorpusLayout) -> dict[str, object]:
        """The columns that a layout fills."""
        documents = [sorted(documents.items()) for documents in layout.documents_W]
        return {"bytes_W": np.array(layout.bytes_W, dtype="<i8").tobytes(), "documents": json.dumps(documents)}

    @property
    def layout(self) -> CorpusLayout:
        """The layout."""
        bytes_W = np.frombuffer(self.bytes_W, dtype="<i8").tolist()
        return CorpusLayout(tuple(bytes_W), tuple(dict(documents) for documents in json.loads(self.documents)))
