"""All that can be done with a study file, and what wires the rooms together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Self

from dem_opt import config as study_file
from dem_opt.card import texts
from dem_opt.config import StudyConfig
from dem_opt.costs import Mixing
from dem_opt.database import Engine, Lease, connect, holding, is_there, masked
from dem_opt.downstream import evaluate, wanted
from dem_opt.driver import Driver
from dem_opt.errors import InputError
from dem_opt.export import Export, Scores, output_dtype, prove, prove_scores, write_composite
from dem_opt.fidelity import known_cost, tell_cost
from dem_opt.finetune import FineTuned
from dem_opt.ledger import Ledger, StudyRow
from dem_opt.mixing import mix, planned
from dem_opt.pool import Compute, RayCompute
from dem_opt.question import SEARCH, SPLITS, Question, changes, refuse_other_scoring
from dem_opt.records import Composite, Observer, ResidentSpec, Silence, Standing, StoredModel, Summary, TrialRecord
from dem_opt.resident import build
from dem_opt.reweighting import checked, reweighted
from dem_opt.runs import Runs, check_algorithms, run_names
from dem_opt.search import Search
from dem_opt.simplex import Coefficients
from dem_opt.sources import Sources, gather
from dem_opt.standings import carried_over, entries, rescored, summarize, told_reuse, top_entries
from dem_opt.tasks import TaskTable
from dem_opt.tracking import MlflowTracker, Place, Tracker
from dem_opt.trials import finished, is_known, objectives, recall
from dem_opt.tuning import fine_tunings, train

LIBRARIES = ("torch", "transformers", "optuna", "mlflow", "ray", "dem-opt")


@dataclass(frozen=True)
class Champion:
    """The winner as it was exported.

    standing  as it was scored in the study
    exported  as the written folder scores: the same, but where another dtype was asked for
    version   its number in MLflow, None where MLflow could not be reached
    """

    standing: Standing
    exported: Standing
    export: Export
    version: str | None


class Study:
    """A study file and all that can be done with it.

    Study.load("study.yaml").run() does what `dem-opt run study.yaml` does.  `where` names the study in messages,
    `observer` watches, `compute` is Ray as the study file says unless another is given.  Every method raises
    InputError for what the user did wrong, before anything is written.
    """

    def __init__(
        self, config: StudyConfig, where: object, observer: Observer | None = None, compute: Compute | None = None
    ) -> None:
        self.config, self._where = config, where
        self._observer = observer or Silence()
        self._compute = compute or RayCompute(config.compute)

    @classmethod
    def load(cls, path: str | Path, observer: Observer | None = None, compute: Compute | None = None) -> Self:
        """The study in a file."""
        return cls(study_file.load(Path(path)), path, observer, compute)

    def run(self) -> Standing:
        """Optimize the coefficients; the winner.  Run again, it goes on where it stopped."""
        return self.compare([self.config.search.algorithm]).winner

    def compare(self, algorithms: Sequence[str], seeds: int = 1) -> Summary:
        """Optimize with each algorithm over one ledger, and score the final table's composites on both splits.

        Each has the budget that the study file gives, and `seeds` runs, whose seeds count on from the study's.
        """
        check_algorithms(self.config, self._where, algorithms)
        sources = gather(self.config, self._where)
        for warning in sources.warnings():
            self._observer.milestone(f"warning: {warning}")
        name = self.config.name
        with self._open() as (engine, ledger), holding(engine, name) as lease, self._compute as compute:
            sources = sources.on(compute.device)
            question = sources.question()
            generation, start = self._enter(ledger, question)
            with self._driver(compute, sources.spec(), question, ledger) as driver:
                driver.measure(_yardsticks(question), SEARCH)
                runs = Runs(self.config, generation)
                for run in run_names(algorithms, seeds):
                    self._optimize(driver, runs.open(run, start, sources.gradients_fit), lease)
                found = self._trials(ledger, question, generation)
                for split in SPLITS:
                    reported = [*entries(question, found), *top_entries(question, found)]
                    driver.measure([entry.composite for entry in reported], split)
            for cost in tell_cost(sources, ledger, partial(self._driver, compute), self._where):
                self._observer.milestone(cost)
            return self._summarize(ledger, question, generation)

    def train(self) -> dict[str, FineTuned]:
        """Fine-tune the base for every distribution whose checkpoint is missing or was trained otherwise.

        A checkpoint that `train` did not make is left alone.  Raises the first failure, after the others ended.
        """
        return train(self.config, fine_tunings(self.config, self._where), self._compute, self._observer)

    def mix(self, grid: str) -> Mixing:
        """Train and score a model for each mixture of the grid, to hold the winner against.

        grid  "study" for the study file's mixtures, "3" for all multiples of a third
        """
        jobs = planned(self.config, self._where, grid)
        with self._open_found() as ledger:
            return mix(self.config, self._where, jobs, ledger, self.summary(), self._compute, self._observer)

    def evaluate(self) -> TaskTable:
        """Score base, fine-tunes, uniform average and the best composites on the study file's tasks."""
        given = wanted(self.config, self._where)
        return evaluate(self.config, self._where, given, self.summary(), self._compute, self._observer)

    def score(self, weights: Mapping[str, float]) -> Scores:
        """Scores of one composite by split and distribution; what the ledger has is not measured again."""
        coefficients = self.config.space.check(weights, self._where, "--weights")
        sources = gather(self.config, self._where)
        return self._score(sources, sources.question().composite(coefficients))

    def score_model(self, folder: Path) -> Scores:
        """Scores of any model that has the base's tokenizer, by split and distribution."""
        sources = gather(self.config, self._where, resident=False)
        model = sources.other(folder, "--model")
        return self._score(sources.exact(), Composite.single(model.content), model)

    def merge(self, weights: Mapping[str, float], out: Path, dtype: str | None = None) -> Export:
        """Write the composite of these coefficients as a checkpoint folder, its bits compared from disk.

        In `dtype` ("bfloat16", say) where one is given, else in the base's.
        """
        coefficients = self.config.space.check(weights, self._where, "--weights")
        sources = gather(self.config, self._where, resident=False)

        def approve(written: Export) -> Mapping[str, str]:
            prove(written)
            return self._texts(sources, coefficients, dtype)

        return _write(sources, coefficients, out, approve, dtype)

    def export(self, out: Path, dtype: str | None = None) -> Champion:
        """Write the winner as a checkpoint folder, prove it from disk, register it.

        Its bits are compared with a fresh merge and its scores with the winner's before the folder gets its name.
        In another `dtype` its scores may differ; they are told beside the winner's.
        """
        files = gather(self.config, self._where, resident=False)
        with self._open_found() as ledger, self._compute as compute:
            sources, row = files.on(compute.device), self._row(ledger)
            question = sources.question()
            if row.question != question.asked():
                mend = f"has changed since it was run; first: dem-opt run {self._where}"
                raise InputError(self._where, None, None, mend)
            summary = self._found(ledger, question, row.generation)
            winner = exported = summary.winner
            coefficients = winner.coefficients
            assert coefficients is not None

            def approve(written: Export) -> Mapping[str, str]:
                nonlocal exported
                prove(written)
                model = sources.other(written.path, "export")
                with self._driver(compute, sources.spec_of(model), question, ledger) as driver:
                    again = {split: driver.score_afresh(Composite.single(model.content), split) for split in SPLITS}
                if dtype is None:
                    prove_scores(again, winner.scores, question.vectors)
                if dtype is None and question.vectors == "exact":
                    return self._texts(sources, coefficients, dtype, summary)
                label = f"exported in {dtype}" if dtype else "exported from the checkpoints as they are"
                exported = rescored(winner, label, again, objectives(ledger, question))
                shown = replace(summary, standings=(*summary.standings, exported))
                return self._texts(sources, coefficients, dtype, shown)

            export = _write(sources, coefficients, out, approve, dtype)
            for cost in known_cost(ledger, question):
                self._observer.milestone(str(cost))
            return Champion(winner, exported, export, self._register(exported, export, row.generation))

    def summary(self) -> Summary:
        """What the study has found so far, from its database alone.

        Raises InputError where it has not been run.
        """
        with self._open_found() as ledger:
            row = self._row(ledger)
            return self._found(ledger, Question.recall(row.question, row.scoring), row.generation)

    def reweighted(self, weights: Mapping[str, float]) -> Summary:
        """What the study would have found with another weighting of its objective, from its database alone.

        Raises InputError where it has not been run, and for a weighting that is none.
        """
        with self._open_found() as ledger:
            row = self._row(ledger)
            asked = Question.recall(row.question, row.scoring)
            question = replace(asked, weights=checked(asked, weights, self._where, "--reweight"))
            summary = reweighted(self.config.name, ledger, question, self._facts(question))
        if summary is None:
            raise self._nothing_yet()
        return summary

    def _score(self, files: Sources, composite: Composite, model: StoredModel | None = None) -> Scores:
        """Scores of a composite of the study's checkpoints, or of another model; what the ledger lacks is measured."""
        with self._open() as (_, ledger), self._compute as compute:
            sources = files.on(compute.device)
            question = sources.question()
            if not all(is_known(ledger, question, composite, split) for split in SPLITS):
                spec = sources.spec() if model is None else sources.spec_of(model)
                with self._driver(compute, spec, question, ledger) as driver:
                    for split in SPLITS:
                        driver.measure([composite], split)
            return {split: recall(ledger, question, composite, split) for split in SPLITS}

    @contextmanager
    def _open(self) -> Iterator[tuple[Engine, Ledger]]:
        """The study's database and the ledger in it."""
        engine = connect(self.config.storage)
        try:
            yield engine, Ledger(engine)
        finally:
            engine.dispose()

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
    def _driver(self, compute: Compute, spec: ResidentSpec, question: Question, ledger: Ledger) -> Iterator[Driver]:
        """A driver whose residents are ready."""
        with closing(compute.residents(build, spec)) as pool:
            yield Driver(question, ledger, pool, self._observer)

    def _enter(self, ledger: Ledger, question: Question) -> tuple[int, list[Coefficients]]:
        """The study's generation and the points that it begins with; a first run, or a change, is written down.

        Raises InputError where its scores would not compare with those that the study has.
        """
        name, asked, scored = self.config.name, question.asked(), question.scored()
        row = ledger.study(name)
        if row is None:
            ledger.enter_study(StudyRow(name, 1, scored, asked))
            return 1, []
        refuse_other_scoring(self._where, row.scoring, scored)
        generation = row.generation + (row.question != asked)
        ledger.enter_study(StudyRow(name, generation, row.scoring | scored, asked))
        start = carried_over(ledger, question) if generation > 1 else []
        if row.question != asked:
            self._observer.milestone(
                f"{name} now asks another question ({changes(row.question, asked)}): generation {generation} begins "
                + told_reuse(ledger, question, start)
            )
        return generation, start

    def _optimize(self, driver: Driver, search: Search, lease: Lease) -> None:
        """One run's Optuna study, from where it stands to its end."""
        with closing(self._tracker(search)) as tracker:
            tracker.reconcile(finished(driver.ledger, driver.question, search))
            driver.optimize(search, self.config.search.lookahead, tracker, lease)
        self._observer.milestone(f"{search.name} ended after {search.stopped}")

    def _trials(self, ledger: Ledger, question: Question, generation: int) -> dict[str, tuple[TrialRecord, ...]]:
        """Finished trials of every search in this generation, by run."""
        searches = Runs(self.config, generation).there()
        return {run: tuple(finished(ledger, question, search)) for run, search in searches.items()}

    def _summarize(self, ledger: Ledger, question: Question, generation: int) -> Summary:
        searches = Runs(self.config, generation).there()
        trials = {run: finished(ledger, question, search) for run, search in searches.items()}
        stopped = {run: search.stopped for run, search in searches.items()}
        return summarize(self.config.name, ledger, question, trials, self._facts(question), stopped)

    def _found(self, ledger: Ledger, question: Question, generation: int) -> Summary:
        """The summary of a study that has a best trial; InputError where it has none yet."""
        summary = self._summarize(ledger, question, generation)
        if summary.winner.role != "best":
            raise self._nothing_yet()
        return summary

    def _texts(
        self, sources: Sources, coefficients: Coefficients, dtype: str | None, summary: Summary | None = None
    ) -> dict[str, str]:
        """What is written beside an export's weights, by file name."""
        folder = Path(str(self._where)).resolve().parent
        found = (summary.standings, summary.margins) if summary else ((), ())
        return texts(sources, coefficients, folder, _libraries(), dtype, *found)

    def _register(self, winner: Standing, export: Export, generation: int) -> str | None:
        """The winner's version in MLflow, under its algorithm's run; None where MLflow can't be reached."""
        metrics = {f"{split}.objective_nll": nll for split, nll in winner.objective.items()}
        metrics |= {"search.protect_violation": winner.violation} if winner.violation else {}
        for split, scores in winner.scores.items():
            metrics |= {f"{split}.perplexity.{name}": score.perplexity for name, score in scores.items()}
        tags = {"composite": export.composite.key, "content": export.content, "coefficients": str(winner.coefficients)}
        with closing(self._tracker(Runs(self.config, generation).open(winner.run))) as tracker:
            return tracker.register(export.path, metrics, tags)

    def _tracker(self, search: Search) -> Tracker:
        """MLflow for one Optuna study."""
        tracking = self.config.tracking
        parameters = {
            "base": str(self.config.base),
            "distributions": ", ".join(self.config.distributions),
            "total": str(self.config.simplex.total),
            "worst": str(self.config.objective.worst),
            **{f"evaluation.{name}": str(value) for name, value in self.config.evaluation.model_dump().items()},
            **_libraries(),
        }
        place = Place(
            uri=tracking.uri,
            experiment=tracking.experiment,
            model=self.config.name,
            study=search.name,
            uid=search.uid,
            artifacts=self.config.output / "artifacts",
            parameters=parameters,
        )
        return MlflowTracker(place, self._observer.milestone)

    def _row(self, ledger: Ledger) -> StudyRow:
        row = ledger.study(self.config.name)
        if row is None:
            raise self._nothing_yet()
        return row

    def _nothing_yet(self) -> InputError:
        return InputError(self._where, None, None, f"nothing is measured yet; first: dem-opt run {self._where}")

    def _facts(self, question: Question) -> dict[str, str]:
        """What reproduces the study: where its parts are, their content, and with what it was run."""
        folders = {name: one.expert[1] for name, one in self.config.distributions.items()}
        contents = {f"{name}: {folders.get(name, 'gone')}": content for name, content in question.experts.items()}
        return {
            "study file": str(self._where),
            "storage": masked(self.config.storage),
            "MLflow": masked(self.config.tracking.uri),
            f"base: {self.config.base}": question.base,
            **contents,
            **question.settings,
            **_libraries(),
            "go on, or repeat": f"dem-opt run {self._where}",
        }


def _write(
    sources: Sources,
    coefficients: Coefficients,
    out: Path,
    approve: Callable[[Export], Mapping[str, str]],
    dtype: str | None,
) -> Export:
    composite = sources.question().composite(coefficients)
    return write_composite(sources.base, sources.models(), composite, out, approve, output_dtype(dtype))


def _yardsticks(question: Question) -> list[Composite]:
    """What trials are measured by, so that it comes before them: the base, and for regrets the single fine-tunes."""
    singles = [Composite.single(content) for content in question.experts.values()] if question.worst else []
    return [Composite.single(question.base), *singles]


def _libraries() -> dict[str, str]:
    return {library: version(library) for library in LIBRARIES}
