"""Predict what a study needs: bytes, forward passes, minutes.

Arithmetic on headers, config.json and the study file; nothing is loaded.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from dem_opt.checkpoints.architecture import Architecture
from dem_opt.checkpoints.files import DTYPES, Header, known_content
from dem_opt.config import ComputeSection, StudyConfig
from dem_opt.errors import InputError
from dem_opt.evaluation.interim_analyses import windows_by_analysis
from dem_opt.merging.merged_model import inner_products_bytes
from dem_opt.planning.activations import Widths, activation_bytes, flops_per_token, gradient_bytes, read_widths
from dem_opt.planning.hardware import Machine, Speed
from dem_opt.planning.memory import Memory, choose_streamed, device_bytes, streaming_bytes

BATCH_TOKENS = 4096
"""Tokens of a forward call where the study says `batch: auto` and memory allows it."""

PACE = 0.6
"""Share of a matrix product's speed that a whole forward pass reaches: five runs of benchmarks/plan.py (dev/LOG.md)."""

LEAST_PACE, MOST_PACE = 0.37, 1.13
"""The lowest and the highest of them: the error of seconds that follow from a matrix product, besides the product's."""


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Forward calls of an evaluation.

    Attributes:
        dtype: Of the merged model and its activations.
        vectors: "exact" or "int8".
        window: Tokens of a window.
        batch_tokens: Most tokens of a forward call.
        call_tokens: Tokens of the largest call that there is: at most one block of windows between interim analyses.
    """

    dtype: str
    vectors: str
    window: int
    batch_tokens: int
    call_tokens: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """Merges and forward passes of a study, at most.

    Attributes:
        trials: Trials of the search.
        composites: Composites scored on the search split: base, trials and those of the results table.
        reported: Composites scored on the held-out split: those of the results table.
        trial_tokens: Forward tokens of one composite on the search split.
        report_tokens: Forward tokens of one composite on the held-out split.
        token_flops: Floating-point operations of a forward token.
        merge_bytes: Bytes read and written by a merge of all checkpoints.
    """

    trials: int
    composites: int
    reported: int
    trial_tokens: int
    report_tokens: int
    token_flops: float
    merge_bytes: int

    @property
    def tokens(self) -> int:
        """Forward tokens of the whole study."""
        return self.composites * self.trial_tokens + self.reported * self.report_tokens

    def seconds(self, speed: Speed) -> float:
        """Seconds of merging and scoring on one worker: measured seconds a token where there are any, else

        tokens * token_flops / (PACE * flops) + merges * merge_bytes / bandwidth .
        """
        if speed.token_seconds is not None:
            return self.tokens * speed.token_seconds
        merges = self.composites + self.reported
        return self.tokens * self.token_flops / (PACE * speed.flops) + merges * self.merge_bytes / speed.bandwidth


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Needs of a study on a machine.

    Attributes:
        machine: The machine.
        widths: The model's dimensions.
        checkpoints: Checkpoints and adapters; those of the same content count once.
        workers: Workers that the study asks for; "auto" is as many as there are GPUs for, one on a CPU.
        gpus_per_worker: GPUs of each; 1 on a CPU.
        calls: Forward calls.
        memory: Bytes of one worker.
        work: Merges and forward passes.
    """

    machine: Machine
    widths: Widths
    checkpoints: int
    workers: int
    gpus_per_worker: int
    calls: Calls
    memory: Memory
    work: Work

    @property
    def needed(self) -> int:
        """Bytes of a device: of all workers on a CPU, which they share; of one worker on each GPU."""
        return self.memory.peak * self._sharing

    @property
    def gradients_fit(self) -> bool:
        """True if gradients fit into the memory that is available, as workers without them have to."""
        return self.memory.gradient_peak * self._sharing <= self.machine.available

    @property
    def fitting(self) -> int:
        """Workers that fit into the memory that is available; on GPUs at most as many as there are GPUs for."""
        in_memory = self.machine.available // self.memory.peak
        on_gpus = self.machine.devices // self.gpus_per_worker
        return in_memory if self.machine.device == "cpu" else min(in_memory, 1) * on_gpus

    @property
    def _sharing(self) -> int:
        """Workers that share a device's memory."""
        return self.workers if self.machine.device == "cpu" else 1

    def seconds(self, speed: Speed) -> float:
        """Seconds of merging and scoring for the whole study; loading, hashing and proposals come on top.

        Workers on GPUs divide the work, those on a CPU the CPU.  A worker's GPUs merge at once and score in turn.
        """
        return self.work.seconds(speed) / self.parallel

    def seconds_range(self, work: Work, speed: Speed) -> tuple[float, float]:
        """Least and most seconds of some work: by the range of the speed, and of PACE where nothing was measured."""
        seconds = work.seconds(speed) / self.parallel
        fastest, slowest = (1.0, 1.0) if speed.token_seconds is not None else (PACE / MOST_PACE, PACE / LEAST_PACE)
        return seconds * speed.low * fastest, seconds * speed.high * slowest

    @property
    def parallel(self) -> int:
        """Workers that divide the work: those on GPUs."""
        return self.workers if self.machine.device == "cuda" else 1


