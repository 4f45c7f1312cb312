"""All that can be done with a study file, and what wires the rooms together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

from dem_opt import config as study_file
from dem_opt.analysis.mixing_cost import MixingComparison
from dem_opt.analysis.results import entries, left_out_entries, rescored, summarize, top_entries
from dem_opt.analysis.reweighting import checked, reweighted
from dem_opt.analysis.surrogate import surrogate_of
from dem_opt.analysis.task_scores import TaskTable
from dem_opt.analysis.vector_geometry import measure_once, recall_vectors
from dem_opt.compute import Compute, RayCompute
from dem_opt.config import StudyConfig
from dem_opt.errors import InputError
from dem_opt.evaluation.worker import build
from dem_opt.export.model_card import texts
from dem_opt.export.writer import Export, Scores, output_dtype, prove, prove_scores, write_composite
from dem_opt.planning.inputs import Inputs, load_inputs
from dem_opt.progress import NullProgress, Progress
from dem_opt.search.loop import Driver
from dem_opt.search.optuna_study import Search
from dem_opt.search.runs import Runs, check_algorithms, run_names
from dem_opt.search.trials import finished, is_known, missing, objectives, recall
from dem_opt.search.warm_start import enter
from dem_opt.simplex import Coefficients
from dem_opt.storage.engine import Engine, connect, is_there, masked
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.leases import Lease, holding, visiting
from dem_opt.storage.ledger import Ledger, StudyRow
from dem_opt.storage.retry import RetryPolicy
from dem_opt.tracking.tracker import Board, Drivers, MlflowTracker, Tracker
from dem_opt.training.fine_tune import FineTuned
from dem_opt.types import SEARCH, SPLITS, Composite, ResultRow, StoredModel, Summary, TrialRecord, WorkerSpec
from dem_opt.workflows.data_mixing import mix, planned
from dem_opt.workflows.downstream import evaluate, wanted
from dem_opt.workflows.fine_tuning import fine_tunings, train
from dem_opt.workflows.int8_error import known_cost, tell_cost
from dem_opt.workflows.provenance import (
    compare_libraries,
    facts,
    libraries,
    measures,
    place,
    study_description,
    study_descriptions,
)


@dataclass(frozen=True)
class Champion:
    """The winner as it was exported.

    standing  as it was scored in the study
    exported  as the written folder scores: the same, but where another dtype was asked for
    version   its number in MLflow, None where MLflow could not be reached
    """

    result: ResultRow
    exported: ResultRow
    export: Export
    version: str | None


class Study:
    """A study file and all that can be done with it.

    Study.load("study.yaml").run() does what `dem-opt run study.yaml` does.  `where` names the study in messages,
    `progress` receives its events, `compute` is Ray as the study file says unless another is given, `board` is told of
    pages in MLflow.  Every method raises InputError for what the user did wrong, before anything is written.
    """

    def __init__(
        self,
        config: StudyConfig,
        where: object,
        progress: Progress | None = None,
        compute: Compute | None = None,
        board: Board | None = None,
    ) -> None:
        self.config, self._where, self._board = config, where, board
        self._progress = progress or NullProgress()
        self._compute = compute or RayCompute(config.compute)
        away = f"the database {masked(config.storage)}", config.outages.storage
        self._patience = RetryPolicy(*away, self._progress)

    @classmethod
    def load(
        cls,
        path: str | Path,
        progress: Progress | None = None,
        compute: Compute | None = None,
        board: Board | None = None,
    ) -> Self:
        """The study in a file."""
        return cls(study_file.load(Path(path)), path, progress, compute, board)

    def run(self) -> ResultRow:
        """Optimize the coefficients; the winner.  Run again, it goes on where it stopped."""
        return self.compare([self.config.search.algorithm]).winner

    def compare(self, algorithms: Sequence[str], seeds: int = 1) -> Summary:
        """Optimize with each algorithm over one ledger, and score the final table's composites on both splits.

        Each has the budget that the study file gives, and `seeds` runs, whose seeds count on from the study's.
        """
        check_algorithms(self.config, self._where, algorithms)
        sources = load_inputs(self.config, self._where)
        for warning in sources.warnings():
            self._progress.warning(warning)
        name = self.config.name
        with self._driving() as (ledger, lease), self._compute as compute:
            sources = sources.on(compute.device)
            identity = sources.identity()
            with lease.turn("beginning"):
                generation, start = enter(name, identity, ledger, lease, self._where, self._progress)
            with self._driver(compute, sources.spec(), identity, ledger) as driver:
                with lease.turn("measuring baselines"):
                    driver.measure(_yardsticks(identity), SEARCH)
                    found = self._trials(ledger, identity, generation)
                    compare_libraries(name, driver, found, self._progress)
                runs = Runs(self.config, generation, lease, self._patience)
                for run in run_names(algorithms, seeds):
                    with closing(runs.open(run, start, sources.gradients_fit)) as search:
                        self._optimize(driver, search, lease)
                found = self._trials(ledger, identity, generation)
                with lease.turn("measuring the final table"):
                    table = entries(identity, found)
                    reported = [*table, *top_entries(identity, found), *left_out_entries(identity, table[-1])]
                    for split in SPLITS:
                        driver.measure([entry.composite for entry in reported], split)
            for cost in tell_cost(sources, ledger, partial(self._driver, compute), self._where):
                self._progress.note(cost)
            measure_once(sources.base, sources.fine_tunes, self.config.output, self._progress)
            return self._summarize(ledger, identity, generation)

    def sync(self) -> bool:
        """Write down in MLflow what it lacks of the trials that are told, each once; whether it has all of them now.

        Nothing is scored.  Raises InputError where the study has not been run.
        """
        with self._open_found() as ledger:
            row = self._row(ledger)
        identity, synced = StudyIdentity.recall(row.question, row.scoring), True
        with self._driving() as (ledger, lease), Runs(self.config, row.generation, lease).there() as searches:
            for search in searches.values():
                tracker = self._tracker(search, lease)
                tracker.reconcile(missing(ledger, identity, search))
                synced &= tracker.close()
        return synced

    def train(self) -> dict[str, FineTuned]:
        """Fine-tune the base for every distribution whose checkpoint is missing or was trained otherwise.

        A checkpoint that `train` did not make is left alone.  Raises the first failure, after the others ended.
        """
        return train(self.config, fine_tunings(self.config, self._where), self._compute, self._progress)

    def mix(self, grid: str) -> MixingComparison:
        """Train and score a model for each mixture of the grid, to hold the winner against.

        grid  "study" for the study file's mixtures, "3" for all multiples of a third
        """
        jobs = planned(self.config, self._where, grid)
        with self._open_found() as ledger:
            return mix(self.config, self._where, jobs, ledger, self.summary(), self._compute, self._progress)

    def evaluate(self) -> TaskTable:
        """Score base, fine-tunes, uniform average and the best composites on the study file's tasks."""
        given = wanted(self.config, self._where)
        return evaluate(self.config, self._where, given, self.summary(), self._compute, self._progress)

    def score(self, weights: Mapping[str, float]) -> Scores:
        """Scores of one composite by split and distribution; what the ledger has is not measured again."""
        coefficients = self.config.space.check(weights, self._where, "--weights")
        sources = load_inputs(self.config, self._where)
        return self._score(sources, sources.identity().composite(coefficients))

    def score_model(self, folder: Path) -> Scores:
        """Scores of any model that has the base's tokenizer, by split and distribution."""
        sources = load_inputs(self.config, self._where, worker=False)
        model = sources.other(folder, "--model")
        return self._score(sources.exact(), Composite.single(model.content), model)

    def merge(self, weights: Mapping[str, float], out: Path, dtype: str | None = None) -> Export:
        """Write the composite of these coefficients as a checkpoint folder, its bits compared from disk.

        In `dtype` ("bfloat16", say) where one is given, else in the base's.
        """
        coefficients = self.config.space.check(weights, self._where, "--weights")
        sources = load_inputs(self.config, self._where, worker=False)

        def approve(written: Export) -> Mapping[str, str]:
            prove(written)
            return self._texts(sources, coefficients, dtype)

        return _write(sources, coefficients, out, approve, dtype)

    def export(self, out: Path, dtype: str | None = None) -> Champion:
        """Write the winner as a checkpoint folder, prove it from disk, register it.

        Its bits are compared with a fresh merge and its scores with the winner's before the folder gets its name.
        In another `dtype` its scores may differ; they are told beside the winner's.
        """
        files = load_inputs(self.config, self._where, worker=False)
        with self._open_found() as ledger, self._compute as compute:
            sources, row = files.on(compute.device), self._row(ledger)
            identity = sources.identity()
            if row.question != identity.asked():
                mend = f"has changed since it was run; first: dem-opt run {self._where}"
                raise InputError(self._where, None, None, mend)
            summary = self._found(ledger, identity, row.generation)
            winner = exported = summary.winner
            coefficients = winner.coefficients
            assert coefficients is not None

            def approve(written: Export) -> Mapping[str, str]:
                nonlocal exported
                self._progress.note("written; comparing it from disk, then scoring it")
                prove(written)
                model = sources.other(written.path, "export")
                with self._driver(compute, sources.spec_of(model), identity, ledger) as driver:
                    again = {split: driver.score_afresh(Composite.single(model.content), split) for split in SPLITS}
                if dtype is None:
                    prove_scores(again, winner.scores, identity.vectors)
                if dtype is None and identity.vectors == "exact":
                    return self._texts(sources, coefficients, dtype, summary)
                label = f"exported in {dtype}" if dtype else "exported from the checkpoints as they are"
                exported = rescored(winner, label, again, objectives(ledger, identity))
                shown = replace(summary, results=(*summary.results, exported))
                return self._texts(sources, coefficients, dtype, shown)

            export = _write(sources, coefficients, out, approve, dtype)
            for cost in known_cost(ledger, identity):
                self._progress.note(str(cost))
            return Champion(winner, exported, export, self._register(ledger, exported, export, row.generation))

    def summary(self) -> Summary:
        """What the study has found so far, from its database alone.

        Raises InputError where it has not been run.
        """
        with self._open_found() as ledger:
            row = self._row(ledger)
            return self._found(ledger, StudyIdentity.recall(row.question, row.scoring), row.generation)

    def describe(self, summary: Summary, note: str, files: Mapping[str, str | bytes]) -> None:
        """Write a summary down in MLflow, with baselines, a note and files, in the runs of its searches."""
        with self._open_found() as ledger:
            runs = Runs(self.config, self._row(ledger).generation)
            lease = visiting(ledger.engine, self.config.name, self._patience)
            with lease.turn("describing"):
                for run, told in study_descriptions(summary, note, files).items():
                    with closing(runs.open(run)) as search, closing(self._tracker(search, lease)) as tracker:
                        tracker.describe(told)

    def reweighted(self, weights: Mapping[str, float]) -> Summary:
        """What the study would have found with another weighting of its objective, from its database alone.

        Raises InputError where it has not been run, and for a weighting that is none.
        """
        with self._open_found() as ledger:
            row = self._row(ledger)
            asked = StudyIdentity.recall(row.question, row.scoring)
            identity = replace(asked, weights=checked(asked, weights, self._where, "--reweight"))
            summary = reweighted(self.config.name, ledger, identity, facts(self.config, self._where, identity))
        if summary is None:
            raise self._nothing_yet()
        return summary

    def _score(self, files: Inputs, composite: Composite, model: StoredModel | None = None) -> Scores:
        """Scores of a composite of the study's checkpoints, or of another model; what the ledger lacks is measured."""
        with self._open() as (_, ledger), self._compute as compute:
            sources = files.on(compute.device)
            identity = sources.identity()
            if not all(is_known(ledger, identity, composite, split) for split in SPLITS):
                spec = sources.spec() if model is None else sources.spec_of(model)
                with self._driver(compute, spec, identity, ledger) as driver:
                    for split in SPLITS:
                        driver.measure([composite], split)
            return {split: recall(ledger, identity, composite, split) for split in SPLITS}

    @contextmanager
    def _open(self) -> Iterator[tuple[Engine, Ledger]]:
        """The study's database and the ledger in it."""
        engine = connect(self.config.storage)
        try:
            yield engine, Ledger(engine, self._patience)
        finally:
            engine.dispose()

    @contextmanager
    def _driving(self) -> Iterator[tuple[Ledger, Lease]]:
        """The study's ledger, and the right to write trials."""
        with self._open() as (engine, ledger), holding(engine, self.config.name, True, self._patience) as lease:
            yield ledger, lease

    @contextmanager
    def _open_found(self) -> Iterator[Ledger]:
        """The ledger of a study that has been run; nothing is made where there is none.

        Raises InputError where it has not been run.
        """
        if not is_there(self.config.storage):
            raise self._nothing_yet()
        engine = connect(self.config.storage)
        try:
            if not Ledger.is_in(engine):
                raise self._nothing_yet()
            yield Ledger(engine)
        finally:
            engine.dispose()

    @contextmanager
    def _driver(self, compute: Compute, spec: WorkerSpec, identity: StudyIdentity, ledger: Ledger) -> Iterator[Driver]:
        """A driver whose workers are ready."""
        with self._progress.phase(f"loading {1 + len(spec.fine_tunes)} checkpoints"):
            pool = compute.workers(build, spec, self._progress)
        with closing(pool):
            yield Driver(identity, ledger, pool, self._progress)

    def _optimize(self, driver: Driver, search: Search, lease: Lease) -> None:
        """One run's Optuna study, from where it stands to its end."""
        with closing(self._tracker(search, lease)) as tracker:
            tracker.describe(study_description(self.config, self._where, driver.identity))
            tracker.reconcile(missing(driver.ledger, driver.identity, search))
            driver.optimize(search, self.config.search.lookahead, tracker, lease)
            tracker.reconcile(missing(driver.ledger, driver.identity, search))
        self._progress.note(f"{search.name} ended after {search.stopped}")

    def _trials(self, ledger: Ledger, identity: StudyIdentity, generation: int) -> dict[str, tuple[TrialRecord, ...]]:
        """Finished trials of every search in this generation, by run."""
        with Runs(self.config, generation).there() as searches:
            return {run: tuple(finished(ledger, identity, search)) for run, search in searches.items()}

    def _summarize(self, ledger: Ledger, identity: StudyIdentity, generation: int) -> Summary:
        with Runs(self.config, generation).there() as searches:
            trials = {run: finished(ledger, identity, search) for run, search in searches.items()}
            stopped = {run: search.stopped for run, search in searches.items()}
        told = facts(self.config, self._where, identity)
        summary = summarize(self.config.name, ledger, identity, trials, told, stopped)
        vectors = recall_vectors(identity.base, identity.fine_tunes, self.config.output)
        believed = surrogate_of(identity.space, [record for records in trials.values() for record in records])
        return replace(summary, vectors=vectors, surrogate=believed)

    def _found(self, ledger: Ledger, identity: StudyIdentity, generation: int) -> Summary:
        """The summary of a study that has a best trial; InputError where it has none yet."""
        summary = self._summarize(ledger, identity, generation)
        if summary.winner.role != "best":
            raise self._nothing_yet()
        return summary

    def _texts(
        self, sources: Inputs, coefficients: Coefficients, dtype: str | None, summary: Summary | None = None
    ) -> dict[str, str]:
        """What is written beside an export's weights, by file name."""
        folder = Path(str(self._where)).resolve().parent
        found = (summary.results, summary.margins) if summary else ((), ())
        return texts(sources, coefficients, folder, libraries(), dtype, *found)

    def _register(self, ledger: Ledger, winner: ResultRow, export: Export, generation: int) -> str | None:
        """The winner's version in MLflow, under its algorithm's run; None where MLflow can't be reached."""
        tags = {"composite": export.composite.key, "content": export.content, "coefficients": str(winner.coefficients)}
        with (
            closing(Runs(self.config, generation).open(winner.run)) as search,
            closing(self._tracker(search, visiting(ledger.engine, self.config.name, self._patience))) as tracker,
        ):
            return tracker.register(export.path, measures(winner), tags)

    def _tracker(self, search: Search, lease: Lease) -> Tracker:
        """MLflow for one Optuna study."""
        drivers = Drivers(partial(lease.turn, "logging"), lambda: bool(lease.others()))
        return MlflowTracker(place(self.config, search), self._progress.warning, drivers, self._board)

    def _row(self, ledger: Ledger) -> StudyRow:
        row = ledger.study(self.config.name)
        if row is None:
            raise self._nothing_yet()
        return row

    def _nothing_yet(self) -> InputError:
        return InputError(self._where, None, None, f"nothing is measured yet; first: dem-opt run {self._where}")


def _write(
    sources: Inputs,
    coefficients: Coefficients,
    out: Path,
    approve: Callable[[Export], Mapping[str, str]],
    dtype: str | None,
) -> Export:
    composite = sources.identity().composite(coefficients)
    return write_composite(sources.base, sources.models(), composite, out, approve, output_dtype(dtype))


def _yardsticks(identity: StudyIdentity) -> list[Composite]:
    """What trials are measured by, so that it comes before them: the base, and for regrets the single fine-tunes."""
    singles = [Composite.single(content) for content in identity.fine_tunes.values()] if identity.worst else []
    return [Composite.single(identity.base), *singles]
