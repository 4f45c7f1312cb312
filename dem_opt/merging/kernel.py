"""The merge kernel: the one place where weights are summed, in one pass over memory.

    out = cast( round( sum_n w_n x_n ) )

Every product and every sum is rounded to float32 on its own, in the order of the terms; the sum is rounded once to the
base's dtype, to the nearest value or stochastically (dither.py), then cast to the evaluation's.  Three backends compute
it, with the same bits: kernel.cpp on CPUs, a kernel made by torch's compiler on GPUs, and torch's own operations where
neither can be compiled, or where sums are rounded stochastically on a GPU.

Shape suffixes: P flat elements of a segment, N terms.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from dem_opt.merging.compiled import Run, Term, compiled_kernel, expected_compiled_kernel
from dem_opt.merging.dither import Dither, States, rounded_stochastically
from dem_opt.merging.int8 import Int8Vector
from dem_opt.simplex import UNIT

CPU_BLOCK = 2**18
"""Elements that a thread merges at once in torch operations: few enough for the float32 scratch to stay in the caches,
enough for the cost of starting operations, which the threads do in turn, not to matter."""

CPU_THREADS = 4
"""Most threads of a merge in torch operations: more wait for the interpreter's lock, and each has its own scratch."""

DEVICE_BLOCK = 2**24
"""Elements merged at once in torch operations on a GPU: enough to hide the time of launching kernels."""

_STATES_SHARE = 8
"""Blocks are smaller by this where sums are rounded stochastically, so that states fit into the same scratch."""

# A kernel made by torch's compiler indexes with 32 bits up to 2**31 elements, and more slowly with 64 bits beyond.
_COMPILED_BLOCK = 2**30

_RECOMPILE_LIMIT = 256

# kernel.cpp's number of each dtype that it reads.
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float16: 3}

# kernel.cpp's pairs of the dtype that sums are rounded to and the one that is written; bfloat16 and float16 never meet.
_ROUNDINGS = (
    *({torch.float32}, {torch.bfloat16}, {torch.float16}),
    *({torch.float32, torch.bfloat16}, {torch.float32, torch.float16}),
)

_BY_TORCH = "the merge kernel is compiled by torch"

Values = Tensor | Int8Vector
Terms = Sequence[tuple[int, Values]]


@dataclass(frozen=True)
class Backend:
    """Backend of merges on a kind of device.

    Attributes:
        description: One clause for users.
        seconds: Time that compiling or loading took in this process; 0 on GPUs, where the first merge compiles.
    """

    description: str
    seconds: float = 0.0


def merge_backend(device: torch.device | str) -> Backend:
    """Compile or load the kernel for a device, compare it with torch's operations, and describe the backend in use."""
    kind = torch.device(device).type
    if kind != "cpu":
        works = _is_trusted(kind)
        return Backend(_BY_TORCH if works else _rejected())
    kernel = compiled_kernel()
    description = kernel.description if kernel.merge is None or _is_trusted(kind) else _rejected()
    return Backend(description, kernel.seconds)


def expected_backend(device: torch.device | str) -> Backend:
    """Describe the backend that merges will use, as far as it is known before anything is compiled."""
    on_cpu = torch.device(device).type == "cpu"
    return Backend(expected_compiled_kernel() if on_cpu else f"{_BY_TORCH} at first use")


def _rejected() -> str:
    return "the compiled merge kernel fails or its bits differ from those of torch's operations, and is not used"


