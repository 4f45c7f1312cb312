"""A proposed mixture with all that it rests on: data, limits, trained mixtures that test it, and costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dem_opt.analysis.data_shares import Predictor, SharesProposal
from dem_opt.analysis.mixing_cost import Cost
from dem_opt.analysis.mixture_prediction import Quality, quality

FEWEST = 5
"""Trained mixtures of one budget from which on the prediction is judged by them."""


@dataclass(frozen=True, kw_only=True)
class CorpusSize:
    """Training data of a distribution, as it is packed.

    Attributes:
        windows: Windows.
        documents: Documents.
        tokens: Tokens of the documents, without padding.
    """

    windows: int
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class PredictedMixture:
    """A trained mixture with its prediction.

    Attributes:
        shares: Its shares by distribution.
        predicted: Predicted objective, in its unit.
        measured: The trained model's held-out objective, in its unit.
    """

    shares: Mapping[str, float]
    predicted: float
    measured: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """How well a predictor ranked mixtures that were trained.

    Attributes:
        predictor: "merges" or "curves" (see `data_shares`).
        source: Where these are from: the study's own, or a folder.
        tokens: Tokens that each was trained on; None where that is not known.
        mixtures: The mixtures.
        quality: The judgement.
    """

    predictor: str
    source: str
    tokens: int | None
    mixtures: tuple[PredictedMixture, ...]
    quality: Quality

    @property
    def best(self) -> PredictedMixture:
        """The best of the trained models."""
        return min(self.mixtures, key=lambda mixture: mixture.measured)


@dataclass(frozen=True, kw_only=True)
class MixtureProposal:
    """Result of `dem-opt mix`.

    Attributes:
        study: Name of the study.
        unit: Unit of objectives, in words.
        predictor: "merges" or "curves", which the proposal rests on.
        total: Sum of the coefficients of merges that stand for this budget.
        proposal: The proposed shares.
        steps: Optimizer steps of one training on them.
        tokens: Tokens of that training.
        sizes: Training data by distribution.
        natural: Natural shares, by windows.
        epochs: Passes over each distribution's data.
        epochs_limit: Most passes that were allowed.
        penalty: Weight of the divergence from natural shares.
        evidence: How well both predictors ranked trained mixtures, as far as there are any.
        probes: Cost of the fine-tunes.
        search: Cost of the search.
        training: Cost of the one training to come; its seconds are those of the fine-tunes, by tokens.
        folder: Folder of the written files.
    """

    study: str
    unit: str
    predictor: str
    total: float
    proposal: SharesProposal
    steps: int
    tokens: int
    sizes: Mapping[str, CorpusSize]
    natural: Mapping[str, float]
    epochs: Mapping[str, float]
    epochs_limit: float
    penalty: float
    evidence: tuple[Evidence, ...]
    probes: Cost
    search: Cost
    training: Cost
    folder: Path

    @property
    def cost(self) -> Cost:
        """Probes, search and the one training together."""
        return self.probes + self.search + self.training

    def cost_ratio(self, mixtures: int) -> float:
        """Floating-point operations of all that, over those of so many trainings."""
        return self.cost.flops / (mixtures * self.training.flops)


def evidence_of(
    kind: str,
    predictor: Predictor,
    pairs: Sequence[tuple[Mapping[str, float], float]],
    source: str,
    tokens: int | None,
) -> list[Evidence]:
    """Judge a predictor by mixtures with their losses; nothing is said from too few.

    Args:
        kind: "merges" or "curves".
        predictor: The predictor, for as many tokens as the mixtures have.
        pairs: Shares and held-out objective of each.
        source: Where they are from.
        tokens: Tokens that each was trained on, where that is known.
    """
    if len(pairs) < FEWEST:
        return []
    names = sorted(pairs[0][0])
    predicted_N = predictor.predict(np.array([[shares[name] for name in names] for shares, _ in pairs]))
    measured_N = np.array([measured for _, measured in pairs])
    mixtures = tuple(
        PredictedMixture(shares=shares, predicted=float(value), measured=measured)
        for (shares, measured), value in zip(pairs, predicted_N, strict=True)
    )
    judged = quality(predicted_N, measured_N)
    return [Evidence(predictor=kind, source=source, tokens=tokens, mixtures=mixtures, quality=judged)]
