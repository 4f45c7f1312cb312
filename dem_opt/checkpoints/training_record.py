"""Files that a fine-tuning leaves beside its checkpoint: a record, a journal, and kept steps."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dem_opt.errors import InputError
from dem_opt.json_files import parse_json, regular_bytes
from dem_opt.manifest import read_description

RECORD = "fine_tuning.json"
"""File of a checkpoint folder with the base, data and settings it was made from."""

JOURNAL = "steps.jsonl"
"""File with a line for every step of a training, and for every validation."""

STEPS = "steps"
"""Folder of a run with the weights of its kept steps, by number."""


@dataclass(frozen=True)
class Point:
    """A line of a journal; the field names are the keys of its JSON.

    Attributes:
        seconds: Training time up to then, including the time before a kill.
        loss: Of the step's batch, in nats per scored token.
        validation: NLL in nats per token on the distribution's windows of the search split.
    """

    step: int
    seconds: float
    loss: float | None = None
    learning_rate: float | None = None
    validation: float | None = None

    def as_written(self) -> dict[str, float]:
        """The values that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_journal(path: Path) -> list[Point]:
    """The lines of a journal up to the first unfinished one; none where there is no journal."""
    points = []
    try:
        lines = regular_bytes(path).splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            points.append(parse_json(line, Point))
        except ValueError:
            break
    return points


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a checkpoint folder, or None where there is none."""
    return read_description(folder / RECORD) or None


def step_folder(run: Path, step: int | str, field: str) -> Path:
    """The folder of a kept step; `best` is the one of the lowest validation NLL, the earliest of several.

    Raises:
        InputError: The run, or the step, is missing.
    """
    validated = {point.step: point.validation for point in read_journal(run / JOURNAL) if point.validation is not None}
    kept = sorted(step for step in validated if (run / STEPS / str(step)).is_dir())
    if not kept:
        mend = "has no kept steps: `dem-opt train` keeps them with `fine_tuning: {keep: true}`"
        raise InputError(run, f"{field}.run", None, mend if run.exists() else "no such run; `dem-opt train` makes it")
    chosen = min(kept, key=lambda step: (validated[step], step)) if step == "best" else step
    if chosen not in kept:
        raise InputError(run, f"{field}.step", step, f"was not kept; there are best, {', '.join(map(str, kept))}")
    return run / STEPS / str(chosen)
