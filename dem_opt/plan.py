"""What a study will need: bytes, passes, minutes.

Arithmetic on headers, config.json and the study file; nothing is loaded.  It follows what arena, perplexity and
resident do, so it changes when they do.  Shape suffixes as in records; H is the hidden width, I the intermediate one.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from dem_opt.arena import ALIGNMENT, CPU_BLOCK, DEVICE_BLOCK
from dem_opt.checkpoints import DTYPES, Header, known_content
from dem_opt.config import StudyConfig
from dem_opt.errors import InputError
from dem_opt.machine import Machine, Speed
from dem_opt.models import Architecture
from dem_opt.perplexity import ROWS

BATCH_TOKENS = 4096
"""Tokens in one forward call where the study says `batch: auto` and memory allows."""

PROCESS = 450 * 10**6
"""Bytes that Python, torch, transformers and Ray take in a resident's process before it loads (its RSS, on Linux)."""

CONTEXT = 600 * 10**6
"""Bytes that a process takes on a GPU before it stores anything: CUDA's context and the libraries' kernels.  Not
measured: a round number above what is usual."""

PACE = 0.6
"""The share of a matrix product's speed that a whole forward pass reaches: five runs of benchmarks/plan.py (LOG.md)."""

_INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim")
"""What configs call the width of their feed-forward maps."""

KEPT = 32 * 2**20
"""The C library gives freed tensors of at least so many bytes back to the system, and may keep smaller ones (glibc)."""

_WINDOW_BYTES = 41
"""Bytes of a token of a window: int64 ids, positions and targets, and the spec's own ids, positions and mask."""