def make_plan(
    architecture: Architecture,
    headers: Mapping[str, Header],
    model: Mapping[str, Any],
    study: StudyConfig,
    machine: Machine,
) -> Plan:
    """Plan a study.

    `batch: auto` is BATCH_TOKENS, halved until a worker fits into the machine's whole memory, so that scores do not
    depend on what else runs there; never below one window.

    Args:
        architecture: The base's.
        headers: Of the base, as "base", and of each distribution's checkpoint or adapter by name.
        model: The base's config.json.
        study: The study.
        machine: Where its workers live.
    """
    evaluation, base, device = study.evaluation, headers["base"], machine.device
    distinct = list({header_identity(header): header for header in headers.values()}.values())
    stored_as, widths = getattr(torch, stored_dtype(base)), read_widths(architecture, model)
    dtype: torch.dtype = getattr(torch, evaluation_dtype(evaluation.dtype, stored_dtype(base), device))
    workers, gpus = workers_asked(study.compute, machine), study.compute.gpus_per_worker if device != "cpu" else 1
    split = architecture.split(gpus)
    shares = [[name for name in architecture.parameters if split.places[name] == number] for number in range(gpus)]
    fullest = max(
        (device_bytes(architecture, distinct, names, study, device, dtype, stored_as) for names in shares),
        key=lambda share: share.total,
    )
    calls = _Sizes(
        widths=widths,
        window=evaluation.window,
        block=windows_by_analysis(max(evaluation.windows, evaluation.held_out))[0],
        itemsize=dtype.itemsize,
        device=device,
    )
    room = (machine.total // workers if device == "cpu" else machine.total) - fullest.total
    free = room - calls.activation_bytes(evaluation.window)
    saved = choose_streamed(architecture, distinct, fullest.model.checkpoints, study, free)
    fetched = len(saved) * streaming_bytes(architecture, distinct) if device != "cpu" else 0
    batch_tokens = _batch_tokens(study, room + sum(saved.values()) - fetched, calls)
    largest = max(architecture.sizes.values())
    layers = -(-widths.layers * max(split.layers) // max(sum(split.layers), 1))
    memory = Memory(
        stored=fullest.model.stored - sum(saved.values()),
        live=fullest.model.live,
        scratch=fullest.scratch + fetched,
        windows=fullest.windows,
        activations=calls.activation_bytes(batch_tokens),
        backward=calls.gradient_bytes(batch_tokens, layers) + inner_products_bytes(largest, dtype.itemsize, device),
        process=fullest.process,
        streamed=tuple(saved),
    )
    return Plan(
        machine=machine,
        widths=widths,
        checkpoints=len(distinct),
        workers=workers,
        gpus_per_worker=gpus,
        calls=Calls(
            dtype=str(dtype).removeprefix("torch."),
            vectors=evaluation.vectors,
            window=evaluation.window,
            batch_tokens=batch_tokens,
            call_tokens=calls.rows(batch_tokens) * evaluation.window,
        ),
        memory=memory,
        work=_work(
            study,
            token_flops=flops_per_token(architecture, model, widths, evaluation.window),
            merge_bytes=fullest.model.stored + fullest.model.live,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Bytes of forward calls by batch size; `block` windows lie between two interim analyses at most."""

    widths: Widths
    window: int
    block: int
    itemsize: int
    device: str

    def rows(self, batch_tokens: int) -> int:
        """Windows of the largest forward call: no call spans two blocks."""
        return min(max(1, batch_tokens // self.window), self.block)

    def activation_bytes(self, batch_tokens: int) -> int:
        """Bytes of a forward call and its loss."""
        return activation_bytes(self.widths, self.rows(batch_tokens), self.window, self.itemsize, self.device)

    def gradient_bytes(self, batch_tokens: int, layers: int) -> int:
        """Bytes of a forward call, its loss and the backward pass on a device with so many of the layers."""
        widths = replace(self.widths, layers=layers)
        return gradient_bytes(widths, self.rows(batch_tokens), self.window, self.itemsize, self.device)


def refuse_too_large(plan: Plan, where: Path) -> None:
    """Raise InputError, with the sums, if the workers do not fit into the available memory or GPUs."""
    if not plan.workers:
        mend = f"this machine has {plan.machine.devices} GPUs: write at most so many"
        raise InputError(where, "compute.gpus_per_worker", plan.gpus_per_worker, mend)
    if plan.needed <= plan.machine.available:
        return
    memory = plan.memory
    parts = f"{plan.checkpoints} checkpoints {sized(memory.stored)}, merged model {sized(memory.live)}, "
    parts += f"activations {sized(memory.activations)}, "
    parts += f"the rest {sized(memory.scratch + memory.windows + memory.process)}"
    on_each = f" on each of {plan.gpus_per_worker} GPUs" if plan.gpus_per_worker > 1 else ""
    mend = (
        f"{plan.workers} x {sized(memory.peak)}{on_each} are needed ({parts}), {sized(plan.machine.available)} of "
        f"{sized(plan.machine.total)} are available; what would help: {', '.join(_remedies(plan))}"
    )
    raise InputError(where, "compute.workers", plan.workers, mend)


def _remedies(plan: Plan) -> list[str]:
    """Changes of the study file that would save memory, those that cost least first."""
    on_cpu, shortage = plan.machine.device == "cpu", plan.needed - plan.machine.available
    smaller_batch = shortage < plan.memory.activations and plan.calls.call_tokens > plan.calls.window
    remedies = {
        f"compute.gpus_per_worker {2 * plan.gpus_per_worker}": not on_cpu
        and plan.machine.devices >= 2 * plan.gpus_per_worker,
        "fewer workers": on_cpu and plan.workers > 1,
        "a smaller evaluation.batch": smaller_batch,
        "evaluation.dtype bfloat16": plan.calls.dtype == "float32",
        "evaluation.vectors int8": plan.calls.vectors == "exact" and plan.checkpoints > 1,
        "fewer distributions": True,
    }
    return [remedy for remedy, helps in remedies.items() if helps]


def header_identity(header: Header) -> str:
    """Tell checkpoints apart: by content where it is known already, else by folder."""
    return known_content(header) or str(header.folder.resolve())


def stored_dtype(base: Header) -> str:
    """Torch's name of the dtype that most of the base's tensors are stored in."""
    counts = Counter(tensor.dtype for tensor in base.tensors.values())
    return str(DTYPES[counts.most_common(1)[0][0]]).removeprefix("torch.")


def evaluation_dtype(setting: str, stored: str, device: str) -> str:
    """Torch's name of the evaluation's dtype; auto is the base's on GPUs, and float32 on CPUs.

    There bfloat16 is about three times slower.
    """
    if setting != "auto":
        return setting
    return "float32" if device == "cpu" else stored


def workers_asked(setting: ComputeSection, machine: Machine) -> int:
    """Workers that a study asks for; auto is as many as there are GPUs for, one without GPUs."""
    if not isinstance(setting.workers, str):
        return setting.workers
    return machine.devices // setting.gpus_per_worker if machine.device == "cuda" else 1


def sized(count: float) -> str:
    """Format bytes in GB (1e9 bytes), MB or kB: the largest unit of which there is a tenth."""
    for size, unit in ((10**9, "GB"), (10**6, "MB")):
        if count >= size / 10:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1000:,.1f} kB"


def _batch_tokens(study: StudyConfig, free: int, calls: _Sizes) -> int:
    """Most tokens of a forward call; auto halves them until its activations fit into `free` bytes."""
    setting, window = study.evaluation.batch, study.evaluation.window
    if not isinstance(setting, str):
        return setting
    batch_tokens = BATCH_TOKENS
    while batch_tokens // 2 >= window and calls.activation_bytes(batch_tokens) > free:
        batch_tokens //= 2
    return batch_tokens


def _work(study: StudyConfig, *, token_flops: float, merge_bytes: int) -> Work:
    """Count trials and composites.

    The final table has base, single fine-tunes, their uniform average and the best.  The Gaussian process begins with
    singles and average, where it has gradients with the average alone; the grid has the singles.  Where the report asks
    for them, the held-out split has the next best composites too, and both splits have the best without each of its
    distributions.  The price of the sum takes three composites with other sums.  A gradient of coefficients by group
    counts as the passes that it takes.
    """
    space, search, evaluation = study.space, study.search, study.evaluation
    is_point = space.dimension == 1
    trials = study.planned_trials(search.algorithm)
    singles, average = len(space.names), 0 if is_point else 1
    price = price_count(study)
    begun = average if study.measures_gradients(fits=True) else singles + average
    searched = {"grid": singles, "simplex-gp": min(begun, trials)}.get(search.algorithm, 0)
    extra = singles + average - searched
    without = left_out_count(study)
    return Work(
        trials=trials,
        composites=1 + trials + extra + without + price + group_forwards(study),
        reported=1 + singles + average + max(study.report.top, 1) + without + (1 if group_forwards(study) else 0),
        trial_tokens=len(study.corpora) * evaluation.windows * evaluation.window,
        report_tokens=len(study.corpora) * evaluation.held_out * evaluation.window,
        token_flops=token_flops,
        merge_bytes=merge_bytes,
    )


def group_forwards(study: StudyConfig) -> int:
    """Forward-equivalents of coefficients by group at most; 0 for a study without groups."""
    return 0 if study.coefficients.groups == "global" or study.space.is_point else ceil(study.coefficients.forwards)


def left_out_count(study: StudyConfig) -> int:
    """Composites of leave-one-out that no search has scored; of two distributions these are the singles."""
    singles = len(study.space.names)
    return singles if study.report.leave_one_out and singles > 2 else 0


def price_count(study: StudyConfig) -> int:
    """Composites with other sums of coefficients that a run scores at most.

    The sum of all vectors, and where the search is bound to a sum, two in the winner's proportions.
    """
    if study.space.dimension == 1:
        return 0
    return 1 if study.space.is_point else 3
