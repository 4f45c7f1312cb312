"""The public API: a study file, and everything that can be done with it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pandas as pd

from dem_opt import config as study_file
from dem_opt.analysis.mixing_cost import MixingComparison
from dem_opt.analysis.mixture_proposal import MixtureProposal
from dem_opt.analysis.power import Power
from dem_opt.analysis.surrogate import Prediction
from dem_opt.analysis.task_scores import TaskTable
from dem_opt.compute import Compute, RayCompute
from dem_opt.config import StudyConfig
from dem_opt.config.objective_function import import_from
from dem_opt.dashboards.html_report import write_report
from dem_opt.data.overlap import Overlap
from dem_opt.export.writer import Export
from dem_opt.grouping import GroupedCoefficients
from dem_opt.pareto import Front
from dem_opt.progress import NullProgress, Progress, reporting
from dem_opt.simplex import Coefficients
from dem_opt.tracking import MlflowTracker, PageListener, Tracker
from dem_opt.tracking.mlflow_client import MlflowStore
from dem_opt.training.fine_tune import FineTuned
from dem_opt.types import Rival, Summary
from dem_opt.workflows import (
    data_mixing,
    data_shares,
    downstream,
    export,
    final_table,
    fine_tuning,
    frames,
    lora_export,
    mixture_training,
    optimize,
    placebo,
    score,
    search_split_training,
    summary,
)
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.export import Champion
from dem_opt.workflows.front import read_front
from dem_opt.workflows.group_coefficients import AnyCoefficients, check_coefficients
from dem_opt.workflows.lora_export import LoraForm
from dem_opt.workflows.overlap import stored_overlap
from dem_opt.workflows.plots import StudyPlots
from dem_opt.workflows.result import StudyResult
from dem_opt.workflows.score import Scored


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
        plot: The study's figures, `study.plot.simplex()` for example.
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
        if config.objective.function is not None:
            import_from(Path(path).resolve().parent)
        self._context = StudyContext(
            config=config,
            path=Path(path),
            tracker=tracker or mlflow_tracker(config),
            compute=compute or RayCompute(config.compute),
            progress=progress or NullProgress(),
        )
        self.plot = StudyPlots(self.summary, self.pareto)

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
        with self._workflow() as context:
            return StudyResult(optimize.optimize(context, algorithms, seeds))

    def sync(self) -> bool:
        """Log finished trials that the tracker lacks; return whether it has all of them now."""
        with self._workflow() as context:
            return optimize.sync(context)

    def train(self) -> dict[str, FineTuned]:
        """Fine-tune the base for every distribution whose checkpoint is missing or has other settings.

        A checkpoint that `train` did not make is left alone.

        Returns:
            The trainings that were done, by distribution.

        Raises:
            TrainingError: A training failed; the others were finished first.
        """
        with self._workflow() as context:
            return fine_tuning.train(context, fine_tuning.jobs(self.config, context.path))

    def mix(self, grid: str) -> MixingComparison:
        """Train and score a model for each data mixture of a grid, and compare the winner with them.

        Args:
            grid: "study" for the study file's mixtures, "3" for all multiples of a third.
        """
        with self._workflow() as context:
            return data_mixing.mix(context, grid)

    def propose_mixture(
        self,
        tokens: str | int = "all",
        *,
        by: str = "curves",
        epochs: float = data_shares.EPOCHS,
        kl_penalty: float = 0.0,
        swarm: str | Path | None = None,
    ) -> MixtureProposal:
        """Propose shares of the training data, and write them into OUTPUT/mixture.

        Args:
            tokens: Tokens of the training: a number, "all" for those of all fine-tunes together, "one" for those of
                one.
            by: "curves" for the fine-tunes' training curves, or "merges" for the loss of merges, which are searched
                where that has not been done for this budget.
            epochs: Most passes over a distribution's data.
            kl_penalty: Weight of the Kullback-Leibler divergence from the natural shares, in the objective's unit for
                each nat.
            swarm: Folder of Olmix's `ratios.csv` and `metrics.csv`, to judge the prediction by mixtures that were
                trained elsewhere.
        """
        with self._workflow() as context:
            folder = None if swarm is None else Path(swarm)
            return data_shares.propose_mixture(context, str(tokens), by, epochs, kl_penalty, folder)

    def train_mixture(self, mixture: str | Path = "proposed", *, start: str = "base") -> MixingComparison:
        """Train one model on a mixture, unless that is done, and compare it with everything that the study knows.

        Args:
            mixture: "proposed" for what `propose_mixture` wrote, or a file of that form.
            start: "base", or "composite" for the study's winner, which the training then begins with.
        """
        with self._workflow() as context:
            return mixture_training.train_mixture(context, str(mixture), start)

    def placebo(self) -> tuple[Rival, ...]:
        """Search as the study did over placebos of the distribution vectors, and compare the winners.

        A placebo has random vectors of equal norm, tensor by tensor, or the vectors with permuted layers.
        """
        with self._workflow() as context:
            return placebo.compare_with_placebo(context)

    def fine_tune_on_search(self) -> tuple[Rival, ...]:
        """Train the base and the uniform average on the search split at the search's cost, and compare the winner."""
        with self._workflow() as context:
            return search_split_training.train_on_search_split(context)

    def evaluate(self) -> TaskTable:
        """Score base, fine-tunes, uniform average and the best composites on the study file's tasks."""
        with self._workflow() as context:
            return downstream.evaluate(context)

    def score(self, coefficients: AnyCoefficients) -> Scored:
        """Score a composite on both splits; what was measured before is not measured again.

        Args:
            coefficients: Coefficients by distribution; those left out are 0.  Or by group, then by distribution; groups
                left out have those of `global`.

        Returns:
            Scores by split ("search", "held_out"), then by distribution or general corpus, with the `objective` by
            split and the rows of base, uniform average and winner to compare with (`beside`).
        """
        with self._workflow() as context:
            return score.score_composite(context, self.checked(coefficients))

    def score_model(self, folder: str | Path) -> Scored:
        """Score a model folder that has the base's tokenizer; the result is that of `score`."""
        with self._workflow() as context:
            return score.score_model(context, Path(folder))

    def merge(
        self,
        coefficients: AnyCoefficients,
        out: str | Path,
        dtype: str | None = None,
        *,
        overwrite: bool = False,
        as_lora: bool = False,
        rank: int | None = None,
    ) -> Export:
        """Write a composite as a checkpoint folder, or as one LoRA of the base, and compare it from disk.

        Args:
            coefficients: Coefficients by distribution, or by group, as in `score`.
            out: Folder to write.
            dtype: "float32", "bfloat16" or "float16"; the base's unless given.
            overwrite: Replace an earlier export.  A folder with any file that was not exported is always refused.
            as_lora: Write a PEFT adapter.  The ranks of the composite's adapters add up, and it is exact.
            rank: Largest rank of the LoRA, the nearest of which is written.
        """
        form = LoraForm.of(as_lora, rank, dtype)
        with self._workflow() as context:
            if form is not None:
                return lora_export.merge_lora(context, self.checked(coefficients), Path(out), form, overwrite)
            return export.merge(context, self.checked(coefficients), Path(out), dtype, overwrite)

    def export(
        self, out: str | Path, dtype: str | None = None, *, as_lora: bool = False, rank: int | None = None
    ) -> Champion:
        """Write the winner as a checkpoint folder, prove it from disk, and register it with the tracker.

        Args:
            out: Folder to write; an earlier export there is replaced, unless a file was added to it or changed.
            dtype: "float32", "bfloat16" or "float16"; the base's unless given.
            as_lora: Write a PEFT adapter of the base instead, which is not registered.
            rank: Largest rank of the LoRA, the nearest of which is written; by default the adapters' ranks add up.
        """
        form = LoraForm.of(as_lora, rank, dtype)
        with self._workflow() as context:
            if form is not None:
                return lora_export.export_lora(context, Path(out), form)
            return export.export(context, Path(out), dtype)

    def checked(self, coefficients: AnyCoefficients) -> Coefficients | GroupedCoefficients:
        """Check coefficients by distribution, or by group as in `score`, and round them to units of 1e-9.

        Raises:
            InputError: They are no coefficients of this study.
        """
        return check_coefficients(self._context, coefficients, "coefficients")

    def summary(self) -> Summary:
        """Summarize what was measured so far, from the study's database alone."""
        return summary.read_summary(self._context)

    def overlap(self) -> Overlap | None:
        """Return what `dem-opt check --overlap` last measured of this study's data; None where nothing was."""
        with self._context.stored() as stored:
            return stored_overlap(self.config, stored.identity)

    def trials(self) -> pd.DataFrame:
        """Return the finished trials of all runs, one row each, in the order of runs and numbers.

        Columns, which hold values of the search split.  Of a study that searches for a front there are both losses
        too, as `loss.NAME` in the objective's unit, and the objective is their mean.

        - `run`: algorithm, and `@k` where the run's seed is the study's plus k.
        - `number`: number of the trial in its run.
        - `state`: "complete", "stopped" (early), "probe" (a gradient on some windows) or "failed"; the objective of
          stopped trials and of probes is an estimate.
        - `objective`: what is minimized, in the objective's unit; missing for failed trials.
        - `violation`: excess of protected corpora over their allowances, in the objective's unit.
        - `penalized`: objective plus the penalty for the violation, in the objective's unit.
        - `standard_error`: of the objective, in the objective's unit; 0 for complete trials.
        - `forward_equivalents`: cost in full forward passes over the search split.
        - `w.NAME`: coefficient of each distribution.
        - `nll.NAME`: NLL in nats per token on each distribution and general corpus; of a stopped trial, on the windows
          that were scored.
        - `perplexity.NAME`: exp(NLL) on each.
        - `bpb.NAME`: bits per byte on each; missing in databases of releases that did not count bytes.
        - `forward_tokens`, `scored_tokens`: tokens that went through the model, and those of them that count.
        - `merge_seconds`, `score_seconds`, `wait_seconds`, `propose_seconds`: time of merging, of scoring, of the
          worker's wait before, and of the proposal, in seconds.
        - `reason`: why the trial failed, else empty.
        """
        return frames.trials_frame(self.summary())

    def results(self) -> pd.DataFrame:
        """Return the results table, base first and winner last, then the top composites and leave-one-out.

        Columns, with SPLIT `search` and `held_out`; a value that was not measured is missing:

        - `label`: name of the composite.
        - `role`: "base", "single" (a fine-tune as it is), "uniform", "sum" (of all vectors, each with the coefficient
          1), "best" (of an algorithm), "top" (one of the best composites) or "without" (the winner without the
          distribution that `label` names).
        - `run`: run that found an algorithm's best, else empty.
        - `w.NAME`: coefficient of each distribution; missing for the base.  Of groups the global ones that they
          deviate from (`groups` has them).
        - `SPLIT.objective`: what is minimized, in the objective's unit.
        - `SPLIT.margin`, `SPLIT.margin_low`, `SPLIT.margin_high`: objective minus the winner's with a 95% interval
          over documents, in the objective's unit, for the rows of the table but the winner; infinite where all windows
          of a distribution are of one document.
        - `SPLIT.nll.NAME`, `SPLIT.perplexity.NAME`, `SPLIT.bpb.NAME`: NLL in nats per token, exp(NLL) and bits per byte
          on each corpus.
        - `violation`: excess of protected corpora over their allowances on the search split, in the objective's unit.
        - `evaluations`, `forward_equivalents`, `forward_tokens`, `seconds`: cost of finding the composite: composites
          scored, full forward passes over the search split, tokens, seconds of work.
        """
        return frames.results_frame(self.summary())

    def gradients(self) -> pd.DataFrame:
        """Return the gradients of the trials that measured one; no rows where none did.

        Columns:

        - `run`, `number`: the trial, as in `trials`.
        - `w.NAME`: coefficient of each distribution.
        - `gradient.NAME`: derivative of the penalized objective by the coefficient, in the objective's unit.
        """
        return frames.gradients_frame(self.summary())

    def groups(self) -> pd.DataFrame:
        """Return the coefficients by group of parameters, one row each; no rows where the study has searched none.

        Columns:

        - `group`: name.
        - `w.NAME`: coefficient of each distribution.
        """
        return frames.groups_frame(self.summary())

    def vectors(self) -> pd.DataFrame:
        """Return the geometry of the distribution vectors, one row each; no rows before the first run has ended.

        Columns:

        - `distribution`: name.
        - `norm`: Euclidean length over all parameters, without a unit.
        - `cosine.NAME`: cosine with each vector, from -1 to 1; missing where a vector is zero.
        """
        return frames.vectors_frame(self.summary())

    def predict(self, coefficients: Mapping[str, float]) -> Prediction:
        """Predict the objective of a composite with the surrogate of all trials, without a forward pass.

        Args:
            coefficients: Coefficients by distribution; those left out are 0.

        Returns:
            Mean of the penalized objective on the search split, and standard deviation of the objective without
            penalties, in the objective's unit.

        Raises:
            InputError: The coefficients are outside of the study's space, or there are too few trials to predict from.
        """
        return summary.predict(self._context, self._checked(coefficients))

    def pareto(self, first: str | None = None, second: str | None = None) -> Front:
        """Return the front between two losses over everything that is scored, without a forward pass.

        `pareto(a, b).rows()` are the rows of a data frame; `hypervolume`, `knee` and `lowest_mean` are attributes.

        Args:
            first: A distribution or general corpus, or "mean" for the study's weighted mean.
            second: Another.  Without names the two losses are those of `objective.pareto`.
        """
        names = None if first is None or second is None else (first, second)
        return read_front(self.config, self._context.path, names)

    def power(self) -> Power:
        """Return the power of comparing the winner with another composite on the study's windows.

        `power().detectable(windows)` is the least difference, in the objective's unit, that so many windows of each
        corpus detect (two-sided at 5%, in 80% of the cases), `power().windows_for(difference)` the number that a
        difference needs.  Measured on the trials, or where these are few, by a default (`is_measured` is False).
        """
        return Power.of(self.config, self.summary().precision)

    def report(self, path: str | Path) -> Path:
        """Write the report, one HTML file that needs no network, and return its path."""
        write_report(self.summary(), Path(path), self.overlap())
        return Path(path)

    def describe(self, results: Summary, note: str, files: Mapping[str, str | bytes]) -> bool:
        """Log a summary with the tracker: its baselines, a description in Markdown, and files by path.

        Returns:
            Whether the tracker has everything now.
        """
        with self._workflow() as context:
            return summary.log_summary(context, results, note, files)

    def complete_report(self) -> StudyResult:
        """Score all rows that a report can have, the best five and leave-one-out included, as far as they are missing.

        Raises:
            InputError: The study has not been run, or has changed since.
        """
        with self._workflow() as context:
            return StudyResult(final_table.complete_report(context))

    def reweighted(self, weights: Mapping[str, float]) -> Summary:
        """Summarize what the study would have found with other weights of its objective, without a forward pass.

        Args:
            weights: Weights by distribution or general corpus; those left out are 0.
        """
        with self._workflow() as context:
            return summary.reweigh(context, weights, "--reweight")

    @contextmanager
    def _workflow(self) -> Iterator[StudyContext]:
        """The study's context; code far below a workflow reports to its progress while this is open."""
        with reporting(self._context.progress):
            yield self._context

    def _checked(self, coefficients: Mapping[str, float]) -> Coefficients:
        return self.config.space.check(coefficients, self._context.path, "coefficients")


def mlflow_store(config: StudyConfig) -> MlflowStore:
    """Return the place in MLflow that a study file names."""
    return MlflowStore(
        uri=config.tracking.uri, experiment=config.tracking.experiment, artifacts=config.output / "artifacts"
    )


def mlflow_tracker(config: StudyConfig, *, on_pages: PageListener | None = None) -> MlflowTracker:
    """Return the MLflow tracker that a study file asks for; `on_pages` receives the URLs of logged trials."""
    return MlflowTracker(mlflow_store(config), close_seconds=config.outages.tracking, on_pages=on_pages)
