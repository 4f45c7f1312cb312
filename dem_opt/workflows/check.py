"""Check a study before it loads anything: its checkpoints, its databases, its plan, and what looks wrong."""

import shutil
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, prod
from pathlib import Path
from urllib.parse import urlsplit

from dem_opt.analysis.power import Power
from dem_opt.analysis.precision import windows_for
from dem_opt.checkpoints.files import Header, known_content
from dem_opt.compute import ray_warnings
from dem_opt.config import StudyConfig
from dem_opt.config.objective_function import ObjectiveFunction, import_from
from dem_opt.data.documents import first_document
from dem_opt.errors import InputError
from dem_opt.merging.kernel import expected_backend
from dem_opt.planning.hardware import Speed
from dem_opt.planning.hardware import probe as probe_speed
from dem_opt.planning.inputs import (
    CheckedHeaders,
    check_headers,
    identical_checkpoints,
    load_corpora,
    unweighted_distributions,
)
from dem_opt.planning.plan import Plan, header_identity, refuse_too_large, sized
from dem_opt.search.run_name import RunName
from dem_opt.search.runs import check_algorithms, grid_excess, run_names
from dem_opt.storage.engine import is_there, masked, probe
from dem_opt.storage.identity import StudyIdentity
from dem_opt.storage.ledger import Ledger
from dem_opt.storage.retry import opened
from dem_opt.types import HELD_OUT, SEARCH, SPLITS, UNITS, Precision
from dem_opt.workflows.remaining import Remaining, remaining_work
from dem_opt.workflows.rounding import rounding_warnings

COMPARED = ("grid", "random", "simplex-gp")
"""Algorithms that `dem-opt compare` compares unless others are named."""

PROPOSED_TOKENS = 16_384
"""Tokens of each corpus that are proposed for the search split: benchmarks/windows.py and docs/evaluation.md."""

PROPOSED_REGRET = 5e-4
"""Expected regret in nats per token down to which more windows are proposed."""