class MergeKernel:
    """Weighted sums of flat tensors on one device.

    Products and sums are rounded separately, in the order of the terms.  `add_(x, alpha=w)` may fuse them in its
    vectorized loop and not in the loop's tail, so that a weight's bits would depend on its position, on blocks and on
    threads.  A compiled kernel is used only after its bits were compared with those of torch's operations, once in a
    process.
    """

    def __init__(self, device: torch.device | str = "cpu", block: int | None = None, compiled: bool = True) -> None:
        """Compile the kernel on first use in this process.

        Args:
            device: Where all tensors of a merge lie.
            block: Elements merged at once in torch operations; CPU_BLOCK or DEVICE_BLOCK by default.
            compiled: False to use torch operations only.
        """
        self._device = torch.device(device)
        self.block = block or (CPU_BLOCK if self._device.type == "cpu" else DEVICE_BLOCK)
        self.compiled = compiled and _is_trusted(self._device.type)

    @staticmethod
    def memory_bytes(device: str, itemsize: int, threads: int = CPU_THREADS) -> int:
        """Scratch of a merge in torch operations, which `_merge_stripe` allocates for each thread.

        Sum and term in float32 and the sum rounded to the base's dtype, of `itemsize` bytes an element.
        """
        elements = CPU_BLOCK * threads if device == "cpu" else DEVICE_BLOCK
        return elements * (2 * 4 + itemsize)

    def merge(
        self,
        out_P: Tensor,
        terms: Terms,
        dtype: torch.dtype,
        keeps_single: bool = True,
        states: States | None = None,
    ) -> None:
        """Write  sum_n (units_n / 1e9) x_n , rounded to `dtype` and cast to the dtype of `out_P`.

        A single term of coefficient 1 is copied, which keeps its bits even where the processor flushes denormal numbers
        to zero.

        Args:
            out_P: Flat output.
            terms: Units of 1e-9 and values, summed in this order; coefficients are rounded to float32.
            dtype: The base's dtype.
            keeps_single: A single term of coefficient 1 is not rounded to `dtype`: the model is a checkpoint as it is.
            states: Of the elements, for stochastic rounding; None rounds to the nearest value.
        """
        states = None if dtype == torch.float32 else states
        if _is_copy(terms, keeps_single, dtype, states):
            (_, x_P), *_ = terms
            assert isinstance(x_P, Tensor)
            out_P.copy_(x_P if keeps_single else x_P.to(dtype))
            return
        weights, values = [units / UNIT for units, _ in terms], [x for _, x in terms]
        if self._is_for_kernel_cpp(out_P, values, dtype, states):
            _merge_by_kernel_cpp(out_P, [(len(out_P), terms)], dtype, states)
            return
        weights_N1 = torch.split(torch.tensor(weights, dtype=torch.float32, device=out_P.device), 1)
        block = self.block if states is None else -(-self.block // _STATES_SHARE)
        on_cpu, whole = self._device.type == "cpu", all(isinstance(x, Tensor) for x in values)
        if self.compiled and not on_cpu and whole and states is None:
            _merge_on_device(out_P, weights_N1, values, dtype)
        elif on_cpu and len(out_P) > block:
            _merge_in_threads(out_P, weights_N1, values, dtype, block, states)
        else:
            _merge_stripe(out_P, weights_N1, values, dtype, block, states)

    def merge_runs(
        self,
        out_P: Tensor,
        runs: Sequence[tuple[slice, Terms]],
        dtype: torch.dtype,
        keeps_single: bool = True,
        states: Dither | None = None,
    ) -> None:
        """Merge runs of neighbouring elements with terms of their own, in one pass where there is a compiled kernel.

        Args:
            out_P: Flat output.
            runs: Slices that follow each other, with their terms, whose values are as long as the output.
            dtype: The base's dtype.
            keeps_single: See `merge`.
            states: See `merge`.
        """
        values = {id(x): x for _, terms in runs for _, x in terms}
        if len(runs) == 1 or not self._is_for_kernel_cpp(out_P, list(values.values()), dtype, states):
            copied = runs
        else:
            are_copies = [_is_copy(terms, keeps_single, dtype, states) for _, terms in runs]
            copied = [run for run, is_copy in zip(runs, are_copies, strict=True) if is_copy]
            summed = [
                (part.stop, () if is_copy else terms) for (part, terms), is_copy in zip(runs, are_copies, strict=True)
            ]
            _merge_by_kernel_cpp(out_P, summed, dtype, None if dtype == torch.float32 else states)
        for part, terms in copied:
            own = states.within(part) if states is not None else None
            self.merge(out_P[part], _within(terms, part, len(out_P)), dtype, keeps_single, own)

    def _is_for_kernel_cpp(
        self, out_P: Tensor, values: Sequence[Values], dtype: torch.dtype, states: States | None
    ) -> bool:
        """Return whether kernel.cpp is trusted, and compiled for these stored, rounded and written dtypes."""
        stored = {(x.values_P if isinstance(x, Int8Vector) else x).dtype for x in values}
        on_cpu = self.compiled and self._device.type == "cpu"
        in_order = states is None or isinstance(states, Dither)
        return on_cpu and in_order and stored <= _TYPES.keys() and {dtype, out_P.dtype} in _ROUNDINGS


def _is_copy(terms: Terms, keeps_single: bool, dtype: torch.dtype, states: States | None) -> bool:
    """True for a single term of coefficient 1, which is copied where it is not to be rounded stochastically."""
    if len(terms) != 1 or terms[0][0] != UNIT or not isinstance(terms[0][1], Tensor):
        return False
    return keeps_single or states is None or terms[0][1].dtype == dtype


def _within(terms: Terms, part: slice, size: int) -> Terms:
    """The part of each term's values; int8 vectors know the rows of a part that begins with one."""
    if part == slice(0, size):
        return terms
    return [(units, x.within(part) if isinstance(x, Int8Vector) else x[part]) for units, x in terms]


def _merge_stripe(
    out_P: Tensor,
    weights_N1: Sequence[Tensor],
    values: Sequence[Values],
    dtype: torch.dtype,
    block: int,
    states: States | None = None,
    stripe: int = 0,
    stripes: int = 1,
) -> None:
    """Merge every `stripes`th block in torch operations; weights are float32, so that every product is float32."""
    size = min(block, len(out_P))
    sum_P, term_P = torch.empty(2, size, dtype=torch.float32, device=out_P.device)
    direct = out_P.dtype == dtype == torch.float32  # the last sum needs no rounding: write it where it belongs
    for start in range(stripe * block, len(out_P), stripes * block):
        part = slice(start, start + block)
        into_P = out_P[part]
        left_P, right_P = sum_P[: len(into_P)], term_P[: len(into_P)]
        _multiply(values[0], weights_N1[0], part, left_P)
        for number, (weight_1, x) in enumerate(zip(weights_N1[1:], values[1:], strict=True), 2):
            _multiply(x, weight_1, part, right_P)
            torch.add(left_P, right_P, out=into_P if direct and number == len(values) else left_P)
        if states is not None:
            states_P = states.states_P(slice(start, start + len(left_P)), out_P.device)
            left_P = rounded_stochastically(left_P, dtype, states_P)
        if not direct or len(values) == 1:
            into_P.copy_(left_P.to(dtype))


def _multiply(x: Values, weight_1: Tensor, part: slice, out_P: Tensor) -> None:
    """out = w x  for a part of x.  Widening x first is faster than a product of two dtypes, with the same bits."""
    x_P, factor = x.scaled(weight_1, part) if isinstance(x, Int8Vector) else (x[part], weight_1)
    torch.mul(x_P if x_P.dtype == torch.float32 else out_P.copy_(x_P), factor, out=out_P)


def _merge_in_threads(
    out_P: Tensor,
    weights_N1: Sequence[Tensor],
    values: Sequence[Values],
    dtype: torch.dtype,
    block: int,
    states: States | None,
) -> None:
    """Merge stripes in Python threads, each with one torch thread, so that they wait for each other only at the end.

    Torch's own threads synchronize after every operation, which takes longer than merging a block.
    """
    threads = torch.get_num_threads()
    stripes = min(threads, CPU_THREADS)

    def work(stripe: int) -> None:
        with torch.no_grad():
            _merge_stripe(out_P, weights_N1, values, dtype, block, states, stripe, stripes)

    try:
        with ThreadPoolExecutor(stripes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, range(stripes)))
    finally:
        torch.set_num_threads(threads)  # `set_num_threads(1)` in a thread is also inherited by threads that start later


