"""The merge kernel: the one place where weights are summed, in one pass over memory."""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dem_opt.merging.compiled import Term, native, outlook
from dem_opt.merging.int8 import Int8Vector
from dem_opt.simplex import UNIT

CPU_BLOCK = 2**18
"""Elements that a thread merges at once where nothing is compiled: few enough that float32 scratch stays in caches,
and many, because threads take turns at starting operations."""

CPU_THREADS = 4
"""The most threads of such a merge: more would wait for each other, and each has scratch of its own."""

DEVICE_BLOCK = 2**24
"""Elements merged at once on a device where nothing is compiled: enough to hide the launching of kernels."""

_COMPILED_BLOCK = 2**30
"""Elements merged at once by a compiled kernel on a device: below 2**31."""

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float16: 3}
"""The dtypes that kernel.cpp knows, by its numbers."""

_ROUNDINGS = (
    *({torch.float32}, {torch.bfloat16}, {torch.float16}),
    *({torch.float32, torch.bfloat16}, {torch.float32, torch.float16}),
)
"""The dtypes that kernel.cpp rounds sums to and writes."""

_BY_TORCH = "the merge kernel is compiled by torch"

Values = Tensor | Int8Vector


class MergeKernel:
    """Weighted sums of flat tensors on one device.

    Multiplication and addition are rounded separately, in the order of the terms.  `add_(x, alpha=w)` may fuse them in
    its vector loop and not in the loop's tail, and then a weight's bits would depend on its position, on blocks and
    threads.  Compiled or not, the bits are the same: what a compiler made is tried against torch's own operations once.
    """

    def __init__(self, device: torch.device | str = "cpu", block: int | None = None, compiled: bool = True) -> None:
        """Compile the kernel unless that was done, or is not wanted.  `block` elements are merged at once without."""
        self._device = torch.device(device)
        self.block = block or (CPU_BLOCK if self._device.type == "cpu" else DEVICE_BLOCK)
        self.compiled = compiled and _is_trusted(self._device.type)

    def merge(self, out_P: Tensor, terms: Sequence[tuple[int, Values]], dtype: torch.dtype) -> None:
        """out = sum_n (units_n / 1e9) x_n  over flat tensors, rounded to `dtype`, cast to out's.

        Terms are (units of 1e-9, values), summed in the order given.  Coefficients are rounded to float32.  A single
        term is copied, which keeps its bits even where the processor flushes denormal numbers to zero.
        """
        if len(terms) == 1 and terms[0][0] == UNIT and isinstance(terms[0][1], Tensor):
            out_P.copy_(terms[0][1])
            return
        weights, values = [units / UNIT for units, _ in terms], [x for _, x in terms]
        if self.compiled and self._device.type == "cpu" and _knows(out_P, values, dtype):
            _merge_native(out_P, weights, values, dtype)
            return
        weights_N1 = torch.split(torch.tensor(weights, dtype=torch.float32, device=out_P.device), 1)
        if self.compiled and self._device.type != "cpu" and all(isinstance(x, Tensor) for x in values):
            _merge_on_device(out_P, weights_N1, values, dtype)
        elif self._device.type == "cpu" and len(out_P) > self.block:
            _merge_in_threads(out_P, weights_N1, values, dtype, self.block)
        else:
            _merge_stripe(out_P, weights_N1, values, dtype, self.block)


def told(device: torch.device | str) -> tuple[str, float]:
    """What merges on a device run as, for people, and the seconds that making it so took in this process."""
    kind = torch.device(device).type
    note = native().note if kind == "cpu" else _BY_TORCH
    if not _is_trusted(kind) and (kind != "cpu" or native().merge is not None):
        note = "the compiled merge kernel fails or gives other bits than torch's operations, and is not used"
    return note, native().seconds if kind == "cpu" else 0.0


def foretold(device: torch.device | str) -> str:
    """What merges on a device will run as, for people, as far as is known before anything is compiled or tried."""
    return outlook() if torch.device(device).type == "cpu" else f"{_BY_TORCH} at first use"


def _merge_stripe(
    out_P: Tensor,
    weights_N1: Sequence[Tensor],
    values: Sequence[Values],
    dtype: torch.dtype,
    block: int,
    stripe: int = 0,
    stripes: int = 1,
) -> None:
    """Every `stripes`th block in torch's operations.  A float32 weight makes every product float32."""
    size = min(block, len(out_P))
    sum_P, term_P = torch.empty(2, size, dtype=torch.float32, device=out_P.device)
    direct = out_P.dtype == dtype == torch.float32
    for start in range(stripe * block, len(out_P), stripes * block):
        part = slice(start, start + block)
        into_P = out_P[part]
        left_P, right_P = sum_P[: len(into_P)], term_P[: len(into_P)]
        _multiply(values[0], weights_N1[0], part, left_P)
        for number, (weight_1, x) in enumerate(zip(weights_N1[1:], values[1:], strict=True), 2):
            _multiply(x, weight_1, part, right_P)
            torch.add(left_P, right_P, out=into_P if direct and number == len(values) else left_P)
        if not direct or len(values) == 1:
            into_P.copy_(left_P.to(dtype))