KNOCK = 2.0
"""Seconds in which a tracking server must answer."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A checkpoint on disk.  `dtypes` counts tensors; `hashed` is true if its content hash is known already."""

    name: str
    folder: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    bytes: int
    hashed: bool


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Differences to the winner that a study detects: two-sided at 5%, in 80% of the cases.

    Attributes:
        is_measured: False for a default before there are trials.
        windows: Windows of each corpus by split.
        least: Least difference that these detect by split, in the objective's unit.
        difference: A difference that was asked about.
        needed: Windows of each corpus that detect it.
        unit: Unit of the differences, a key of `UNITS`.
    """

    is_measured: bool
    windows: dict[str, int]
    least: dict[str, float]
    difference: float | None
    needed: int | None
    unit: str

    def lines(self) -> list[str]:
        """The least differences, and the windows that the given one needs."""
        source = "measured on the trials" if self.is_measured else "by a default: too few trials are measured yet"
        least = " and ".join(
            f"{self.least[split]:.2g} on {self.windows[split]} windows of the {split.replace('_', '-')} split"
            for split in SPLITS
        )
        unit = UNITS[self.unit]
        line = f"Least difference to the winner that is detected (5%, power 80%), in {unit}: {least} ({source})."
        if self.needed is None:
            return [line]
        return [
            line,
            f"A difference of {self.difference:g} {UNITS[self.unit]} needs {self.needed:,} windows of each corpus.",
        ]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Findings of `dem-opt check`.

    Attributes:
        checkpoints: The base and the fine-tunes.
        architecture: Class of the model.
        tied: Names of its tied weights.
        storage: The study's database, and whether it can be used.
        tracking: MLflow's address, and whether it can be used.
        export: Bytes that an export takes.
        free: Bytes that are free where the study writes.
        plan: Bytes and passes of the study.
        speed: Speed of this machine.
        seconds: Seconds of merging and scoring that the plan takes at that speed.
        seconds_range: The least and the most that they may be.
        kernel: The backend of merges on this machine, in words.
        left: Work that is left of a study that was begun; None where it was not, or asks for something else now.
        left_seconds: Seconds of that work at that speed.
        left_range: The least and the most that they may be.
        comparison: What `dem-opt compare` would do, in words.
        windows: The number of windows of the search split that is proposed, in words.
        detection: Least differences that the windows of both splits detect.
        warnings: Problems that do not stop a run.
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
    seconds_range: tuple[float, float]
    kernel: str
    left: Remaining | None
    left_seconds: float
    left_range: tuple[float, float]
    comparison: str
    windows: str
    detection: Detection
    warnings: tuple[str, ...]

    @property
    def unhashed(self) -> int:
        """Bytes that the first run reads once for their content hashes."""
        return sum(checkpoint.bytes for checkpoint in self.checkpoints if not checkpoint.hashed)

    def lines(self) -> list[str]:
        """The findings as lines: memory, time, disk, databases, warnings."""
        plan, machine = self.plan, self.plan.machine
        memory = "RAM" if machine.device == "cpu" else f"Memory of each of {machine.devices} GPUs"
        each = f", each on {plan.gpus_per_worker} GPUs" if plan.gpus_per_worker > 1 else ""
        hashed = f"Content is not hashed yet: the first run reads {sized(self.unhashed)} once." if self.unhashed else ""
        tied = f"Tied weights, kept once: {' = '.join(self.tied)}." if self.tied else ""
        lines = [
            tied,
            f"{memory}: {sized(machine.total)}, {sized(machine.available)} available. "
            f"Workers{each}: {plan.fitting:,} fit, {plan.workers} asked for.",
            self._time(),
            self.comparison,
            self.windows,
            *self.detection.lines(),
            f"{self.kernel[0].upper()}{self.kernel[1:]}.",
            f"An export takes {sized(self.export)}, {sized(self.free)} are free on its disk.",
            hashed,
            f"storage   {self.storage}",
            f"tracking  {self.tracking}",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return [line for line in lines if line]

    def _time(self) -> str:
        """The time that a run takes: of the whole study, or of what is left of it."""
        if self.left is None:
            about = _about(self.seconds, self.seconds_range, self.speed)
            return f"Merging and scoring: {about}. Loading, proposals and MLflow come on top."
        work = self.left.work
        done = f"{self.left.done:,} of {self.left.planned:,} trials are done"
        if not self.left.trials and self.left.done < self.left.planned:
            done += ", and the search has ended"
        passes = work.composites + work.reported
        if not passes:
            return f"{done}. Nothing is left to score; `dem-opt show` prints the results."
        return (
            f"{done}. Left to do: {passes:,} composites at most, {work.tokens:,} forward tokens: "
            f"{_about(self.left_seconds, self.left_range, self.speed)}."
        )


def check(config: StudyConfig, where: Path, difference: float | None = None) -> Findings:
    """Check a study by its configuration, the headers of its checkpoints and its first documents; nothing is written.

    Args:
        config: The study file's content.
        where: The study file.
        difference: Difference in the objective's unit for which to tell the number of windows that detect it.

    Raises:
        InputError: Something would stop a run, as far as these tell.  A study that does not fit into memory is left
            to `refuse`, so that its plan can be shown first.
    """
    if difference is not None and not 0 < difference < inf:
        raise InputError(None, "--difference", difference, "a difference is above 0, in the objective's unit")
    files = check_headers(config, where)
    _refuse_bad_function(config, where)
    _refuse_unreadable_texts(config)
    plan, storage = files.plan(), f"{masked(config.storage)}: {probe(config.storage)}"
    speed, left = _speed(config, plan), remaining_work(config, files, plan)
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
        seconds_range=plan.seconds_range(plan.work, speed),
        kernel=expected_backend(plan.machine.device).description,
        left=left,
        left_seconds=left.work.seconds(speed) / plan.parallel if left else 0.0,
        left_range=plan.seconds_range(left.work, speed) if left else (0.0, 0.0),
        windows=proposed_windows(config, left.precision if left else None),
        detection=_detection(config, left.precision if left else None, difference),
        comparison=f"dem-opt compare: {_comparison(config, plan, speed, COMPARED)}",
        warnings=(
            *files.left_out(),
            *unweighted_distributions(config),
            *identical_checkpoints(identities),
            *files.warnings(),
            *unreachable,
            *full,
            *ray_warnings(config.compute),
        ),
    )


def comparison_plan(config: StudyConfig, where: Path, algorithms: Sequence[str], seeds: int) -> str:
    """Say what a comparison of algorithms would do, in trials, passes over the search split and minutes."""
    check_algorithms(config, where, algorithms)
    plan = check_headers(config, where).plan()
    return _comparison(config, plan, _speed(config, plan), algorithms, seeds)


def proposed_windows(config: StudyConfig, precision: Precision | None) -> str:
    """Propose a number of windows of the search split: by a study's own trials, else by their tokens."""
    evaluation, unit = config.evaluation, UNITS[config.objective.unit]
    windows = f"evaluation.windows is {evaluation.windows}"
    if precision is not None:
        more = f"{windows_for(precision, PROPOSED_REGRET)} windows would leave {PROPOSED_REGRET:g}"
        advice = "that is enough" if precision.regret <= PROPOSED_REGRET else more
        return (
            f"{windows}: by the trials so far, coefficients chosen on other windows would cost {precision.regret:.5f} "
            f"{unit} on average; {advice}."
        )
    enough = ceil(PROPOSED_TOKENS / evaluation.window)
    tokens = f"{evaluation.windows * evaluation.window:,} tokens of each corpus"
    if evaluation.windows >= enough:
        return f"{windows}: {tokens}, enough to tell coefficients apart ({enough} windows are proposed at least)."
    return f"{windows}: {tokens} are few to tell coefficients apart; {enough} windows or more are proposed."