def _merge_by_kernel_cpp(
    out_P: Tensor, runs: Sequence[tuple[int, Terms]], dtype: torch.dtype, states: States | None = None
) -> None:
    """Merge runs of elements, each with its end and its terms, in one pass of kernel.cpp."""
    assert states is None or isinstance(states, Dither)
    merge = compiled_kernel().merge
    assert merge is not None and out_P.is_contiguous() and runs[-1][0] == len(out_P)
    listed = [term for _, terms in runs for term in terms]
    values = {id(x): _aligned(x) for _, x in listed}  # tensors that must live until the pass ends
    terms, spans, first = (Term * len(listed))(), (Run * len(runs))(), 0
    for term, (units, x) in zip(terms, listed, strict=True):
        x_P = values[id(x)]
        assert len(x_P) == len(out_P)
        scale = x.scale_R.data_ptr() if isinstance(x, Int8Vector) else None
        term.values, term.scale, term.type, term.weight = x_P.data_ptr(), scale, _TYPES[x_P.dtype], units / UNIT
    for span, (end, of_run) in zip(spans, runs, strict=True):
        span.end, span.first, span.count = end, first, len(of_run)
        first += len(of_run)
    starts_R = next((x.starts_R for _, x in listed if isinstance(x, Int8Vector)), None)
    rows = (None, 0) if starts_R is None else (starts_R.data_ptr(), len(starts_R))
    starts, shifts, count = None, None, 0
    if states is not None:
        starts, shifts, count = states.starts_S.data_ptr(), states.shifts_S.data_ptr(), len(states.starts_S)
    dtypes, threads = (_TYPES[dtype], _TYPES[out_P.dtype]), torch.get_num_threads()
    merge(terms, spans, len(runs), out_P.data_ptr(), *dtypes, *rows, starts, shifts, count, threads)


