"""Predictors of mixtures for a budget, from a study's training curves and from its merges."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import fsum

import numpy as np

from dem_opt.analysis.data_shares import CurvePredictor, MergePredictor, Predictor, forgotten
from dem_opt.analysis.mixture_proposal import CorpusSize
from dem_opt.analysis.training_curves import FEWEST, fit_curve
from dem_opt.checkpoints.training_record import JOURNAL, read_journal
from dem_opt.errors import InputError
from dem_opt.storage.identity import StudyIdentity
from dem_opt.training.fine_tune import FineTuned
from dem_opt.types import BITS_PER_BYTE, SEARCH, Precision, ResultRow, Summary, TrialRecord
from dem_opt.workflows.context import StudyContext
from dem_opt.workflows.mixture_merges import Merges, find_merges, measure_merges

PREDICTORS = ("curves", "merges")
"""Kinds of predictors that a proposal may rest on."""


class MixturePredictors:
    """Predictors of a study's mixtures: curves, and merges as far as they have been searched.

    Args:
        context: The study.
        identity: Its identity when it was run.
        summary: Its results.
        fine_tunes: The fine-tunes' records, by distribution.
        sizes: Training data by distribution.
    """

    def __init__(
        self,
        context: StudyContext,
        identity: StudyIdentity,
        summary: Summary,
        fine_tunes: Mapping[str, FineTuned],
        sizes: Mapping[str, CorpusSize],
    ) -> None:
        self._context, self._identity, self._summary = context, identity, summary
        self._fine_tunes, self._sizes = fine_tunes, sizes
        self._merges: dict[float, Merges] = {}

    def total(self, steps: int) -> float:
        """Sum of the coefficients of merges that stand for so many steps."""
        mean = sum(record.steps for record in self._fine_tunes.values()) / len(self._fine_tunes)
        return round(steps / mean, 6)

    def needed(self, kind: str, steps: int) -> Predictor:
        """The predictor for so many steps; merges are searched unless that is done.

        Raises:
            InputError: The study has no such predictor.
        """
        if kind == "curves":
            return self._curves(steps)
        merges = measure_merges(self._context, self._identity, self.total(steps))
        self._merges[merges.total] = merges
        predictor = MergePredictor.of(merges.space, merges.trials, merges.total, merges.allowed)
        if predictor is None:
            mend = "too few composites were scored to predict others; raise search.trials"
            raise InputError(self._context.path, None, None, mend)
        return predictor

    def known(self, steps: int) -> dict[str, Predictor]:
        """The predictors for so many steps that need no further work."""
        predictors: dict[str, Predictor] = {}
        with suppress(InputError):
            predictors["curves"] = self._curves(steps)
        merges = self.merges(steps)
        predictor = merges and MergePredictor.of(merges.space, merges.trials, merges.total, merges.allowed)
        return predictors | ({"merges": predictor} if predictor else {})

    def merges(self, steps: int) -> Merges | None:
        """The merges that stand for so many steps, where they have been searched."""
        total = self.total(steps)
        if total not in self._merges:
            merges = find_merges(self._context, self._identity, total)
            if merges is None:
                return None
            self._merges[total] = merges
        return self._merges[total]

    def trials(self, steps: int) -> Sequence[TrialRecord]:
        """The trials of these merges, or the study's own."""
        merges = self.merges(steps)
        return merges.trials if merges else [trial for records in self._summary.trials.values() for trial in records]

    def precision(self, kind: str, steps: int) -> Precision | None:
        """How well the best merge is known: of the study, or of the merges that the proposal rests on."""
        merges = self.merges(steps) if kind == "merges" else None
        return merges.precision if merges else self._summary.precision

    @property
    def baselines(self) -> list[ResultRow]:
        """The base and the fine-tunes as they are, scored."""
        rows = self._summary.results
        return [row for role in ("base", "single") for row in rows if row.role == role]

    def _curves(self, steps: int) -> CurvePredictor:
        """Training curves and forgetting, weighted as the objective is; only batches that were new count."""
        config, path = self._context.config, self._context.path
        objective, total = config.objective, fsum(config.weights.values())
        general = [name for name in config.general if config.weights[name]]
        if objective.worst or objective.function or general:
            mend = (
                "training curves predict a weighted mean over distributions, and the objective is another; --by merges"
            )
            raise InputError(path, "objective", None, mend)
        curves, weights = [], []
        for name in sorted(config.distributions):
            kind, source = config.distributions[name].fine_tune
            folder = self._fine_tunes[name].path
            run = folder if (folder / JOURNAL).exists() else folder.parent.parent
            losses = [point.loss for point in read_journal(run / JOURNAL) if point.loss is not None]
            curve = fit_curve(losses[: self._sizes[name].windows // config.fine_tuning.batch_size])
            if curve is None:
                mend = f"its training has fewer than {FEWEST} steps on new data, too few for a curve; --by merges"
                raise InputError(path, f"distributions.{name}.{kind}", str(source), mend)
            curves.append(curve)
            weights.append(config.weights[name] / total * self._unit(name))
        trained_K = np.array([self._fine_tunes[name].steps for name in sorted(config.distributions)], dtype=np.float64)
        forgotten_KK = forgotten(self._summary.results, sorted(config.distributions))
        if forgotten_KK is None:
            raise InputError(path, None, None, f"not all fine-tunes are scored yet; first: dem-opt run {path}")
        return CurvePredictor(tuple(curves), tuple(weights), float(steps), trained_K, forgotten_KK)

    def _unit(self, name: str) -> float:
        """The objective's unit in nats per token of a distribution."""
        if self._context.config.objective.unit != BITS_PER_BYTE:
            return 1.0
        score = self._summary.results[0].scores[SEARCH][name]
        assert score.bits_per_byte is not None, "an objective in bits per byte has counted bytes"
        return score.bits_per_byte / score.nll
