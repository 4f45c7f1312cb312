"""Laws of stochastic rounding: one of the two values beside a sum, right on average, the same bits everywhere."""

import math
from dataclasses import replace

import pytest
import torch
import zoo
from test_kernel import assert_same_bits, quantized, terms

from dem_opt.checkpoints.architecture import empty_model, read_architecture, stored_names
from dem_opt.checkpoints.files import content_hash, read_header
from dem_opt.merging.dither import Dither, ScatteredDither, rounded_stochastically, seed_of, thresholds
from dem_opt.merging.kernel import MergeKernel
from dem_opt.merging.merged_model import MergedModel
from dem_opt.merging.tensors import merged_tensors
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, StoredModel

NARROW = [torch.bfloat16, torch.float16]
LIVES = [(dtype, live) for dtype in NARROW for live in (torch.float32, dtype)]
STRETCHES = [(0, "a", 0), (64, "b", 0), (1000, "c", 5000), (1001, "a", 7)]


def merged(kernel, parts, dtype, live=torch.float32, states=None, keeps_single=True):
    out = torch.full((len(parts[0][1]),), 7.0, dtype=live)
    kernel.merge(out, parts, dtype, keeps_single, states)
    return out


def rounded(x, dtype, states=None):
    states = states or Dither.of([(0, "w", 0)])
    return rounded_stochastically(x, dtype, states.states_P(slice(0, len(x)), x.device))


def values(dtype, count=4096):
    """Float32 numbers of all sizes that the dtype has, its smallest ones included."""
    generator = torch.Generator().manual_seed(3)
    least = -24 if dtype == torch.float16 else -126
    exponents = torch.randint(least - 1, 15, (count,), generator=generator)
    return torch.randn(count, generator=generator) * 2.0**exponents


@pytest.mark.parametrize("dtype", NARROW)
def test_a_sum_goes_to_one_of_the_two_values_beside_it(dtype):
    x = values(dtype)
    nearest = x.to(dtype)
    step = torch.where(nearest.float() < x, torch.inf, -torch.inf).to(dtype)
    other = torch.where(nearest.float() == x, nearest, nearest.nextafter(step)).float()
    result = rounded(x, dtype)
    assert_same_bits(result, result.to(dtype).float())
    assert ((result == nearest.float()) | (result == other)).all()
    assert (result != nearest.float()).float().mean() > 0.1


@pytest.mark.parametrize("dtype", NARROW)
def test_values_that_the_dtype_has_stay(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    result = rounded(every, dtype)
    assert torch.equal(result.isnan(), every.isnan())
    kept = ~every.isnan()
    assert_same_bits(result[kept], every[kept])


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.001, -0.7123, 3.3e-5, -1e-6, 1234.5])
def test_it_is_right_on_average(dtype, value):
    """The mean of P results has a standard error of  step sqrt(p (1 - p) / P) ."""
    count = 2**20
    result = rounded(torch.full((count,), value), dtype).double()
    low, high = result.min(), result.max()
    share = (torch.tensor(value).double() - low) / (high - low)
    error = (high - low) * math.sqrt(share * (1 - share) / count)
    assert low < value < high
    assert abs(result.mean() - torch.tensor(value).double()) < 4 * error + 2.0**-15 * (high - low)


@pytest.mark.parametrize("dtype", NARROW)
def test_an_element_goes_up_once_as_its_coefficient_grows(dtype):
    base, fine_tune = torch.full((500,), 1.0), torch.full((500,), 1.0 + torch.finfo(dtype).eps)
    ways = torch.stack([rounded(base + w / 200 * (fine_tune - base), dtype) for w in range(201)])
    assert (ways.diff(dim=0) >= 0).all()
    assert torch.equal(ways[0], base) and torch.equal(ways[-1], fine_tune)
    share = (ways[100] > 1.0).float().mean()
    assert 0.35 < share < 0.65


def test_thresholds_of_neighbours_and_of_parameters_are_unrelated():
    """Over 2^16 places no bit is set much more often than not, nor agrees with its neighbour's or another name's."""
    places = torch.arange(2**16)
    one, other = (thresholds((places + seed_of(name)).int()) for name in ("layers.0.q", "layers.1.q"))
    for left, right in ((one, torch.zeros_like(one)), (one[1:], one[:-1]), (one, other)):
        for bit in range(16, 32):
            agree = ((left >> bit & 1) == (right >> bit & 1)).double().mean()
            assert abs(agree - 0.5) < 5 * 0.5 / 2**8


