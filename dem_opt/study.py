"""The public API: a study file, and everything that can be done with it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from dem_opt import config as study_file
from dem_opt.analysis.mixing_cost import MixingComparison
from dem_opt.analysis.task_scores import TaskTable
from dem_opt.compute import Compute, RayCompute
from dem_opt.config import StudyConfig
from dem_opt.export.writer import Export, Scores
from dem_opt.progress import NullProgress, Progress
from dem_opt.simplex import Coefficients
from dem_opt.tracking import MlflowTracker, PageListener, Tracker
from dem_opt.tracking.mlflow_client import MlflowStore
from dem_opt.training.fine_tune import FineTuned
from dem_opt.types import Summary
from dem_opt.workflows import data_mixing, downstream, export, fine_tuning, optimize, score, summary
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.export import Champion
from dem_opt.workflows.result import StudyResult


class Study:
    """A study file and everything that can be done with it.

    `Study.load("study.yaml").run()` does what `dem-opt run study.yaml` does.  Every method raises InputError for a
    mistake of the user, in one line that names the field, before anything is written.

    Args:
        config: The content of the study file.
        path: The study file, which messages name.
        tracker: Where trials are logged; MLflow, as the study file says, unless given.
        compute: Where composites are scored and models trained; Ray, as the study file says, unless given.
        progress: Receives the events of long work; none unless given.

    Attributes:
        config: The content of the study file.
    """

    def __init__(
        self,
        config: StudyConfig,
        path: str | Path,
        *,
        tracker: Tracker | None = None,
        compute: Compute | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self._context = StudyContext(
            config=config,
            path=Path(path),
            tracker=tracker or mlflow_tracker(config),
            compute=compute or RayCompute(config.compute),
            progress=progress or NullProgress(),
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        tracker: Tracker | None = None,
        compute: Compute | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Load a study file; the arguments are those of the class."""
        return cls(study_file.load(Path(path)), path, tracker=tracker, compute=compute, progress=progress)

    def run(self) -> StudyResult:
        """Optimize the coefficients.  A study that was interrupted continues where it stopped."""
        return self.compare([self.config.search.algorithm])

    def compare(self, algorithms: Sequence[str], seeds: int = 1) -> StudyResult:
        """Optimize with several algorithms over one ledger.

        Args:
            algorithms: Names as in the study file's `search.algorithm`.  Each has the study file's budget.
            seeds: Runs of each algorithm, whose seeds count on from the study's.
        """
        return StudyResult(optimize.optimize(self._context, algorithms, seeds))

    def sync(self) -> bool:
        """Log finished trials that the tracker lacks; return whether it has all of them now."""
        return optimize.sync(self._context)

    def train(self) -> dict[str, FineTuned]:
        """Fine-tune the base for every distribution whose checkpoint is missing or has other settings.

        A checkpoint that `train` did not make is left alone.

        Returns:
            The trainings that were done, by distribution.

        Raises:
            TrainingError: A training failed; the others were finished first.
        """
        return fine_tuning.train(self._context, fine_tuning.jobs(self.config, self._context.path))

    def mix(self, grid: str) -> MixingComparison:
        """Train and score a model for each data mixture of a grid, and compare the winner with them.

        Args:
            grid: "study" for the study file's mixtures, "3" for all multiples of a third.
        """
        return data_mixing.mix(self._context, grid)

    def evaluate(self) -> TaskTable:
        """Score base, fine-tunes, uniform average and the best composites on the study file's tasks."""
        return downstream.evaluate(self._context)

    def score(self, coefficients: Mapping[str, float]) -> Scores:
        """Score a composite on both splits; what was measured before is not measured again.

        Args:
            coefficients: Coefficients by distribution; those left out are 0.

        Returns:
            Scores by split ("search", "held_out"), then by distribution or general corpus.
        """
        return score.score_composite(self._context, self._checked(coefficients))

    def score_model(self, folder: str | Path) -> Scores:
        """Score a model folder that has the base's tokenizer; the result is that of `score`."""
        return score.score_model(self._context, Path(folder))

    def merge(self, coefficients: Mapping[str, float], out: str | Path, dtype: str | None = None) -> Export:
        """Write a composite as a checkpoint folder, and compare its bits from disk.

        Args:
            coefficients: Coefficients by distribution; those left out are 0.
            out: Folder to write.
            dtype: "float32", "bfloat16" or "float16"; the base's unless given.
        """
        return export.merge(self._context, self._checked(coefficients), Path(out), dtype)

    def export(self, out: str | Path, dtype: str | None = None) -> Champion:
        """Write the winner as a checkpoint folder, prove it from disk, and register it with the tracker.

        Args:
            out: Folder to write.
            dtype: "float32", "bfloat16" or "float16"; the base's unless given.
        """
        return export.export(self._context, Path(out), dtype)

    def summary(self) -> Summary:
        """Summarize what was measured so far, from the study's database alone."""
        return summary.read_summary(self._context)

    def describe(self, results: Summary, note: str, files: Mapping[str, str | bytes]) -> None:
        """Log a summary with the tracker: its baselines, a description in Markdown, and files by path."""
        summary.log_summary(self._context, results, note, files)

    def reweighted(self, weights: Mapping[str, float]) -> Summary:
        """Summarize what the study would have found with other weights of its objective, without a forward pass.

        Args:
            weights: Weights by distribution or general corpus; those left out are 0.
        """
        return summary.reweigh(self._context, weights, "--reweight")

    def _checked(self, coefficients: Mapping[str, float]) -> Coefficients:
        return self.config.space.check(coefficients, self._context.path, "coefficients")


def mlflow_tracker(config: StudyConfig, *, on_pages: PageListener | None = None) -> MlflowTracker:
    """Return the MLflow tracker that a study file asks for; `on_pages` receives the URLs of logged trials."""
    store = MlflowStore(
        uri=config.tracking.uri, experiment=config.tracking.experiment, artifacts=config.output / "artifacts"
    )
    return MlflowTracker(store, close_seconds=config.outages.tracking, on_pages=on_pages)
