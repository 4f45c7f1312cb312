"""Laws of the merge kernel: compiled, in threads and plain, the bits are those of sums rounded one at a time."""

import functools
import os
import stat
import subprocess
import sys
import tempfile
from time import time

import numpy as np
import pytest
import torch

from dem_opt.merging import compiled as compiled_module
from dem_opt.merging import kernel as kernel_module
from dem_opt.merging.compiled import UNUSED_SECONDS, CompiledKernel, compiled_kernel, expected_compiled_kernel
from dem_opt.merging.int8 import Int8Vector
from dem_opt.merging.kernel import CPU_BLOCK, Backend, MergeKernel, expected_backend, merge_backend
from dem_opt.simplex import UNIT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 15, 17, 1003, 2**20 + 2**17 + 3]
"""Shorter than a strip, with a tail, and longer than what a thread takes at once."""


def terms(elements, dtype, count=4, seed=1):
    """Values of all sizes with signed zeros, denormals and infinities beside each other, and odd coefficients."""
    generator = torch.Generator().manual_seed(seed)
    units = torch.randint(-UNIT, UNIT, (count,), generator=generator).tolist()
    units[-1] = UNIT - sum(units[:-1])
    values = [torch.randn(elements, generator=generator).to(dtype) for _ in units]
    for x in values:
        x[: elements // 7] *= 2.0**-120 if dtype != torch.float16 else 2.0**-12
        x[:3] = torch.tensor([-0.0, 1e-39, -0.0])[: len(x)]
    return list(zip(units, values, strict=True))


def run(kernel, parts, live=torch.float32, dtype=None):
    out = torch.full((len(parts[0][1]),), 7.0, dtype=live)
    kernel.merge(out, parts, dtype or parts[0][1].dtype)
    return out


def assert_same_bits(left, right):
    assert left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def expected(parts, live, dtype):
    """numpy's float32 arithmetic fuses nothing."""
    products = [np.float32(units / UNIT) * x.float().numpy() for units, x in parts]
    summed = functools.reduce(np.add, products)
    assert summed.dtype == np.float32
    return torch.from_numpy(summed).to(dtype).to(live)


@pytest.mark.parametrize("live", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [2, 3, 8, 11])
def test_products_and_sums_are_rounded_one_at_a_time(kernel, count, dtype, live):
    parts = terms(1003, dtype, count)
    assert_same_bits(run(kernel, parts, live), expected(parts, live, dtype))


@pytest.mark.parametrize("live", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_terms_of_several_dtypes_are_summed_in_their_order(kernel, dtype, live):
    parts = [term for group in zip(*(terms(515, stored) for stored in DTYPES), strict=True) for term in group]
    assert_same_bits(run(kernel, parts, live, dtype), expected(parts, live, dtype))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sizes_and_threads_change_no_bit(kernel, size, threads):
    parts, before = terms(size, torch.float32, 3), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_same_bits(run(kernel, parts), expected(parts, torch.float32, torch.float32))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 7, 64, 1000, 2**15])
def test_blocks_change_no_bit(dtype, block):
    parts = terms(1003, dtype)
    assert_same_bits(run(MergeKernel(block=block, compiled=False), parts), run(MergeKernel(), parts))


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [1, 5, 33, 900])
def test_a_value_does_not_depend_on_its_position(kernel, dtype, live, start):
    """Neither on that of what is read nor on that of what is written."""
    parts = terms(1003, dtype)
    shifted = [(units, x[start:]) for units, x in parts]
    whole, room = run(kernel, parts, live), torch.full((1003 + 9,), 7.0, dtype=live)
    assert_same_bits(run(kernel, shifted, live), whole[start:])
    kernel.merge(room[3 : 1003 + 3], parts, dtype)
    assert_same_bits(room[3 : 1003 + 3], whole)
    assert (room[:3] == 7).all() and (room[1003 + 3 :] == 7).all()


