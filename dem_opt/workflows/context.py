"""A study file with everything that its workflows use: database, compute, tracker, progress."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dem_opt.compute import Compute, Pool
from dem_opt.config import StudyConfig
from dem_opt.errors import InputError
from dem_opt.evaluation.worker import build
from dem_opt.planning.inputs import Inputs, load_inputs
from dem_opt.progress import Progress
from dem_opt.search.loop import Driver
from dem_opt.search.optuna_storage import check_tables
from dem_opt.search.optuna_study import Search
from dem_opt.search.runs import Runs
from dem_opt.storage.engine import Engine, masked
from dem_opt.storage.identity import StudyIdentity, changes, refuse_other_scoring
from dem_opt.storage.leases import Lease, holding, visiting
from dem_opt.storage.ledger import Ledger
from dem_opt.storage.retry import BRIEF, RetryPolicy, opened
from dem_opt.tracking import JobTracker, SearchTracker, Tracker
from dem_opt.types import WorkerSpec
from dem_opt.workflows.provenance import search_info
from dem_opt.workflows.stored_study import StoredStudy, stored_study


@dataclass(frozen=True)
class LeasePeers:
    """The other drivers of a study, as its lease knows them."""

    lease: Lease

    def exclusive(self) -> AbstractContextManager[object]:
        """Return a context that only one driver of the study is in at a time."""
        return self.lease.turn("logging")

    def any_alive(self) -> bool:
        """Return whether another driver is at work now."""
        return bool(self.lease.others())


@dataclass(frozen=True, kw_only=True)
class StudyContext:
    """A study file with the dependencies of its workflows.

    Attributes:
        config: The study file's content.
        path: The study file, which messages name.
        tracker: Where the study is logged.
        compute: Where composites are scored and models trained.
        progress: Receives the events of long work.
    """

    config: StudyConfig
    path: Path
    tracker: Tracker
    compute: Compute
    progress: Progress

    @cached_property
    def retry(self) -> RetryPolicy:
        """Patience with a database that cannot be reached."""
        database = f"the database {masked(self.config.storage)}"
        return RetryPolicy(database, self.config.outages.storage, self.progress)

    def load_inputs(self, *, for_workers: bool) -> Inputs:
        """Check, tokenize and hash everything that the study names, and report what looks wrong.

        Args:
            for_workers: Whether workers on this machine will hold all of it, so that it has to fit into memory.
        """
        inputs = load_inputs(self.config, self.path, worker=for_workers)
        for warning in (*inputs.left_out, *inputs.warnings()):
            self.progress.warning(warning)
        return inputs

    @contextmanager
    def database(self) -> Iterator[tuple[Engine, Ledger]]:
        """Open the study's database, which is created where it is missing."""
        with opened(self.config.storage, self.retry) as engine:
            yield engine, Ledger(engine, self.retry)

    @contextmanager
    def driving(self) -> Iterator[tuple[Ledger, Lease]]:
        """Open the study's database with the right to write trials."""
        with self.database() as (engine, ledger), holding(engine, self.config.name, True, self.retry) as lease:
            check_tables(self.config.storage, self.retry)
            yield ledger, lease

    @contextmanager
    def stored(self) -> Iterator[StoredStudy]:
        """Open the database of a study that has been run; nothing is created.

        Raises:
            InputError: The study has not been run.
        """
        with stored_study(self.config) as stored:
            if stored is None:
                raise self.not_run()
            yield stored

    def refuse_changed(self, stored: StoredStudy, identity: StudyIdentity) -> None:
        """Raise InputError where a study that has been run is another one now."""
        refuse_other_scoring(self.path, stored.identity.scoring_fields(), identity.scoring_fields())
        if change := changes(stored.identity_fields, identity.identity_fields()):
            mend = f"has changed since it was run ({change}); first: dem-opt run {self.path}"
            raise InputError(self.path, None, None, mend)

    def not_run(self) -> InputError:
        """Return the error for a study without results."""
        return InputError(self.path, None, None, f"nothing is measured yet; first: dem-opt run {self.path}")

    @contextmanager
    def driver(self, spec: WorkerSpec, identity: StudyIdentity, ledger: Ledger) -> Iterator[Driver]:
        """Start workers and yield a driver of them.  `compute` must have been entered."""
        with closing(self._workers(spec)) as pool:
            yield Driver(identity=identity, ledger=ledger, pool=pool, progress=self.progress, study=self.config.name)

    def _workers(self, spec: WorkerSpec) -> Pool:
        with self.progress.phase(f"loading {1 + len(spec.fine_tunes)} checkpoints"):
            return self.compute.workers(build, spec, self.progress)

    def runs(self, generation: int, lease: Lease | None = None, retry: RetryPolicy = BRIEF) -> Runs:
        """Return the searches of a generation.

        Args:
            generation: Number of the generation.
            lease: The driver that proposes; None for readers.
            retry: How long to wait for a database that is away.
        """
        return Runs(self.config, generation, lease=lease, patience=retry)

    def visit(self, ledger: Ledger) -> Lease:
        """Return a lease that is no driver's: it takes turns and proposes nothing."""
        return visiting(ledger.engine, self.config.name, self.retry)

    def track(self, search: Search, lease: Lease) -> SearchTracker:
        """Open the log of a search."""
        return self.tracker.open_search(search_info(self.config, search), LeasePeers(lease), self.progress.warning)

    def track_jobs(self) -> JobTracker:
        """Open the log of work that is no trial."""
        return self.tracker.open_jobs(self.progress.warning)
