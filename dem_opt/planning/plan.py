"""What a study will need: bytes, passes, minutes.

Arithmetic on headers, config.json and the study file; nothing is loaded.  It follows what merged model, perplexity and
worker do, so it changes when they do.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dem_opt.checkpoints.architecture import Architecture
from dem_opt.checkpoints.files import DTYPES, Header, known_content
from dem_opt.config import ComputeSection, StudyConfig
from dem_opt.errors import InputError
from dem_opt.evaluation.interim_analyses import windows_by_analysis
from dem_opt.planning.activations import Widths, activation_bytes, flops_per_token, gradient_bytes, read_widths
from dem_opt.planning.hardware import Machine, Speed
from dem_opt.planning.weights import fetched_bytes, held_bytes, reduced_bytes, streamed_bytes

BATCH_TOKENS = 4096
"""Tokens in one forward call where the study says `batch: auto` and memory allows."""

PACE = 0.6
"""The share of a matrix product's speed that a whole forward pass reaches: five runs of benchmarks/plan.py (LOG.md)."""


@dataclass(frozen=True)
class Plan:
    """What a study will need.  Sizes are bytes, of one worker; on each of its GPUs, if it has several.

    stored        base and experts, as the merged model keeps them (also for coefficients that never use the base)
    live          the live model, in the evaluation's dtype
    scratch       what a merge sums in
    windows       tokens of all corpora, and the spec's own copy
    activations   the most that a forward call and its loss hold at once
    backward      the most that these and the way back hold at once, with the gradient of one parameter
    process       the process itself: on a CPU its libraries, on a GPU its context
    batch_tokens  tokens in one forward call at most, and call_tokens those of the largest that there is
    checkpoints   how many are stored; files of the same content once
    streamed      folders of those that stay in their files, because not all fit into the machine's whole memory
    asked         workers that the study asks for; auto is as many as there are GPUs for, one on a CPU
    gpus          GPUs of a worker: the sizes are then those of the one that holds most
    trial_tokens  tokens through the model for one composite on the search split
    composites    of the search split at most: base, trials and those of the final table
    reported      composites of the held-out split: those of the final table
    token_flops   floating-point operations for a token
    merge_bytes   bytes read and written by a merge of all checkpoints
    """

    machine: Machine
    widths: Widths
    dtype: str
    vectors: str
    window: int
    batch_tokens: int
    call_tokens: int
    checkpoints: int
    streamed: tuple[Path, ...]
    stored: int
    live: int
    scratch: int
    windows: int
    activations: int
    backward: int
    process: int
    asked: int
    gpus: int
    trial_tokens: int
    report_tokens: int
    trials: int
    composites: int
    reported: int
    token_flops: float
    merge_bytes: int

    @property
    def worker(self) -> int:
        """Bytes of one worker at its peak, on each of its GPUs."""
        return self.stored + self.live + self.scratch + self.windows + self.activations + self.process

    @property
    def gradients(self) -> bool:
        """Whether gradients fit into the whole memory of the machine, beside all else that the workers hold."""
        peak = self.worker - self.activations + max(self.activations, self.backward)
        return peak * (self.asked if self.machine.device == "cpu" else 1) <= self.machine.total

    @property
    def needed(self) -> int:
        """Bytes of the device: of all workers on a CPU, of one or its part on each GPU."""
        return self.worker * (self.asked if self.machine.device == "cpu" else 1)

    @property
    def fitting(self) -> int:
        """How many workers fit into the memory that is available: on GPUs at most as many as there are GPUs for."""
        here = self.machine.available // self.worker
        return here if self.machine.device == "cpu" else min(here, 1) * (self.machine.devices // self.gpus)

    @property
    def tokens(self) -> int:
        """Tokens through the model for the whole study, at most."""
        return self.composites * self.trial_tokens + self.reported * self.report_tokens

    def seconds(self, speed: Speed) -> float:
        """Seconds of merging and scoring for the whole study.

        Measured seconds for a token where there are any; else  tokens * FLOPs / (PACE speed) + merges * bytes /
        bandwidth .  Workers on GPUs divide it among them; those on a CPU divide the CPU.  A worker's GPUs merge at
        once and score in turn.  Proposals, loading and
        hashing come on top.
        """
        if speed.token_seconds is None:
            merges = self.composites + self.reported
            spent = self.tokens * self.token_flops / (PACE * speed.flops) + merges * self.merge_bytes / speed.bandwidth
        else:
            spent = self.tokens * speed.token_seconds
        return spent / (self.asked if self.machine.device == "cuda" else 1)


def make_plan(
    architecture: Architecture,
    headers: Mapping[str, Header],
    model: Mapping[str, Any],
    study: StudyConfig,
    machine: Machine,
) -> Plan:
    """The plan of a study whose checkpoints have these headers ("base" among them) and config.json.

    `batch: auto` is BATCH_TOKENS, halved until a worker fits into the machine's whole memory, so that it does not
    depend on what else runs there; never below one window.
    """
    base, given = headers["base"], study.evaluation
    dtype = evaluation_dtype(given.dtype, stored_dtype(base), machine.device)
    itemsize = _itemsize(dtype)
    widths, asked = read_widths(architecture, model), workers_asked(study.compute, machine)
    unlike = list({header_identity(header): header for header in headers.values()}.values())
    gpus = study.compute.gpus_per_worker if machine.device != "cpu" else 1
    split = architecture.split(gpus)
    shares = [[name for name in architecture.parameters if split.places[name] == number] for number in range(gpus)]
    every_held = [held_bytes(architecture, base, unlike, names, study, machine.device, itemsize) for names in shares]
    names, held = max(zip(shares, every_held, strict=True), key=lambda share: sum(share[1].values()))
    block = windows_by_analysis(max(given.windows, given.held_out))[0]

    def call_bytes(batch: int) -> int:
        return activation_bytes(widths, _rows(batch, given.window, block), given.window, itemsize, machine.device)

    share = machine.total // asked if machine.device == "cpu" else machine.total
    merge_bytes = held["stored"] + held["live"]
    least = _rows(given.window, given.window, block) * given.window
    streamed, held["stored"] = streamed_bytes(
        architecture, unlike, names, study, share - sum(held.values()) - call_bytes(least), held["stored"]
    )
    if machine.device != "cpu":
        held["scratch"] += len(streamed) * fetched_bytes(architecture, unlike)
    batch = _batch(study, share - sum(held.values()), call_bytes)
    rows, reduced = _rows(batch, given.window, block), reduced_bytes(architecture, itemsize, machine.device)
    kept = replace(widths, layers=-(-widths.layers * max(split.layers) // max(sum(split.layers), 1)))
    return Plan(
        machine=machine,
        widths=widths,
        dtype=dtype,
        vectors=given.vectors,
        window=given.window,
        batch_tokens=batch,
        checkpoints=len(unlike),
        streamed=streamed,
        **held,
        call_tokens=rows * given.window,
        activations=call_bytes(batch),
        backward=gradient_bytes(kept, rows, given.window, itemsize, machine.device) + reduced,
        asked=asked,
        gpus=gpus,
        trial_tokens=len(study.corpora) * given.windows * given.window,
        report_tokens=len(study.corpora) * given.held_out * given.window,
        **_passes(study),
        token_flops=flops_per_token(architecture, model, widths, given.window),
        merge_bytes=merge_bytes,
    )


def refuse_too_large(plan: Plan, where: object) -> None:
    """Raise InputError with the plan's sums where the workers asked for don't fit into the memory available.

    Also where a worker asks for more GPUs than there are.
    """
    if not plan.asked:
        mend = f"this machine has {plan.machine.devices} GPUs: write at most so many"
        raise InputError(where, "compute.gpus_per_worker", plan.gpus, mend)
    if plan.needed <= plan.machine.available:
        return
    parts = f"{plan.checkpoints} checkpoints {sized(plan.stored)}, live model {sized(plan.live)}, "
    parts += f"activations {sized(plan.activations)}, the rest {sized(plan.scratch + plan.windows + plan.process)}"
    mends = ["fewer distributions"]
    if plan.dtype == "float32":
        mends.insert(0, "evaluation.dtype bfloat16")
    if plan.vectors == "exact" and plan.checkpoints > 1:
        mends.insert(-1, "evaluation.vectors int8")
    if plan.needed - plan.machine.available < plan.activations and plan.call_tokens > plan.window:
        mends.insert(0, "a smaller evaluation.batch")
    if plan.machine.device == "cpu" and plan.asked > 1:
        mends.insert(0, "fewer workers")
    if plan.machine.device != "cpu" and plan.machine.devices >= 2 * plan.gpus:
        mends.insert(0, f"compute.gpus_per_worker {2 * plan.gpus}")
    on_each = f" on each of {plan.gpus} GPUs" if plan.gpus > 1 else ""
    mend = (
        f"{plan.asked} x {sized(plan.worker)}{on_each} are needed ({parts}), {sized(plan.machine.available)} of "
        f"{sized(plan.machine.total)} are available; what would help: {', '.join(mends)}"
    )
    raise InputError(where, "compute.workers", plan.asked, mend)


def header_identity(header: Header) -> str:
    """What makes a checkpoint another one: its content where that is known already, else its folder."""
    return known_content(header) or str(header.folder.resolve())


def stored_dtype(base: Header) -> str:
    """What most of the base's tensors are, as torch names the dtype."""
    counts = Counter(tensor.dtype for tensor in base.tensors.values())
    return str(DTYPES[counts.most_common(1)[0][0]]).removeprefix("torch.")


def evaluation_dtype(setting: str, stored: str, device: str) -> str:
    """The evaluation's: auto is float32 on CPU (bfloat16 is about three times slower there), else the base's."""
    if setting != "auto":
        return setting
    return "float32" if device == "cpu" else stored


def workers_asked(setting: ComputeSection, machine: Machine) -> int:
    """Workers of this machine, as the pool counts them: auto is as many as there are GPUs for, without GPUs one."""
    if not isinstance(setting.workers, str):
        return setting.workers
    return machine.devices // setting.gpus_per_worker if machine.device == "cuda" else 1


def sized(count: float) -> str:
    """Bytes for people: GB (1e9 bytes), MB or kB, the largest of which there is a tenth."""
    for size, unit in ((10**9, "GB"), (10**6, "MB")):
        if count >= size / 10:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1000:,.1f} kB"


def _itemsize(dtype: str) -> int:
    """Bytes of a number of the evaluation."""
    size: int = getattr(torch, dtype).itemsize
    return size


def _rows(batch: int, window: int, block: int) -> int:
    """Windows in one forward call, at most those of a block: the first is as large as any."""
    return min(max(1, batch // window), block)


def _batch(study: StudyConfig, free: int, needs: Callable[[int], int]) -> int:
    """Tokens in one forward call at most; auto halves them until what they need fits into `free` bytes."""
    given, window = study.evaluation.batch, study.evaluation.window
    if not isinstance(given, str):
        return given
    batch = BATCH_TOKENS
    while batch // 2 >= window and needs(batch) > free:
        batch //= 2
    return batch


def _passes(study: StudyConfig) -> dict[str, int]:
    """Trials, composites of the search split, composites of the held-out split.

    The final table has base, single fine-tunes, their uniform average and the best.  The Gaussian process begins with
    singles and average, the grid has the singles.  Both splits have the best without each of its distributions too;
    of two distributions these are the singles.
    """
    space, search = study.space, study.search
    few = space.dimension == 1
    trials = search.trials if not few else 1
    if search.algorithm == "grid":
        trials = space.lattice_size(search.divisions)
    singles, average = len(space.names), 0 if few else 1
    extra = {"grid": average, "simplex-gp": max(singles + average - trials, 0)}.get(search.algorithm, singles + average)
    without = singles if singles > 2 else 0
    reported = 1 + singles + average + 1 + without
    return {"trials": trials, "composites": 1 + trials + extra + without, "reported": reported}