def _multiply(x: Values, weight_1: Tensor, part: slice, out_P: Tensor) -> None:
    """out = w x  of a part.  Widening first is faster than multiplying numbers of two dtypes."""
    x_P, factor = x.scaled(weight_1, part) if isinstance(x, Int8Vector) else (x[part], weight_1)
    torch.mul(x_P if x_P.dtype == torch.float32 else out_P.copy_(x_P), factor, out=out_P)


def _merge_in_threads(
    out_P: Tensor, weights_N1: Sequence[Tensor], values: Sequence[Values], dtype: torch.dtype, block: int
) -> None:
    """Stripes in threads of Python, each with one thread of torch: so they wait for each other only at the end.

    Torch's own threads wait for each other after every operation, which takes longer than a block does.  What is set
    in a thread holds for that thread, and for those that begin later: so it is set back.
    """
    threads = torch.get_num_threads()
    stripes = min(threads, CPU_THREADS)

    def work(stripe: int) -> None:
        with torch.no_grad():
            _merge_stripe(out_P, weights_N1, values, dtype, block, stripe, stripes)

    try:
        with ThreadPoolExecutor(stripes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, range(stripes)))
    finally:
        torch.set_num_threads(threads)


def _knows(out_P: Tensor, values: Sequence[Values], dtype: torch.dtype) -> bool:
    """Whether kernel.cpp has a pass for these dtypes: all but to round to bfloat16 for float16, or the other way."""
    stored = {(x.values_P if isinstance(x, Int8Vector) else x).dtype for x in values}
    return stored <= _TYPES.keys() and {dtype, out_P.dtype} in _ROUNDINGS


def _merge_native(out_P: Tensor, weights: Sequence[float], values: Sequence[Values], dtype: torch.dtype) -> None:
    """The same in one pass of kernel.cpp."""
    merge = native().merge
    assert merge is not None and out_P.is_contiguous()
    terms, keep = (Term * len(values))(), []
    for term, weight, x in zip(terms, weights, values, strict=True):
        x_P = (x.values_P if isinstance(x, Int8Vector) else x).contiguous()
        x_P = x_P if x_P.data_ptr() % x_P.itemsize == 0 else x_P.clone()  # a mapped file may begin anywhere
        assert len(x_P) == len(out_P)
        keep.append(x_P)
        scale = x.scale_R.data_ptr() if isinstance(x, Int8Vector) else None
        term.values, term.scale, term.type, term.weight = x_P.data_ptr(), scale, _TYPES[x_P.dtype], weight
    starts_R = next((x.starts_R for x in values if isinstance(x, Int8Vector)), None)
    rows = (None, 0) if starts_R is None else (starts_R.data_ptr(), len(starts_R))
    threads = torch.get_num_threads()
    merge(terms, len(values), out_P.data_ptr(), _TYPES[dtype], _TYPES[out_P.dtype], len(out_P), *rows, threads)


def _merge_on_device(out_P: Tensor, weights_N1: Sequence[Tensor], values: Sequence[Values], dtype: torch.dtype) -> None:
    """The same in one pass of a kernel that torch compiles for each number of terms and their dtypes."""
    for start in range(0, len(out_P), _COMPILED_BLOCK):
        part = slice(start, start + _COMPILED_BLOCK)
        _device_pass()(out_P[part], list(weights_N1), [x[part] for x in values if isinstance(x, Tensor)], dtype)


@functools.cache
def _device_pass() -> Callable[..., None]:
    """Torch's compiler over the sum; emulating eager casts also turns off the fusing of products and sums."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    return torch.compile(_summed, fullgraph=True, dynamic=True, options={"emulate_precision_casts": True})


def _summed(out_P: Tensor, weights_N1: Sequence[Tensor], values_NP: Sequence[Tensor], dtype: torch.dtype) -> None:
    """out = sum_n w_n x_n  as one expression."""
    sum_P = values_NP[0].float() * weights_N1[0]
    for weight_1, x_P in zip(weights_N1[1:], values_NP[1:], strict=True):
        sum_P = sum_P + x_P.float() * weight_1
    out_P.copy_(sum_P.to(dtype))


@functools.cache
def _is_trusted(kind: str) -> bool:
    """Whether a compiled kernel is to be had on a kind of device, and gives the bits of torch's own operations."""
    if kind == "cpu" and native().merge is None:
        return False
    try:
        return all(_agrees(kind, stored) for stored in (torch.float32, torch.bfloat16, torch.float16))
    except RuntimeError:  # what torch's compiler raises where it has no compiler itself
        return False


def _agrees(kind: str, stored: torch.dtype) -> bool:
    """Whether both ways give the same bits of one random merge."""
    generator = torch.Generator().manual_seed(0)
    values: list[Values] = [torch.randn(4099, generator=generator).to(kind, stored) for _ in range(3)]
    weights = [0.2, 0.5, 0.3]
    weights_N1 = torch.split(torch.tensor(weights, dtype=torch.float32, device=kind), 1)
    found_P, expected_P = torch.empty(2, 4099, dtype=torch.float32, device=kind)
    _merge_stripe(expected_P, weights_N1, values, stored, 4099)
    if kind == "cpu":
        _merge_native(found_P, weights, values, stored)
    else:
        _merge_on_device(found_P, weights_N1, values, stored)
    return torch.equal(found_P, expected_P)