@pytest.mark.parametrize(("dtype", "live"), LIVES)
@pytest.mark.parametrize("count", [2, 8, 11])
def test_all_kernels_have_the_same_bits(kernel, dtype, live, count):
    parts, states = terms(1003, dtype, count), Dither.of(STRETCHES)
    sums = merged(MergeKernel(compiled=False), parts, torch.float32)
    expected = rounded(sums, dtype, states).to(live)
    assert_same_bits(merged(kernel, parts, dtype, live, states), expected)
    assert not torch.equal(expected, merged(kernel, parts, dtype, live))


@pytest.mark.parametrize(("dtype", "live"), LIVES)
def test_vectors_in_int8_are_rounded_alike(kernel, dtype, live):
    lengths, states = [1, 2, 60, 64, 3000, 5, 1, 997], Dither.of(STRETCHES)
    (_, base), (units, _) = terms(sum(lengths), dtype, 2)
    parts = [(UNIT, base), (units, quantized(lengths, 1)), (UNIT // 3, quantized(lengths, 2))]
    sums = merged(MergeKernel(compiled=False), parts, torch.float32)
    assert_same_bits(merged(kernel, parts, dtype, live, states), rounded(sums, dtype, states).to(live))


@pytest.mark.parametrize("size", [1, 15, 17, 2**20 + 2**17 + 3])
def test_sizes_change_no_bit(kernel, size):
    parts, states = terms(size, torch.bfloat16, 3), Dither.of([(0, "a", 3), (size // 2 + 1, "b", 0)])
    plain = merged(MergeKernel(block=size + 9, compiled=False), parts, torch.bfloat16, states=states)
    assert_same_bits(merged(kernel, parts, torch.bfloat16, states=states), plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("dtype", "live"), LIVES)
def test_a_gpu_has_the_bits_of_the_cpu(dtype, live):
    parts, states = terms(10**6 + 3, dtype), Dither.of([*STRETCHES, (5 * 10**5, "d", 0)])
    on_gpu = torch.empty(10**6 + 3, dtype=live, device="cuda")
    MergeKernel("cuda").merge(on_gpu, [(units, x.cuda()) for units, x in parts], dtype, states=states)
    assert_same_bits(on_gpu.cpu(), merged(MergeKernel(), parts, dtype, live, states))


@pytest.mark.parametrize("part", [slice(0, 3), slice(60, 70), slice(64, 1003), slice(999, 1002), slice(1002, 1003)])
def test_a_part_has_the_bits_of_the_whole(kernel, part):
    parts, states = terms(1003, torch.bfloat16), Dither.of(STRETCHES)
    whole = merged(kernel, parts, torch.bfloat16, states=states)
    shorter = [(units, x[part]) for units, x in parts]
    assert_same_bits(merged(kernel, shorter, torch.bfloat16, states=states.within(part)), whole[part])


def test_scattered_elements_have_the_bits_of_their_places(kernel):
    parts, order = terms(1003, torch.float16), torch.randperm(1003, generator=torch.Generator().manual_seed(1))
    whole = merged(kernel, parts, torch.float16, states=Dither.of([(0, "a", 0)]))
    scattered = [(units, x[order]) for units, x in parts]
    states = ScatteredDither(order.int(), seed_of("a"))
    assert_same_bits(merged(kernel, scattered, torch.float16, states=states), whole[order])
    assert_same_bits(
        merged(kernel, [(units, x[5:]) for units, x in scattered], torch.float16, states=states.within(slice(5, 1003))),
        whole[order][5:],
    )


@pytest.mark.parametrize("dtype", NARROW)
def test_runs_have_the_bits_of_single_merges(kernel, dtype):
    """Also where a run is a copy: of float32 values it is rounded, of values of the dtype not."""
    (_, first), (_, second) = terms(1003, torch.float32, 2)
    narrow = second.to(dtype)
    runs = [
        (slice(0, 100), [(UNIT // 4, first), (3 * UNIT // 4, narrow)]),
        (slice(100, 600), [(UNIT, first)]),
        (slice(600, 800), [(UNIT, narrow)]),
        (slice(800, 1003), [(UNIT // 3, narrow), (UNIT - UNIT // 3, first)]),
    ]
    states, out = Dither.of(STRETCHES), torch.empty(1003)
    kernel.merge_runs(out, runs, dtype, keeps_single=False, states=states)
    for part, row in runs:
        alone = [(units, x[part]) for units, x in row]
        assert_same_bits(out[part], merged(kernel, alone, dtype, states=states.within(part), keeps_single=False))
    assert_same_bits(out[100:600], rounded(first[100:600], dtype, states.within(slice(100, 600))))
    assert_same_bits(out[600:800], narrow[600:800].float())


def test_float32_composites_are_not_rounded(kernel):
    parts = terms(1003, torch.bfloat16)
    states = Dither.of(STRETCHES)
    exact = merged(kernel, parts, torch.float32)
    assert_same_bits(merged(kernel, parts, torch.float32, states=states), exact)


def test_a_single_checkpoint_is_kept_as_it_is(kernel):
    x = torch.randn(1003, generator=torch.Generator().manual_seed(5))
    assert_same_bits(merged(kernel, [(UNIT, x)], torch.bfloat16, states=Dither.of(STRETCHES)), x)


KINDS = ["llama tied", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "mamba", "gemma3, with images"]


@pytest.fixture(scope="module", params=[(kind, dtype) for kind in KINDS for dtype in NARROW], ids=str)
def checkpoints(request, tmp_path_factory):
    """Base, a and b of an architecture in 16 bits, the base with stochastic rounding; some have fused parameters."""
    kind, dtype = request.param
    folder, stored = tmp_path_factory.mktemp("checkpoints"), []
    for seed, name in enumerate(("base", "a", "b")):
        zoo.make(kind, seed, dtype).save_pretrained(folder / name)
        stored.append(StoredModel(folder / name, content_hash(folder / name)))
    return [replace(stored[0], rounding="stochastic"), *stored[1:]]


def composite(stored):
    return Composite.of(dict(zip((x.content for x in stored), (0, 3 * 10**8, 7 * 10**8), strict=True)))


def live(stored, composite, **settings):
    model = empty_model(stored[0].path, torch.float32)
    MergedModel(model, stored, **settings).merge(composite)
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def test_models_in_memory_in_files_and_over_devices_have_the_same_bits(checkpoints):
    expected = live(checkpoints, composite(checkpoints))
    layout = read_architecture(header := read_header(checkpoints[0].path, "base")).layout(header)
    stay = set() if layout.fused else {checkpoints[1].content}
    streamed = live(checkpoints, composite(checkpoints), streamed=stay)
    divided = live(checkpoints, composite(checkpoints), devices=("cpu", "cpu"))
    nearest = live([replace(x, rounding="nearest") for x in checkpoints], composite(checkpoints))
    for name, tensor in expected.items():
        assert_same_bits(streamed[name], tensor)
        assert_same_bits(divided[name], tensor)
    assert any(not torch.equal(nearest[name], tensor) for name, tensor in expected.items())


def test_what_is_written_is_what_was_scored(checkpoints):
    """Tensors merged one by one from the files, and then loaded by transformers, which fuses some."""
    expected = live(checkpoints, composite(checkpoints))
    header = read_header(checkpoints[0].path, "base")
    architecture = read_architecture(header)
    by_content = {model.content: model for model in checkpoints}
    names = stored_names(architecture, header)
    written = dict(merged_tensors(architecture, checkpoints[0], by_content, composite(checkpoints), names))
    layout = architecture.layout(header)
    plain = {layout.renaming(name): tensor.float() for name, tensor in written.items()}
    taken_apart = architecture.as_stored(expected)
    assert plain.keys() <= taken_apart.keys()
    for name, tensor in plain.items():
        assert_same_bits(tensor, taken_apart[name].contiguous())


def test_groups_round_as_the_whole_does(checkpoints):
    """Parameters that are one checkpoint's are kept as they are, the others have the bits of the whole composite."""
    whole, single = composite(checkpoints), Composite.single(checkpoints[1].content)
    expected, alone = live(checkpoints, whole), live(checkpoints, single)
    apart = sorted(expected)[::2]
    grouped = live(checkpoints, Composite(whole.terms, ((tuple(apart), single.terms),)))
    for name, tensor in grouped.items():
        assert_same_bits(tensor, (alone if name in apart else expected)[name])
