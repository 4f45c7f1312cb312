"""What is known of a study before anything is loaded: its checkpoints, where it writes, its plan, what is odd."""

import json
import shutil
import socket
from collections import Counter
from dataclasses import dataclass
from math import prod
from os.path import isfile
from pathlib import Path
from urllib.parse import urlsplit

from dem_opt.checkpoints.files import Header, known_content
from dem_opt.config import StudyConfig
from dem_opt.config.objective_function import ObjectiveFunction, import_from
from dem_opt.errors import InputError
from dem_opt.merging.kernel import expected_backend
from dem_opt.planning.hardware import Speed
from dem_opt.planning.hardware import probe as probe_speed
from dem_opt.planning.inputs import CheckedHeaders, check_headers, identical_checkpoints
from dem_opt.planning.plan import Plan, header_identity, refuse_too_large, sized
from dem_opt.storage.engine import connect, is_there, masked, probe
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger

KNOCK = 2.0
"""Seconds in which a tracking server must answer."""


@dataclass(frozen=True)
class Stored:
    """One checkpoint on disk.  `dtypes` counts tensors; `hashed` says whether its content is known already."""

    name: str
    folder: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    bytes: int
    hashed: bool


@dataclass(frozen=True)
class Findings:
    """What `dem-opt check` found.

    architecture  the model's class and the names of its tied weights
    storage, tracking  where they are and whether they can be used
    export, free  bytes that an export takes, and that are free where the study writes
    seconds       expected for merging and scoring, by `speed`
    kernel        what merges will run as on this machine, in words
    """

    checkpoints: tuple[Stored, ...]
    architecture: str
    tied: tuple[str, ...]
    storage: str
    tracking: str
    export: int
    free: int
    plan: Plan
    speed: Speed
    seconds: float
    kernel: str
    warnings: tuple[str, ...]

    @property
    def unhashed(self) -> int:
        """Bytes that the first run reads once for their content hashes."""
        return sum(one.bytes for one in self.checkpoints if not one.hashed)

    def lines(self) -> list[str]:
        """What is to be told in sentences: memory, time, disk, places, warnings."""
        plan, machine = self.plan, self.plan.machine
        memory = "RAM" if machine.device == "cpu" else f"Memory of each of {machine.devices} GPUs"
        each = f", each on {plan.gpus_per_worker} GPUs" if plan.gpus_per_worker > 1 else ""
        hashed = f"Content is not hashed yet: the first run reads {sized(self.unhashed)} once." if self.unhashed else ""
        tied = f"Tied weights, kept once: {' = '.join(self.tied)}." if self.tied else ""
        told = [
            tied,
            f"{memory}: {sized(machine.total)}, {sized(machine.available)} available. "
            f"Workers{each}: {plan.fitting:,} fit, {plan.workers} asked for.",
            f"Merging and scoring: about {_duration(self.seconds)} ({self.speed.source}). "
            "Loading, proposals and MLflow come on top.",
            f"{self.kernel[0].upper()}{self.kernel[1:]}.",
            f"An export takes {sized(self.export)}, {sized(self.free)} are free on its disk.",
            hashed,
            f"storage   {self.storage}",
            f"tracking  {self.tracking}",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return [line for line in told if line]


def check(config: StudyConfig, where: Path) -> Findings:
    """All that headers and configuration say of a study.  Writes nothing.

    Raises InputError for what would stop a run, but for what only the weights and texts themselves can tell; that it
    does not fit into memory is left to `refuse`, so that the plan can be seen.
    """
    files = check_headers(config, where)
    _refuse_missing_texts(config)
    _refuse_bad_function(config, where)
    plan, storage = files.plan(), f"{masked(config.storage)}: {probe(config.storage)}"
    speed = _speed(config, plan)
    tracking, unreachable = _tracking(config.tracking.uri)
    export, free = _export_bytes(files), shutil.disk_usage(_result(config.output)).free
    full = [f"an export needs {sized(export)}, {sized(free)} are free at {config.output}"] if free < export else []
    identities = {name: header_identity(header) for name, header in files.headers.items()}
    return Findings(
        checkpoints=tuple(_stored(name, header) for name, header in files.headers.items()),
        architecture=files.architecture.name,
        tied=tuple(sorted({*files.architecture.aliases, *files.architecture.aliases.values()})),
        storage=storage,
        tracking=f"{masked(config.tracking.uri)}: {tracking}",
        export=export,
        free=free,
        plan=plan,
        speed=speed,
        seconds=plan.seconds(speed),
        kernel=expected_backend(plan.machine.device).description,
        warnings=(*identical_checkpoints(identities), *_other_tokenizers(files), *unreachable, *full),
    )


def refuse(found: Findings, config: StudyConfig, where: Path) -> None:
    """Raise InputError, as a run would, where the workers don't fit into this machine's memory."""
    if config.compute.ray == "local":
        refuse_too_large(found.plan, where)


def _stored(name: str, header: Header) -> Stored:
    tensors = header.tensors.values()
    return Stored(
        name=name,
        folder=str(header.folder),
        tensors=len(tensors),
        parameters=sum(prod(one.shape) for one in tensors),
        dtypes=dict(Counter(one.dtype for one in tensors)),
        bytes=sum(one.nbytes for one in tensors),
        hashed=known_content(header) is not None,
    )


def _refuse_bad_function(config: StudyConfig, path: Path) -> None:
    """Raise InputError for a custom objective that cannot be imported."""
    if config.objective.function is not None:
        import_from(path.resolve().parent)
        ObjectiveFunction.load(config.objective.function)


def _refuse_missing_texts(config: StudyConfig) -> None:
    """Raise InputError for a corpus that is not there or empty; what it says is read by a run."""
    for name, data in config.corpora.items():
        section = "distributions" if name in config.distributions else "general"
        for part in ("validation", "held_out"):
            file, field = getattr(data, part), f"{section}.{name}.{part}"
            if file is not None and not isfile(file.path):
                raise InputError(file.path, field, None, "no such file")
            if file is not None and file.path.stat().st_size == 0:
                raise InputError(file.path, field, None, "has no text; give at least one document that is not empty")


def _speed(config: StudyConfig, plan: Plan) -> Speed:
    """This machine's, or what the study's ledger has measured."""
    measured = _measured(config)
    if measured is not None:
        return Speed("measured by this study's earlier evaluations", 0.0, 0.0, measured)
    return probe_speed(plan.machine.device, plan.calls.dtype, plan.widths.hidden, plan.widths.intermediate)


def _measured(config: StudyConfig) -> float | None:
    """Seconds for each forward token of the study's evaluations so far; None where there are none."""
    if not is_there(config.storage):
        return None
    engine = connect(config.storage)
    try:
        if not Ledger.is_in(engine):
            return None
        ledger = Ledger(engine)
        row = ledger.study(config.name)
        if row is None:
            return None
        return ledger.seconds_per_token(StudyIdentity.recall(row.identity, row.scoring).scoring)
    finally:
        engine.dispose()


def _tracking(uri: str) -> tuple[str, list[str]]:
    """Whether MLflow can be reached, and a warning where it can't: a study goes on without it."""
    parts = urlsplit(uri)
    try:
        if parts.scheme in ("http", "https"):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=KNOCK).close()
            return "something listens there", []
        return probe(uri, "tracking.uri"), []
    except (InputError, OSError, ValueError) as error:
        return "can't be reached", [f"MLflow can't be reached, a study would go on without it ({masked(str(error))})"]


def _duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "a second"


def _export_bytes(files: CheckedHeaders) -> int:
    """Bytes of a composite on disk: the base's tensors, tied ones once."""
    tensors = files.headers["base"].tensors.items()
    return sum(one.nbytes for name, one in tensors if name not in files.architecture.aliases)


def _result(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _other_tokenizers(files: CheckedHeaders) -> list[str]:
    """A line for each checkpoint whose tokenizer.json encodes otherwise than the base's, which is the one used."""
    base = files.headers["base"].folder / "tokenizer.json"
    others = {name: header.folder / "tokenizer.json" for name, header in files.headers.items()}
    unlike = [name for name, file in others.items() if file.is_file() and base.is_file() and not _alike(base, file)]
    return [f"{name} has another tokenizer than the base; all texts are read with the base's" for name in unlike]


def _alike(one: Path, other: Path) -> bool:
    """Whether two tokenizers encode alike: their files agree but for truncation and padding, which calls switch."""
    texts = one.read_bytes(), other.read_bytes()
    if texts[0] == texts[1]:
        return True
    try:
        states = [json.loads(text) | {"truncation": None, "padding": None} for text in texts]
    except (ValueError, TypeError):
        return False
    return bool(states[0] == states[1])
