"""Models that were trained on mixtures of a study's data, found again by the records of their trainings."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dem_opt.analysis.results import finite_objectives
from dem_opt.checkpoints.files import content_hash
from dem_opt.checkpoints.locate import locate
from dem_opt.checkpoints.training_record import read_record
from dem_opt.config import StudyConfig
from dem_opt.search.trials import is_known, objectives, recall
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.training.fine_tune import FineTuned, result_of
from dem_opt.types import SPLITS, Composite, Score

FOLDER = "mixing"
"""Folder in the study's output for the models of mixtures."""

FROM_COMPOSITE = "from-composite-"
"""How the names of folders begin whose training began with the composite."""

PROPOSED = "proposed-"
"""How the names of folders begin that were trained on proposed shares, from the base."""


@dataclass(frozen=True, kw_only=True)
class TrainedMixture:
    """A model trained on a mixture, with its scores on the study's windows.

    Attributes:
        folder: Its checkpoint.
        shares: Shares of the tokens by distribution.
        start: "base" or "composite", which its training began with.
        is_proposed: True for proposed shares, False for those of a comparison.
        training: Result of the training.
        scores: Scores by split and corpus.
        objective: Objective by split, in its unit.
    """

    folder: Path
    shares: Mapping[str, float]
    start: str
    is_proposed: bool
    training: FineTuned
    scores: Mapping[str, Mapping[str, Score]]
    objective: Mapping[str, float]


def trained_mixtures(config: StudyConfig, ledger: Ledger, identity: StudyIdentity) -> list[TrainedMixture]:
    """The models that were trained with the study's present settings and scored on its present windows.

    They may have any number of steps and any seed.  Those of another base or with another learning rate, say, are left
    out.
    """
    scored, by_split = identity.exact(), objectives(ledger, identity)
    mixtures = []
    for folder, record in _records(config):
        composite = Composite.single(content_hash(folder, FOLDER))
        result = result_of(folder)
        if result is None or not all(is_known(ledger, scored, composite, split) for split in SPLITS):
            continue
        scores = {split: recall(ledger, scored, composite, split) for split in SPLITS}
        shares = dict(record["made_from"]["mixture"])
        is_composite = folder.name.startswith(FROM_COMPOSITE)
        mixtures.append(
            TrainedMixture(
                folder=folder,
                shares={name: float(shares.get(name, 0.0)) for name in config.distributions},
                start="composite" if is_composite else "base",
                is_proposed=is_composite or folder.name.startswith(PROPOSED),
                training=result,
                scores=scores,
                objective=finite_objectives(by_split, scores),
            )
        )
    return mixtures


def _records(config: StudyConfig) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The folders that count, with their records."""
    expected = _expected(config)
    for folder in sorted((config.output / FOLDER).glob("*")):
        record = read_record(folder) if folder.is_dir() and not folder.name.startswith(".") else None
        made_from = record.get("made_from") if record else None
        if record is None or not isinstance(made_from, Mapping) or "mixture" not in made_from:
            continue
        known = {name for name, _ in made_from["mixture"]} <= config.distributions.keys()
        is_base = folder.name.startswith(FROM_COMPOSITE) or made_from.get("base") == expected["base"]
        if known and is_base and _settings(made_from) == expected["settings"]:
            yield folder, record


def _expected(config: StudyConfig) -> dict[str, Any]:
    """Base and settings of the study's own fine-tunes, with which mixtures are comparable."""
    for name, distribution in config.distributions.items():
        kind, source = distribution.fine_tune
        record = read_record(locate(source, f"distributions.{name}.{kind}"))
        if record is not None and isinstance(made_from := record.get("made_from"), Mapping):
            return {"base": made_from.get("base"), "settings": _settings(made_from)}
    return {"base": None, "settings": None}


def _settings(made_from: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that trainings of a study share: all but the number of steps and the seed."""
    settings = {name: value for name, value in made_from.get("settings", {}).items() if name not in ("steps", "seed")}
    return settings | {name: made_from.get(name) for name in ("trainer", "dtype")}
