"""Data that passes between packages: composites, windows, scores, requests to workers, trials, results.

Shape suffixes here and in every module with tensors: B batch rows, T tokens of a window, W windows of a corpus,
N stored checkpoints (base and fine-tunes), P parameters, K distributions, V vocabulary.
"""

from dem_opt.types.composites import Composite, StoredModel, Terms
from dem_opt.types.evaluations import (
    GRADIENT_FORWARDS,
    PENALTY,
    Evaluation,
    Failure,
    Folds,
    Gradient,
    ParameterGradient,
    PartGradient,
    Request,
    StoppingRule,
    WorkerSpec,
)
from dem_opt.types.results import Margin, Precision, ResultRow, Rival, Summary, Surrogate, TotalPrice, VectorGeometry
from dem_opt.types.scores import Corpus, CorpusLayout, Score, Windows, weighted_sum
from dem_opt.types.trials import Cost, Expense, TrialRecord
from dem_opt.types.units import BITS_PER_BYTE, DOCUMENTS, HELD_OUT, NATS_PER_TOKEN, SEARCH, SPLITS, UNITS, perplexity

__all__ = [
    "BITS_PER_BYTE",
    "DOCUMENTS",
    "GRADIENT_FORWARDS",
    "HELD_OUT",
    "NATS_PER_TOKEN",
    "PENALTY",
    "SEARCH",
    "SPLITS",
    "UNITS",
    "Composite",
    "Corpus",
    "CorpusLayout",
    "Cost",
    "Evaluation",
    "Expense",
    "Failure",
    "Folds",
    "Gradient",
    "Margin",
    "ParameterGradient",
    "PartGradient",
    "Precision",
    "Request",
    "ResultRow",
    "Rival",
    "Score",
    "StoppingRule",
    "StoredModel",
    "Summary",
    "Surrogate",
    "Terms",
    "TotalPrice",
    "TrialRecord",
    "VectorGeometry",
    "Windows",
    "WorkerSpec",
    "perplexity",
    "weighted_sum",
]
