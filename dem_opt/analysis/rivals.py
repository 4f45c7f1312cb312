"""Rivals of the winner: placebos searched alike, and models trained on the search split at equal cost.

A file in the study's output folder says which composite each rival is and what it cost; its scores are the ledger's.
A record counts for the study that it was made for, with the same search: else there is no such rival yet.
"""

import json
from dataclasses import asdict, dataclass
from hashlib import sha256

from dem_opt.analysis.bootstrap import difference
from dem_opt.analysis.results import finite_objectives
from dem_opt.analysis.sampling import documents_of
from dem_opt.atomic import write_text
from dem_opt.config import StudyConfig
from dem_opt.errors import InputError
from dem_opt.json_files import find_json
from dem_opt.search.trials import is_known, objectives, recall
from dem_opt.simplex import UNIT
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.types import SPLITS, Composite, Margin, ResultRow, Rival

FILE = "rivals.json"
"""The file in a study's output folder."""

RIVALS = {
    "random": "random vectors of equal norm",
    "permuted": "vectors with permuted layers",
    "base": "the base trained on the search split",
    "uniform": "the uniform average trained on the search split",
}
"""Rivals by kind, in words."""

PLACEBOS = ("random", "permuted")
"""The kinds that are searched for; the others are trained."""


@dataclass(frozen=True, kw_only=True)
class RivalRecord:
    """A rival as the file has it, under these names.

    Attributes:
        kind: See `Rival`.
        made_from: See `made_from`.
        composite: Units of 1e-9 by content.
        coefficients: Of a placebo's winner, by distribution.
        trials: Trials of a placebo's search.
        steps: Optimizer steps of a training.
        flops: Floating-point operations of the search or the training.
    """

    kind: str
    made_from: str
    composite: dict[str, int]
    flops: float
    coefficients: dict[str, float]
    trials: int = 0
    steps: int = 0


def made_from(config: StudyConfig, identity: StudyIdentity, kind: str) -> str:
    """Hash of everything that decides a rival: the study by content, its search, and for a training its settings."""
    settings = [config.search.model_dump(mode="json")]
    if kind not in PLACEBOS:
        settings.append(config.fine_tuning.model_dump(mode="json"))
    facts = [kind, identity.identity_fields(), identity.scoring_fields(), *settings]
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def find_records(config: StudyConfig, identity: StudyIdentity) -> dict[str, RivalRecord]:
    """The records that count for a study, by kind."""
    stored = find_json(config.output / FILE, list[RivalRecord]) or []
    by_kind = {record.kind: record for record in stored if sum(record.composite.values()) == UNIT}
    return {kind: by_kind[kind] for kind in RIVALS if kind in by_kind and _counts_for(by_kind[kind], config, identity)}


def _counts_for(record: RivalRecord, config: StudyConfig, identity: StudyIdentity) -> bool:
    return record.made_from == made_from(config, identity, record.kind)


def keep_record(config: StudyConfig, record: RivalRecord) -> None:
    """Write a record in the place of an earlier one of its kind; InputError where the file can't be written."""
    stored = find_json(config.output / FILE, list[RivalRecord]) or []
    records = [other for other in stored if other.kind != record.kind] + [record]
    try:
        write_text(config.output / FILE, json.dumps([asdict(each) for each in records], indent=2) + "\n")
    except OSError as error:
        raise InputError(config.output / FILE, None, None, f"can't be written ({error.strerror})") from None


def recall_rivals(config: StudyConfig, ledger: Ledger, identity: StudyIdentity, winner: ResultRow) -> tuple[Rival, ...]:
    """The rivals of a study's winner, from their records and the ledger."""
    if winner.role != "best":
        return ()
    records = find_records(config, identity).values()
    rivals = (_recall(record, ledger, identity, winner) for record in records)
    return tuple(rival for rival in rivals if rival is not None)


def _recall(record: RivalRecord, ledger: Ledger, identity: StudyIdentity, winner: ResultRow) -> Rival | None:
    """A rival with its margins; None where the ledger lacks its scores."""
    # A trained model is scored as it is, also where the study's vectors are int8.
    scored = identity if record.kind in PLACEBOS else identity.exact()
    composite = Composite.of(record.composite)
    scores = {
        split: recall(ledger, scored, composite, split)
        for split in SPLITS
        if is_known(ledger, scored, composite, split)
    }
    by_split = objectives(ledger, identity)
    objective = finite_objectives(by_split, scores)
    if objective.keys() != set(SPLITS):
        return None
    gaps = {
        split: difference(scores[split], winner.scores[split], by_split[split], documents_of(ledger, identity, split))
        for split in SPLITS
        if split in winner.objective
    }
    return Rival(
        kind=record.kind,
        objective=objective,
        margins=tuple(
            Margin(rival=record.kind, split=split, mean=gap.mean, low=gap.low, high=gap.high, sampled=gap.sampled)
            for split, gap in gaps.items()
        ),
        coefficients=record.coefficients,
        trials=record.trials,
        steps=record.steps,
        flops=record.flops,
    )
