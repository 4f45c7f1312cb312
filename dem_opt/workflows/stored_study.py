"""A study as its database holds it, whatever its files are by now."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from dem_opt.config import StudyConfig
from dem_opt.storage.engine import is_there
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.storage.retry import BRIEF, RetryPolicy, opened


@dataclass(frozen=True, kw_only=True)
class StoredStudy:
    """A study that has been run, as its database describes it.

    Attributes:
        ledger: The scores.
        identity_fields: Identity fields of its last run (see `StudyIdentity.identity_fields`).
        identity: The same by content.
        generation: Number of the current generation.
    """

    ledger: Ledger
    identity_fields: Mapping[str, str]
    identity: StudyIdentity
    generation: int


@contextmanager
def stored_study(config: StudyConfig, patience: RetryPolicy | None = None) -> Iterator[StoredStudy | None]:
    """Open a study's database; None where there is none, or it does not know the study.  Nothing is created.

    Args:
        config: The study file.
        patience: How long a database that is away is waited for; `BRIEF` unless given.
    """
    if not is_there(config.storage):
        yield None
        return
    with opened(config.storage, patience) as engine:
        ledger = Ledger(engine, patience or BRIEF) if Ledger.is_in(engine) else None
        row = ledger.study(config.name) if ledger else None
        if ledger is None or row is None:
            yield None
        else:
            yield StoredStudy(
                ledger=ledger,
                identity_fields=row.identity,
                identity=StudyIdentity.recall(row.identity, row.scoring),
                generation=row.generation,
            )