def _detection(config: StudyConfig, precision: Precision | None, difference: float | None) -> Detection:
    """Differences that are detected: by the trials of the study, else by a default."""
    power, evaluation = Power.of(config, precision), config.evaluation
    windows = {SEARCH: evaluation.windows, HELD_OUT: evaluation.held_out}
    return Detection(
        is_measured=power.is_measured,
        windows=windows,
        least={split: power.detectable(count) for split, count in windows.items()},
        difference=difference,
        needed=None if difference is None else power.windows_for(difference),
        unit=config.objective.unit,
    )


def _comparison(config: StudyConfig, plan: Plan, speed: Speed, algorithms: Sequence[str], seeds: int = 1) -> str:
    if "grid" in algorithms and (excess := grid_excess(config)):
        return f"refused, search.grid_limit is {config.search.grid_limit}: {excess}"
    counts = Counter(RunName.parse(run).algorithm for run in run_names(algorithms, seeds))
    trials = {name: runs * config.planned_trials(name) for name, runs in counts.items()}
    passes = sum(trials.values())
    work = replace(plan.work, composites=passes, reported=0)
    about = _about(work.seconds(speed) / plan.parallel, plan.seconds_range(work, speed), speed)
    listed = ", ".join(f"{name} {count:,}" for name, count in trials.items())
    return f"{passes:,} passes over the search split at most ({listed}), {about}"


def check_contents(config: StudyConfig, where: Path) -> list[str]:
    """Check texts and weights as a run does before it begins: windows, and each vertex by its model's own forward pass.

    Returns:
        Warnings of models that can't be compared, and of rounding.

    Raises:
        InputError: A text is unreadable, or there is too little of it; a vertex computes otherwise, or the base is no
            causal model.
    """
    headers = check_headers(config, where)
    load_corpora(headers, where)
    return [*headers.check_vertices().warnings, *rounding_warnings(*headers.stored_models())]


def refuse(findings: Findings, config: StudyConfig, where: Path) -> None:
    """Raise InputError, as a run would, if the workers do not fit into this machine's memory."""
    if config.compute.ray == "local":
        refuse_too_large(findings.plan, where)


def _stored(name: str, header: Header) -> Stored:
    tensors = header.tensors.values()
    return Stored(
        name=name,
        folder=str(header.folder),
        tensors=len(tensors),
        parameters=sum(prod(tensor.shape) for tensor in tensors),
        dtypes=dict(Counter(tensor.dtype for tensor in tensors)),
        bytes=sum(tensor.nbytes for tensor in tensors),
        hashed=known_content(header) is not None,
    )


def _refuse_bad_function(config: StudyConfig, path: Path) -> None:
    """Raise InputError for a custom objective that cannot be imported."""
    if config.objective.function is not None:
        import_from(path.resolve().parent)
        ObjectiveFunction.load(config.objective.function)


def _refuse_unreadable_texts(config: StudyConfig) -> None:
    """Raise InputError for a data file whose first document can't be read; `check_contents` reads the others."""
    for name, data in config.corpora.items():
        section = "distributions" if name in config.distributions else "general"
        for part in ("validation", "held_out"):
            file, field = getattr(data, part), f"{section}.{name}.{part}"
            if file is not None and file.task is None and first_document(file, field) is None:
                raise InputError(str(file), field, None, "has no text; give at least one document that is not empty")


def _speed(config: StudyConfig, plan: Plan) -> Speed:
    """The speed that the study's ledger has measured, else this machine's, timed now."""
    if measured := _measured(config):
        low, middle, high = measured
        source = "measured by this study's earlier evaluations"
        return Speed(source, 0.0, 0.0, middle, low=low / middle, high=high / middle)
    return probe_speed(plan.machine.device, plan.calls.dtype, plan.widths.hidden, plan.widths.intermediate)


def _measured(config: StudyConfig) -> tuple[float, ...]:
    """Quantiles of the seconds per forward token in the study's evaluations so far; () without any."""
    if not is_there(config.storage):
        return ()
    with opened(config.storage) as engine:
        if not Ledger.is_in(engine):
            return ()
        ledger = Ledger(engine)
        row = ledger.study(config.name)
        if row is None:
            return ()
        return ledger.seconds_per_token(StudyIdentity.recall(row.identity, row.scoring).scoring)


def _tracking(uri: str) -> tuple[str, list[str]]:
    """MLflow's state in words, and a warning if it cannot be reached: a study runs without it."""
    parts = urlsplit(uri)
    try:
        if parts.scheme in ("http", "https"):
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=KNOCK).close()
            return "a server listens there", []
        return probe(uri, "tracking.uri"), []
    except (InputError, OSError, ValueError) as error:
        return "cannot be reached", [f"MLflow cannot be reached; a study would run without it ({masked(str(error))})"]


def _about(seconds: float, limits: tuple[float, float], speed: Speed) -> str:
    """An estimate in words, with its range and where it comes from."""
    low, high = map(duration, limits)
    return f"about {duration(seconds)}, {low} to {high} ({speed.source})"


def duration(seconds: float) -> str:
    """Seconds in words, in the largest unit of which there are at least two."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "a second"


def _export_bytes(files: CheckedHeaders) -> int:
    """Bytes of a composite on disk: all of the base's tensors."""
    return files.headers["base"].nbytes


def _result(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())