@dataclass(frozen=True)
class Widths:
    """The dimensions of a transformer that its activations and FLOPs depend on.

    queries, keys    heads times the width of a head: of queries, of keys (and of values)
    materialized     whether attention scores are held as a matrix, which soft-capped attention does
    capped           whether logits are soft-capped, which makes a copy of them
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    queries: int
    keys: int
    materialized: bool
    capped: bool


@dataclass(frozen=True)
class Plan:
    """What a study will need.  Sizes are bytes, of one resident.

    stored        base and experts, as the arena keeps them (also for coefficients that never use the base)
    live          the live model, in the evaluation's dtype
    scratch       what a merge sums in
    windows       tokens of all corpora, and the spec's own copy
    activations   the most that a forward call and its loss hold at once
    process       the process itself: on a CPU its libraries, on a GPU its context
    batch_tokens  tokens in one forward call at most, and call_tokens those of the largest that there is
    checkpoints   how many are stored; files of the same content once
    asked         residents that the study asks for; auto is one for each GPU, one on a CPU
    trial_tokens  tokens through the model for one composite on the search split
    composites    of the search split at most: base, trials and those of the final table
    reported      composites of the held-out split: those of the final table
    token_flops   floating-point operations for a token
    merge_bytes   bytes read and written by a merge of all checkpoints
    """

    machine: Machine
    widths: Widths
    dtype: str
    window: int
    batch_tokens: int
    call_tokens: int
    checkpoints: int
    stored: int
    live: int
    scratch: int
    windows: int
    activations: int
    process: int
    asked: int
    trial_tokens: int
    report_tokens: int
    trials: int
    composites: int
    reported: int
    token_flops: float
    merge_bytes: int

    @property
    def resident(self) -> int:
        """Bytes of one resident at its peak."""
        return self.stored + self.live + self.scratch + self.windows + self.activations + self.process

    @property
    def needed(self) -> int:
        """Bytes of the device: of all residents on a CPU, of one on each GPU."""
        return self.resident * (self.asked if self.machine.device == "cpu" else 1)

    @property
    def fitting(self) -> int:
        """How many residents fit into the memory that is available: one to a GPU at most."""
        here = self.machine.available // self.resident
        return here if self.machine.device == "cpu" else min(here, 1) * self.machine.devices

    @property
    def tokens(self) -> int:
        """Tokens through the model for the whole study, at most."""
        return self.composites * self.trial_tokens + self.reported * self.report_tokens

    def seconds(self, speed: Speed) -> float:
        """Seconds of merging and scoring for the whole study.

        Measured seconds for a token where there are any; else  tokens * FLOPs / (PACE speed) + merges * bytes /
        bandwidth .  Residents on GPUs divide it among them; those on a CPU divide the CPU.  Proposals, loading and
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

    `batch: auto` is BATCH_TOKENS, halved until a resident fits into the machine's whole memory, so that it does not
    depend on what else runs there; never below one window.
    """
    base, given = headers["base"], study.evaluation
    dtype = evaluation_dtype(given.dtype, stored_dtype(base), machine.device)
    itemsize = _itemsize(dtype)
    widths, asked = read_widths(architecture, model), residents_asked(study.compute.residents, machine)
    unlike = list({identity(header): header for header in headers.values()}.values())
    held = _held(architecture, base, unlike, study, machine.device, itemsize)
    rows = max(given.windows, given.held_out)

    def call_bytes(rows: int) -> int:
        return activation_bytes(widths, rows, given.window, itemsize, machine.device)

    share = machine.total // asked if machine.device == "cpu" else machine.total
    free = share - sum(held.values())
    batch = _batch(study, free, lambda batch: call_bytes(_rows(batch, given.window, rows)))
    return Plan(
        machine=machine,
        widths=widths,
        dtype=dtype,
        window=given.window,
        batch_tokens=batch,
        checkpoints=len(unlike),
        **held,
        call_tokens=_rows(batch, given.window, rows) * given.window,
        activations=call_bytes(_rows(batch, given.window, rows)),
        asked=asked,
        trial_tokens=len(study.corpora) * given.windows * given.window,
        report_tokens=len(study.corpora) * given.held_out * given.window,
        **_passes(study),
        token_flops=flops_per_token(architecture, model, widths, given.window),
        merge_bytes=held["stored"] + held["live"],
    )


def refuse_too_large(plan: Plan, where: object) -> None:
    """Raise InputError with the plan's sums where the residents asked for don't fit into the memory available."""
    if plan.needed <= plan.machine.available:
        return
    parts = f"{plan.checkpoints} checkpoints {sized(plan.stored)}, live model {sized(plan.live)}, "
    parts += f"activations {sized(plan.activations)}, the rest {sized(plan.scratch + plan.windows + plan.process)}"
    mends = ["fewer distributions"]
    if plan.dtype == "float32":
        mends.insert(0, "evaluation.dtype bfloat16")
    if plan.needed - plan.machine.available < plan.activations and plan.call_tokens > plan.window:
        mends.insert(0, "a smaller evaluation.batch")
    if plan.machine.device == "cpu" and plan.asked > 1:
        mends.insert(0, "fewer residents")
    mend = (
        f"{plan.asked} x {sized(plan.resident)} are needed ({parts}), {sized(plan.machine.available)} of "
        f"{sized(plan.machine.total)} are available; what would help: {', '.join(mends)}"
    )
    raise InputError(where, "compute.residents", plan.asked, mend)


def identity(header: Header) -> str:
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


def residents_asked(setting: int | str, machine: Machine) -> int:
    """Residents of this machine, as the pool counts them: auto is one for each GPU, without GPUs one."""
    if not isinstance(setting, str):
        return setting
    return machine.devices if machine.device == "cuda" else 1


def read_widths(architecture: Architecture, model: Mapping[str, Any]) -> Widths:
    """Dimensions from the embedding's shape and from config.json, under the names that the common families use."""
    vocabulary, hidden = architecture.parameters[architecture.embedding]
    heads = int(_look(model, "num_attention_heads", "n_head", "num_heads", "decoder_attention_heads", default=1))
    width = int(_look(model, "head_dim", default=hidden // heads))
    groups = int(_look(model, "num_key_value_heads", default=heads))
    return Widths(
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=int(
            _look(model, "intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", default=4 * hidden)
        ),
        layers=int(_look(model, "num_hidden_layers", "n_layer", "num_layers", "decoder_layers", default=1)),
        heads=heads,
        queries=heads * width,
        keys=groups * width,
        materialized=_look(model, "attn_logit_softcapping", default=None) is not None,
        capped=_look(model, "final_logit_softcapping", default=None) is not None,
    )


def logits_bytes(widths: Widths, tokens: int, itemsize: int) -> int:
    """Bytes of the logits [B, T, V] of so many tokens; a soft-cap makes one copy."""
    return tokens * widths.vocabulary * itemsize * (2 if widths.capped else 1)


def activation_bytes(widths: Widths, rows: int, window: int, itemsize: int, device: str = "cpu") -> int:
    """The most bytes that a forward call on `rows` windows and its loss hold at once, in inference mode.

    The largest of three moments, for B T tokens:
    attention     embedding, layer's input, its norm (3H); q, its output twice (3Q), k and v (2K), where heads share
                  keys their expansion (2Q); the mask and its float copy [B, T, T]; the scores where they are held
    feed-forward  embedding, layer's input, residual, its norm (4H); gate, up and their product (3I)
    loss          the last hidden states (H); the logits [B, T, V]; ROWS of them in float32 and their log-softmax;
                  on a CPU also what the layers have freed and the allocator has kept
    """
    tokens, square = rows * window, rows * window**2
    hidden, inner = tokens * widths.hidden * itemsize, tokens * widths.intermediate * itemsize
    shared = 2 * widths.queries if widths.keys < widths.queries else 0
    attention = 3 * hidden + tokens * (3 * widths.queries + 2 * widths.keys + shared) * itemsize
    attention += square * (1 + itemsize)
    attention += square * widths.heads * (2 * itemsize + 4) if widths.materialized else 0
    kept = sum(count * size for count, size in ((4, hidden), (3, inner)) if device == "cpu" and size < KEPT)
    copies = 1 if itemsize == 4 else 2
    loss = hidden + logits_bytes(widths, tokens, itemsize) + copies * min(ROWS, tokens) * widths.vocabulary * 4 + kept
    return max(attention, 4 * hidden + 3 * inner, loss)


def flops_per_token(architecture: Architecture, model: Mapping[str, Any], widths: Widths, window: int) -> float:
    """2 P_active + 4 L T Q : a multiplication and an addition for each weight; scores and their sums over a window.

    P_active: the matrices, the embedding only where it is the output's too; of a mixture of experts the share that
    a token is sent to.
    """
    matrices = {name: prod(shape) for name, shape in architecture.parameters.items() if len(shape) > 1}
    if not architecture.aliases:
        del matrices[architecture.embedding]
    chosen = _look(model, "num_experts_per_tok", default=1)
    share = chosen / _look(model, "num_local_experts", "num_experts", "n_routed_experts", default=chosen)
    active = sum(size * (share if ".experts." in name else 1) for name, size in matrices.items())
    return 2 * active + 4 * widths.layers * window * widths.queries


def sized(count: float) -> str:
    """Bytes for people: GB (1e9 bytes), MB or kB, the largest of which there is a tenth."""
    for size, unit in ((10**9, "GB"), (10**6, "MB")):
        if count >= size / 10:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 1000:,.1f} kB"


def _held(
    architecture: Architecture,
    base: Header,
    unlike: Sequence[Header],
    study: StudyConfig,
    device: str,
    itemsize: int,
) -> dict[str, int]:
    """What a resident holds for life, in bytes, by field of the plan."""
    given, adapters = study.evaluation, sum(one.adapter for one in unlike)
    return {
        "stored": sum(_factored(one) if one.adapter else _flat(architecture, one) for one in unlike),
        "live": _flat(architecture, base, itemsize),
        "scratch": _scratch(base, itemsize, device) + _applied(architecture, adapters),
        "windows": _WINDOW_BYTES * len(study.corpora) * (given.windows + given.held_out) * given.window,
        "process": PROCESS if device == "cpu" else CONTEXT,
    }


def _flat(architecture: Architecture, header: Header, itemsize: int | None = None) -> int:
    """Bytes of a checkpoint in an arena's segments, tied weights once; in its own dtypes unless one is given."""
    layout = architecture.layout(header)
    return sum(
        -(-prod(shape) // ALIGNMENT) * ALIGNMENT * (itemsize or layout.dtype(header, name).itemsize)
        for name, shape in architecture.parameters.items()
    )


def _factored(adapter: Header) -> int:
    """Bytes of an adapter, which stays as it is stored."""
    return sum(one.end - one.start for one in adapter.tensors.values())


def _applied(architecture: Architecture, adapters: int) -> int:
    """Bytes while adapters are applied to the largest parameter: what each makes of it, product and sum in float32."""
    sizes = (prod(shape) for name, shape in architecture.parameters.items() if name != architecture.embedding)
    return (adapters + 2) * 4 * max(sizes, default=0) if adapters else 0


def _scratch(base: Header, itemsize: int, device: str) -> int:
    """Bytes of a merge kernel: two blocks in float32, and one that is rounded to the stored dtype."""
    stored = DTYPES[base.tensors[next(iter(base.tensors))].dtype].itemsize
    rounded = 0 if stored == itemsize == 4 else stored
    return (CPU_BLOCK if device == "cpu" else DEVICE_BLOCK) * (8 + rounded)


def _itemsize(dtype: str) -> int:
    """Bytes of a number of the evaluation."""
    size: int = getattr(torch, dtype).itemsize
    return size


def _rows(batch: int, window: int, windows: int) -> int:
    """Windows in one forward call."""
    return min(max(1, batch // window), windows)


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
    singles and average, the grid has the singles.
    """
    space, search = study.space, study.search
    few = space.dimension == 1
    trials = search.trials if not few else 1
    if search.algorithm == "grid":
        trials = space.lattice_size(search.divisions)
    singles, average = len(space.names), 0 if few else 1
    extra = {"grid": average, "simplex-gp": max(singles + average - trials, 0)}.get(search.algorithm, singles + average)
    return {"trials": trials, "composites": 1 + trials + extra, "reported": 1 + singles + average + 1}


def _look(model: Mapping[str, Any], *names: str, default: Any) -> Any:
    """The first of these that config.json has, at its top or for the text part of a model of several kinds."""
    text = model.get("text_config")
    for part in (model, text if isinstance(text, Mapping) else {}):
        for name in names:
            if part.get(name) is not None:
                return part[name]
    return default