@pytest.mark.parametrize("live", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_have_the_bits_of_merges_of_their_own(kernel, dtype, live):
    """Runs shorter than a strip, across the tiles that threads take, of other numbers of terms, and of a copy."""
    size = 2**20 + 1003
    parts, more = terms(size, dtype, 3), terms(size, dtype, 9, seed=2)
    ends = [1, 17, 1000, 2**20 - 5, 2**20 + 5, size]
    of_runs = [parts, more[:1], more, parts[::-1], [(UNIT, parts[0][1])], more[2:5]]
    runs = [(slice(start, end), of_run) for start, end, of_run in zip([0, *ends], ends, of_runs, strict=False)]
    out, expected = torch.full((2, size), 7.0, dtype=live)
    kernel.merge_runs(out, runs, dtype, keeps_single=False)
    for part, of_run in runs:
        kernel.merge(expected[part], [(units, x[part]) for units, x in of_run], dtype, keeps_single=False)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("live", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_composite_is_rounded_to_the_stored_dtype_and_then_cast(kernel, dtype, live):
    """In float32: 1 * 0.5 + 0.00390625 * 0.5 = 0.501953125, which bfloat16 (8 bits) rounds to 0.5, the even one."""
    parts = [(UNIT // 2, torch.tensor([1.0], dtype=dtype)), (UNIT // 2, torch.tensor([2.0**-8], dtype=dtype))]
    assert run(kernel, parts, live).item() == (0.5 if torch.bfloat16 in (dtype, live) else 0.501953125)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_beyond_the_dtype_is_infinite_and_what_is_undefined_not_a_number(kernel, dtype):
    large = torch.full((33,), torch.finfo(dtype).max).to(dtype)
    assert run(kernel, [(2 * UNIT, large), (-UNIT, -large)]).isinf().all()
    assert run(kernel, [(UNIT, large / 0), (UNIT, -large / 0)], dtype).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_is_widened_and_what_lies_between_two_rounded_as_torch_does(kernel, dtype):
    """Bit patterns of all values but those that are no numbers; the middle between two and what lies beside it."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~every.isnan()]
    nothing = torch.full_like(every, -0.0)
    assert_same_bits(run(kernel, [(UNIT, every), (UNIT, nothing)], torch.float32), every.float())
    ordered = every.float().unique()
    ordered = ordered[ordered.isfinite()]
    middle = (ordered[1:].double() + ordered[:-1].double()).div(2).float()
    edge = torch.tensor([torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4)])
    points = torch.cat([middle, edge, -edge])
    beside = torch.cat([points, *(points.nextafter(torch.full_like(points, end)) for end in (-1e38, 1e38))])
    parts = [(UNIT, beside), (UNIT, torch.full_like(beside, -0.0))]
    assert_same_bits(run(kernel, parts, dtype, dtype), beside.to(dtype))
    assert_same_bits(run(kernel, parts, torch.float32, dtype), beside.to(dtype).float())


def quantized(lengths, seed):
    """Vectors of rows of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    values_P = torch.randint(-127, 128, (sum(lengths),), generator=generator, dtype=torch.int8)
    starts_R = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return Int8Vector(values_P, torch.rand(len(lengths), generator=generator), starts_R)


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_a_scaled_term_is_its_coefficient_times_its_rows_scale_times_q(kernel, count, dtype, live):
    lengths = [1, 2, 60, 64, 3000, 5, 1, 997]
    base = terms(sum(lengths), dtype, 1)[0][1]
    vectors = [(units, quantized(lengths, seed)) for seed, (units, _) in enumerate(terms(1, dtype, count))]
    factors = [(np.float32(units / UNIT) * x.scale_R.numpy()).repeat(lengths) for units, x in vectors]
    products = [factor * x.values_P.numpy().astype(np.float32) for factor, (_, x) in zip(factors, vectors, strict=True)]
    summed = torch.from_numpy(functools.reduce(np.add, [base.float().numpy(), *products]))
    assert_same_bits(run(kernel, [(UNIT, base), *vectors], live), summed.to(dtype).to(live))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("live", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [True, False])
def test_a_gpu_gives_the_bits_of_the_cpu(compiled, dtype, live):
    parts = terms(10**6 + 3, dtype)
    on_gpu = torch.empty(10**6 + 3, dtype=live, device="cuda")
    kernel = MergeKernel("cuda", compiled=compiled)
    assert kernel.compiled == compiled
    kernel.merge(on_gpu, [(units, x.cuda()) for units, x in parts], dtype)
    assert_same_bits(on_gpu.cpu(), run(MergeKernel(), parts, live))


def test_without_a_compiler_the_reason_is_told_and_merges_go_on():
    """In a process of its own, whose $CXX is not there."""
    code = (
        "import torch; from dem_opt.merging.kernel import MergeKernel, expected_backend, merge_backend\n"
        "kernel, out = MergeKernel(), torch.zeros(3)\n"
        "kernel.merge(out, [(5 * 10**8, torch.ones(3)), (5 * 10**8, torch.ones(3))], torch.float32)\n"
        "description = merge_backend('cpu').description; print(kernel.compiled, out.tolist(), description)\n"
        "assert expected_backend('cpu').description.startswith(description + '; ')"
    )
    environment = {"CXX": "no-such-compiler", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith("False [1.0, 1.0, 1.0] the merge kernel is not compiled")
    assert "no-such-compiler" in done.stdout


@pytest.fixture
def no_library(tmp_path, monkeypatch):
    """An empty cache folder, into which the kernel is compiled quickly."""
    if compiled_kernel().merge is None:
        pytest.skip(compiled_kernel().description)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled_module, "FLAGS", (*compiled_module.FLAGS, "-O0"))


@pytest.mark.usefixtures("no_library")
def test_a_compiled_kernel_is_found_again(tmp_path):
    before = expected_compiled_kernel()
    assert "at first use" in before and not any(tmp_path.iterdir())
    folder = tmp_path / "dem_opt"
    folder.mkdir()
    for name, age in (
        ("kernel-old.so", UNUSED_SECONDS + 60),
        ("kernel-young.so", UNUSED_SECONDS - 60),
        ("old.so", 1e9),
    ):
        (folder / name).touch()
        os.utime(folder / name, (time() - age,) * 2)
    first = compiled_kernel.__wrapped__()
    (made,) = {path.name for path in folder.iterdir()} - {"kernel-young.so", "old.so"}
    os.utime(folder / made, (0, 0))
    again = compiled_kernel.__wrapped__()
    assert (
        isinstance(first, CompiledKernel)
        and " compiled by" in first.description
        and "compiled before by" in again.description
    )
    assert len(list(folder.iterdir())) == 3 and (folder / made).stat().st_mtime > 0, "used again, so young again"
    assert expected_compiled_kernel() == expected_backend("cpu").description == again.description and expected_backend(
        "cuda"
    ).description.endswith("by torch at first use")


@pytest.fixture
def cache(no_library, tmp_path):
    """A compiled kernel in that folder."""
    compiled_kernel.__wrapped__()
    (library,) = (tmp_path / "dem_opt").glob("kernel-*.so")
    assert stat.S_IMODE(library.parent.stat().st_mode) == stat.S_IMODE(library.stat().st_mode) == 0o700
    return library


def truncate(library):
    """Another file of the same name: this process has mapped the old one."""
    content = library.read_bytes()
    library.unlink()
    library.write_bytes(content[:-100])
    library.chmod(0o700)


def link(library):
    elsewhere = library.with_name("elsewhere.so")
    library.rename(elsewhere)
    library.symlink_to(elsewhere)


@pytest.mark.parametrize("damage", [truncate, link, lambda library: library.chmod(0o777)])
def test_a_library_of_other_content_or_that_others_can_write_is_compiled_again(cache, damage):
    damage(cache)
    assert "at first use" in expected_compiled_kernel()
    kernel = compiled_kernel.__wrapped__()
    assert kernel.merge is not None and "was compiled by" in kernel.description
    assert "compiled before" in compiled_kernel.__wrapped__().description


NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


@pytest.mark.parametrize("mode", [0o777, pytest.param(0o770, marks=as_root)])
@pytest.mark.parametrize("depth", [0, 1], ids=["folder", "above"])
def test_a_folder_that_others_can_write_is_not_used(cache, depth, mode):
    folder = cache.parents[depth]
    if mode == 0o770:
        os.chown(folder, -1, NOBODY)
    folder.chmod(mode)
    before = sorted(cache.parent.iterdir())
    assert f"{folder} " in expected_compiled_kernel()
    kernel = compiled_kernel.__wrapped__()
    assert kernel.merge is not None and "for this process alone" in kernel.description
    assert f"{folder} " in kernel.description and sorted(cache.parent.iterdir()) == before


@as_root
@pytest.mark.parametrize("depth", [None, 0, 1], ids=["file", "folder", "above"])
def test_a_library_of_another_user_is_not_loaded(cache, depth):
    os.chown(cache if depth is None else cache.parents[depth], NOBODY, NOBODY)
    kernel = compiled_kernel.__wrapped__()
    assert kernel.merge is not None and "compiled before" not in kernel.description


@as_root
def test_without_any_private_folder_merges_run_in_torch(cache, monkeypatch):
    os.chown(cache.parent, NOBODY, NOBODY)
    cache.parents[1].chmod(0o777)
    monkeypatch.setattr(tempfile, "tempdir", str(cache.parents[1]))
    kernel = compiled_kernel.__wrapped__()
    assert kernel.merge is None and str(cache.parents[1]) in kernel.description


def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\n[ "$2" ] || exit 0\necho "a note" >&2; echo "fatal error: no such header" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    backend = compiled_kernel.__wrapped__()
    assert backend.merge is None and backend.description.endswith("fatal error: no such header")
    assert merge_backend("cpu") == Backend(compiled_kernel().description, compiled_kernel().seconds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scratch_is_counted_as_it_is_allocated(dtype):
    """Against torch's allocator during a merge of one block in torch operations, but for small coefficients."""
    parts, out = terms(CPU_BLOCK, dtype, 3), torch.zeros(CPU_BLOCK)
    kernel = MergeKernel(compiled=False)
    with torch.profiler.profile(profile_memory=True) as profile:
        kernel.merge(out, parts, dtype)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    counted = MergeKernel.memory_bytes("cpu", dtype.itemsize, threads=1)
    assert counted <= peak < counted + 4096


def test_the_limit_of_recompilations_can_be_raised():
    """torch._dynamo.config.recompile_limit is private: if this fails, torch has renamed it (see `_device_pass`)."""
    before = torch._dynamo.config.recompile_limit
    try:
        kernel_module._device_pass.__wrapped__()
        assert torch._dynamo.config.recompile_limit >= 256
    finally:
        torch._dynamo.config.recompile_limit = before