def _aligned(x: Values) -> Tensor:
    """Flat values as C++ needs them; a mapped file may begin at any byte."""
    x_P = (x.values_P if isinstance(x, Int8Vector) else x).contiguous()
    return x_P if x_P.data_ptr() % x_P.itemsize == 0 else x_P.clone()


def _merge_on_device(out_P: Tensor, weights_N1: Sequence[Tensor], values: Sequence[Values], dtype: torch.dtype) -> None:
    """Merge in one pass of a kernel that torch compiles for each number of terms and their dtypes."""
    for start in range(0, len(out_P), _COMPILED_BLOCK):
        part = slice(start, start + _COMPILED_BLOCK)
        _device_pass()(out_P[part], list(weights_N1), [x[part] for x in values if isinstance(x, Tensor)], dtype)


@functools.cache
def _device_pass() -> Callable[..., None]:
    """Compile the sum with torch's compiler.

    `emulate_precision_casts` also turns off the fusing of products and sums, so that the bits are those of eager mode.
    """
    # Private and process-wide, but older supported versions of torch.compile have no `recompile_limit`: composites of
    # 1 to N terms in several dtypes are as many compilations, and beyond the default of 8 `fullgraph` raises.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    return torch.compile(_weighted_sum, fullgraph=True, dynamic=True, options={"emulate_precision_casts": True})


def _weighted_sum(out_P: Tensor, weights_N1: Sequence[Tensor], values_NP: Sequence[Tensor], dtype: torch.dtype) -> None:
    """out = sum_n w_n x_n  as one expression, summed from the left."""
    sum_P = values_NP[0].float() * weights_N1[0]
    for weight_1, x_P in zip(weights_N1[1:], values_NP[1:], strict=True):
        sum_P = sum_P + x_P.float() * weight_1
    out_P.copy_(sum_P.to(dtype))


@functools.cache
def _is_trusted(kind: str) -> bool:
    """Return whether a kernel can be compiled for a kind of device and has the bits of torch's operations."""
    if kind == "cpu" and compiled_kernel().merge is None:
        return False
    try:
        return all(_agrees(kind, stored) for stored in (torch.float32, torch.bfloat16, torch.float16))
    except RuntimeError:  # torch's compiler found no C++ or Triton compiler, or failed
        return False


def _agrees(kind: str, stored: torch.dtype) -> bool:
    """Compare the bits of one random merge, long enough for a vectorized loop and a tail."""
    generator = torch.Generator().manual_seed(0)
    values: list[Values] = [torch.randn(4099, generator=generator).to(kind, stored) for _ in range(3)]
    units = [UNIT // 5, UNIT // 2, 3 * UNIT // 10]
    weights = [count / UNIT for count in units]
    weights_N1 = torch.split(torch.tensor(weights, dtype=torch.float32, device=kind), 1)
    merged_P, expected_P = torch.empty(2, 4099, dtype=torch.float32, device=kind)
    _merge_stripe(expected_P, weights_N1, values, stored, 4099)
    if kind != "cpu":
        _merge_on_device(merged_P, weights_N1, values, stored)
        return torch.equal(merged_P, expected_P)
    runs = [(4099, list(zip(units, values, strict=True)))]
    _merge_by_kernel_cpp(merged_P, runs, stored)
    if stored == torch.float32 or not torch.equal(merged_P, expected_P):
        return torch.equal(merged_P, expected_P)
    states = Dither.of([(0, "", 0), (1000, "x", 7)])
    _merge_stripe(expected_P, weights_N1, values, stored, 4099, states)
    _merge_by_kernel_cpp(merged_P, runs, stored, states)
    return torch.equal(merged_P, expected_P)
