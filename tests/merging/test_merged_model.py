"""Laws of merging, over architectures x dtypes x composites."""

import shutil
import subprocess
import sys

import pytest
import test_adapters
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dem_opt.checkpoints.adapters import read_adapter
from dem_opt.checkpoints.architecture import empty_model, read_architecture
from dem_opt.checkpoints.files import content_hash, read_header
from dem_opt.merging.merged_model import MergedModel, inner_products, total_gradient
from dem_opt.merging.segments import ALIGNMENT
from dem_opt.merging.tensors import merged_tensors
from dem_opt.simplex import UNIT, Coefficients
from dem_opt.types import Composite, StoredModel

ARCHITECTURES = ("llama tied", "llama untied", "gpt2")
DTYPES = ("float32", "bfloat16", "mixed")

UNITS = [
    (0, 3 * 10**8, 7 * 10**8),
    (25 * 10**7, 25 * 10**7, 5 * 10**8),
    (-5 * 10**8, 10**9, 5 * 10**8),
    (333333333, 333333333, 333333334),
    (0, 1, 999999999),
]
"""Coefficients of base, a and b in units of 1e-9."""


def make(architecture, dtype, seed, extreme=True):
    torch.manual_seed(seed)
    if architecture == "gpt2":
        config = GPT2Config(
            vocab_size=83, n_embd=20, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
        )
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=83,
            hidden_size=20,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=architecture == "llama tied",
        )
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
            if extreme:
                parameter.view(-1)[:3] = torch.tensor([-0.0, 1e-39, -1e4])
            parameter.data = parameter.to(stored_dtype(dtype, name))
    return model


def stored_dtype(dtype, name):
    if dtype == "mixed":
        return torch.float32 if "norm" in name or ".ln_" in name else torch.bfloat16
    return getattr(torch, dtype)


class World:
    """Three checkpoints of one architecture on disk: base, a and b."""

    def __init__(self, folder, architecture, dtype, extreme=True):
        self.architecture, self.dtype = architecture, dtype
        self.weights, self.stored = [], []
        for seed, name in enumerate(("base", "a", "b")):
            model = make(architecture, dtype, seed, extreme)
            model.save_pretrained(folder / name)
            self.stored.append(StoredModel(folder / name, content_hash(folder / name)))
            self.weights.append({name: tensor.detach() for name, tensor in model.named_parameters()})

    def merged(self, composite):
        """The composite's parameters, streamed from the files."""
        architecture = read_architecture(read_header(self.stored[0].path, "base"))
        by_content = {model.content: model for model in self.stored}
        names = list(architecture.parameters)
        return dict(merged_tensors(architecture, self.stored[0], by_content, composite, names))

    def merged_model(self, stored=None, dtype=torch.float32):
        model = empty_model(self.stored[0].path, dtype)
        return MergedModel(model, stored or self.stored), model

    def composite(self, units):
        return Composite.of({model.content: count for model, count in zip(self.stored, units, strict=True)})


@pytest.fixture(
    scope="module", params=[(architecture, dtype) for architecture in ARCHITECTURES for dtype in DTYPES], ids="-".join
)
def world(request, tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"), *request.param)


def values(model):
    """The model's parameters, copied."""
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def assert_same_bits(ones, others):
    assert ones.keys() == others.keys()
    for name, tensor in ones.items():
        other = others[name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
        assert torch.equal(tensor.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
def test_a_single_term_is_that_checkpoint_bit_for_bit(world, live):
    merged_model, model = world.merged_model(dtype=live)
    for stored, weights in zip(world.stored, world.weights, strict=True):
        merged_model.merge(Composite.single(stored.content))
        assert_same_bits(values(model), {name: tensor.to(live) for name, tensor in weights.items()})


def test_zero_coefficients_give_the_base_and_one_gives_the_expert(world):
    base, a, b = world.stored
    fine_tunes = {"a": a.content, "b": b.content}
    merged_model, model = world.merged_model()
    for units, index in (((0, 0), 0), ((UNIT, 0), 1), ((0, UNIT), 2)):
        merged_model.merge(Composite.edited(base.content, fine_tunes, Coefficients((("a", units[0]), ("b", units[1])))))
        assert_same_bits(values(model), {name: tensor.float() for name, tensor in world.weights[index].items()})


@pytest.mark.parametrize("units", UNITS)
def test_merging_has_no_memory(world, units):
    merged_model, model = world.merged_model()
    merged_model.merge(world.composite(units))
    first = values(model)
    merged_model.merge(world.composite((UNIT, 0, 0)))
    merged_model.merge(world.composite(units[::-1]))
    merged_model.merge(world.composite(units))
    assert_same_bits(values(model), first)


@pytest.mark.parametrize("units", UNITS)
def test_the_order_of_the_checkpoints_changes_no_bit(world, units):
    merged = []
    for stored in (world.stored, world.stored[::-1]):
        merged_model, model = world.merged_model(stored)
        merged_model.merge(world.composite(units))
        merged.append(values(model))
    assert_same_bits(*merged)


@pytest.mark.parametrize("units", UNITS)
def test_merging_agrees_with_float64(world, units):
    """Rounding N coefficients, N products and N - 1 sums to float32 (u = 2^-24) leaves at most
    (N + 1) u sum |w x|, to first order; rounding to the stored dtype adds half an ulp of what it rounds."""
    merged = world.merged(world.composite(units))
    for name, out in merged.items():
        terms = [count / UNIT * tensor[name].double() for count, tensor in zip(units, world.weights, strict=True)]
        exact, size = sum(terms), sum(term.abs() for term in terms)
        bound = (len(terms) + 1) * 2**-24 * size * (1 + 2**-20) + 2**-149
        if out.dtype == torch.bfloat16:
            bound = bound + 2**-8 * (exact.abs() + bound)
        assert (out.double() - exact).abs().le(bound).all(), name


@pytest.mark.parametrize("units", UNITS)
def test_streaming_from_files_gives_the_arenas_bits_in_the_stored_dtype(world, units):
    merged_model, model = world.merged_model()
    merged_model.merge(world.composite(units))
    merged = world.merged(world.composite(units))
    assert {name: tensor.dtype for name, tensor in merged.items()} == {
        name: stored_dtype(world.dtype, name) for name in world.weights[0]
    }
    assert_same_bits(values(model), {name: tensor.float() for name, tensor in merged.items()})


def test_the_forward_pass_is_that_of_the_checkpoint(world):
    merged_model, model = world.merged_model()
    ids = torch.randint(83, (2, 9), generator=torch.Generator().manual_seed(0))
    for stored in world.stored:
        reference = AutoModelForCausalLM.from_pretrained(stored.path, dtype=torch.float32)
        merged_model.merge(Composite.single(stored.content))
        assert torch.equal(model(ids).logits, reference(ids).logits)


MIXED = [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "mixed"), ("mixed", "float16")]


@pytest.mark.parametrize(("base", "expert"), MIXED)
def test_checkpoints_of_other_dtypes_are_stored_as_they_are_and_sums_rounded_to_the_bases(tmp_path, base, expert):
    ours, theirs = World(tmp_path / "ours", "llama tied", base), World(tmp_path / "theirs", "llama tied", expert)
    ours.stored[1], ours.weights[1] = theirs.stored[1], theirs.weights[1]
    merged_model, model = ours.merged_model()
    for stored, weights in zip(ours.stored, ours.weights, strict=True):
        merged_model.merge(Composite.single(stored.content))
        assert_same_bits(values(model), {name: tensor.float() for name, tensor in weights.items()})
        assert_same_bits(ours.merged(Composite.single(stored.content)), weights)
    composite = ours.composite((0, 4 * 10**8, 6 * 10**8))
    merged_model.merge(composite)
    streamed = ours.merged(composite)
    assert {name: tensor.dtype for name, tensor in streamed.items()} == {
        name: stored_dtype(base, name) for name in streamed
    }
    assert_same_bits(values(model), {name: tensor.float() for name, tensor in streamed.items()})
    everything = [tensor for weights in ours.weights for tensor in weights.values()]
    assert merged_model.nbytes < 1.3 * sum(x.nbytes for x in everything) + 4 * sum(x.numel() for x in streamed.values())


def test_parameters_are_aligned_views_of_one_memory_for_each_stored_dtype_tied_ones_once(world):
    _, model = world.merged_model()
    parameters = list(model.parameters())
    memories = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in parameters}
    assert len(memories) == (2 if world.dtype == "mixed" else 1)
    elements = sum(memory.nbytes() for memory in memories.values()) // 4
    numel = sum(parameter.numel() for parameter in parameters)
    assert numel <= elements < numel + ALIGNMENT * len(parameters)
    assert all(parameter.storage_offset() % ALIGNMENT == 0 for parameter in parameters)
    tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == (world.architecture != "llama untied")


def test_the_base_need_not_be_stored(world):
    everything, expected = world.merged_model()
    fine_tunes, model = world.merged_model(world.stored[1:])
    composite = world.composite((0, 4 * 10**8, 6 * 10**8))
    everything.merge(composite)
    fine_tunes.merge(composite)
    assert_same_bits(values(model), values(expected))
    with pytest.raises(KeyError):
        fine_tunes.merge(world.composite((UNIT, 0, 0)))


def test_a_merge_needs_no_file(tmp_path):
    world = World(tmp_path, "llama tied", "bfloat16")
    merged_model, model = world.merged_model()
    merged_model.merge(world.composite(UNITS[0]))
    before = values(model)
    for stored in world.stored:
        shutil.rmtree(stored.path)
    merged_model.merge(world.composite((UNIT, 0, 0)))
    merged_model.merge(world.composite(UNITS[0]))
    assert_same_bits(values(model), before)


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_checkpoints_that_stay_in_their_files_give_the_same_bits_and_take_no_memory(world, which, live, units):
    worker, expected = world.merged_model(dtype=live)
    model = empty_model(world.stored[0].path, live)
    merged_model = MergedModel(model, world.stored, streamed={world.stored[index].content for index in which})
    bits = [len(segment.live_P) * segment.live_P.itemsize for segment in merged_model._segments]
    assert merged_model.nbytes == worker.nbytes - len(which) * (worker.nbytes - sum(bits)) // 3
    for composite in (world.composite(units), *(Composite.single(checkpoint.content) for checkpoint in world.stored)):
        merged_model.merge(composite)
        worker.merge(composite)
        assert_same_bits(values(model), values(expected))


@pytest.mark.parametrize("size", [7, 83 * 20, 10**6])
@pytest.mark.parametrize("which", [(0,), (0, 1, 2)], ids=str)
def test_bits_do_not_depend_on_how_much_is_fetched_at_once(world, which, size, monkeypatch):
    worker, expected = world.merged_model(dtype=torch.float32)
    monkeypatch.setattr("dem_opt.merging.segments.BLOCK", size)
    model = empty_model(world.stored[0].path, torch.float32)
    merged_model = MergedModel(model, world.stored, streamed={world.stored[index].content for index in which})
    for composite in (world.composite(UNITS[1]), Composite.single(world.stored[0].content)):
        merged_model.merge(composite)
        worker.merge(composite)
        assert_same_bits(values(model), values(expected))


def allocated(merged_model):
    """Bytes of every memory that a merged model holds, each once: checkpoints, vectors, edits, live parameters."""
    tensors = []
    for segment in merged_model._segments:
        tensors += [segment.live_P, *segment.stored_NP.values()]
        for vector in segment.vectors_NP.values():
            tensors += [vector.values_P, vector.scale_R, vector.starts_R]
    tensors += list(merged_model._parameters.values())
    memories = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    edits = [edit.nbytes for _, edits in merged_model._adapters.values() for edit in edits.values()]
    return sum(memories.values()) + sum(edits)


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", ["exact", "int8"])
@pytest.mark.parametrize("count", [1, 3])
def test_memory_is_counted_as_it_is_allocated(world, count, vectors, live):
    stored = world.stored[:count]
    headers = [read_header(model.path, "base") for model in stored]
    counted = MergedModel.memory_bytes(read_architecture(headers[0]), headers, dtype=live, vectors=vectors)
    merged_model = MergedModel(empty_model(stored[0].path, live), stored, vectors=vectors)
    assert counted.stored + counted.live == allocated(merged_model) == merged_model.nbytes
    assert len(counted.checkpoints) == count and counted.live == sum(x.live_P.nbytes for x in merged_model._segments)


@pytest.mark.parametrize("which", [(0,), (1, 2), (0, 1, 2)], ids=str)
def test_streaming_saves_what_is_counted_for_the_streamed_checkpoints(world, which):
    headers = [read_header(model.path, "base") for model in world.stored]
    counted = MergedModel.memory_bytes(read_architecture(headers[0]), headers, dtype=torch.float32)
    contents = {world.stored[number].content for number in which}
    merged_model = MergedModel(empty_model(world.stored[0].path, torch.float32), world.stored, streamed=contents)
    saved = sum(counted.checkpoints[number] for number in which)
    assert allocated(merged_model) == counted.stored + counted.live - saved


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("case", ["lora", "dora", "saved module", "embedding"])
def test_memory_of_adapters_is_counted_as_it_is_allocated(tmp_path, case):
    adapted = test_adapters.World(tmp_path, *test_adapters.CASES[case])
    stored = [adapted.base, *adapted.adapters]
    headers = [read_header(adapted.base.path, "base"), *(read_adapter(x.path, "a").header for x in adapted.adapters)]
    counted = MergedModel.memory_bytes(read_architecture(headers[0]), headers, dtype=torch.float32)
    merged_model = MergedModel(empty_model(adapted.base.path, torch.float32), stored)
    assert counted.stored + counted.live == allocated(merged_model)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_loading_holds_at_its_peak_hardly_more_than_what_stays(tmp_path):
    """Four checkpoints of 7 million parameters in two shards each, in a process of its own."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4}
    for seed, name in enumerate("abcd"):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(vocab_size=500, **sizes)).save_pretrained(tmp_path / name, max_shard_size="15MB")
    code = """
import sys
from pathlib import Path
from dem_opt.merging.merged_model import MergedModel
from dem_opt.merging.kernel import MergeKernel
from dem_opt.checkpoints.architecture import empty_model
from dem_opt.types import StoredModel
import torch

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

MergeKernel()
model = empty_model(Path(sys.argv[1]), torch.float32)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
merged = MergedModel(model, [StoredModel(Path(folder), folder) for folder in sys.argv[1:]])
print((status("VmHWM") - before) / merged.nbytes, merged.nbytes)
"""
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in "abcd")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, nbytes = map(float, done.stdout.split())
    assert nbytes > 5 * 4 * 6.5e6 and peak < 1.15


def test_a_single_term_is_exact_where_denormals_are_flushed(tmp_path):
    world = World(tmp_path, "llama tied", "float32")
    merged_model, model = world.merged_model()
    try:
        torch.set_flush_denormal(True)
        merged_model.merge(Composite.single(world.stored[1].content))
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(values(model), world.weights[1])


@pytest.fixture(
    scope="module", params=[(architecture, dtype) for architecture in ARCHITECTURES for dtype in DTYPES], ids="-".join
)
def tame(request, tmp_path_factory):
    """A world of ordinary weights."""
    return World(tmp_path_factory.mktemp("tame"), *request.param, extreme=False)


def losses(model, count=2):
    """Sums of squared logits of different tokens, one for each backward."""
    for seed in range(count):
        yield model(torch.randint(83, (2, 9), generator=torch.Generator().manual_seed(seed))).logits.square().sum()


def reduced(merged_model, model, contents, count=2):
    with merged_model.reduce_gradients(contents[0], contents[1:]) as products:
        for loss in losses(model, count):
            loss.backward()
    return total_gradient(products, contents[1:])


def expected(tame, model, count=2):
    """The same from whole gradients, which autograd keeps, and the checkpoints as they were saved."""
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for loss in losses(model, count):
        loss.backward()
    gradients = {name: parameter.grad.double() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(False).grad = None
    base, *fine_tunes = tame.weights
    return [
        sum((g * (fine_tune[x].double() - base[x].double())).sum() for x, g in gradients.items())
        for fine_tune in fine_tunes
    ]


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16, torch.float64])
def test_gradients_are_reduced_against_every_vector(tame, live):
    """Also for gradients in bfloat16, as autograd makes them; there one backward, since autograd's sum would round."""
    merged_model, model = tame.merged_model(dtype=live)
    merged_model.merge(tame.composite(UNITS[1]))
    before = (
        values(model),
        [{name: x.clone() for name, x in segment.stored_NP.items()} for segment in merged_model._segments],
    )
    contents = [checkpoint.content for checkpoint in tame.stored]
    count = 1 if live == torch.bfloat16 else 2
    slopes = reduced(merged_model, model, contents, count)
    assert list(slopes) == contents[1:]
    assert_same_bits(values(model), before[0])
    for segment, stored_NP in zip(merged_model._segments, before[1], strict=True):
        assert_same_bits(segment.stored_NP, stored_NP)
    oracle = [float(slope) for slope in expected(tame, model, count)]
    assert list(slopes.values()) == pytest.approx(oracle, rel=1e-10 if live == torch.float64 else 1e-4)


@pytest.mark.parametrize(("base", "expert"), MIXED)
def test_gradients_are_reduced_against_vectors_of_other_dtypes(tmp_path, base, expert):
    ours, theirs = World(tmp_path / "ours", "gpt2", base, False), World(tmp_path / "theirs", "gpt2", expert, False)
    ours.stored[1], ours.weights[1] = theirs.stored[1], theirs.weights[1]
    merged_model, model = ours.merged_model(dtype=torch.float64)
    merged_model.merge(ours.composite(UNITS[0]))
    slopes = reduced(merged_model, model, [checkpoint.content for checkpoint in ours.stored])
    assert list(slopes.values()) == pytest.approx([float(slope) for slope in expected(ours, model)], rel=1e-10)


def test_at_most_one_gradient_lives_and_none_stays(tame):
    """Before a parameter's gradient is stored, and when it is, autograd's own hooks count those that are."""
    merged_model, model = tame.merged_model()
    merged_model.merge(tame.composite(UNITS[1]))
    parameters, counts, reached = list(model.parameters()), [], set()

    def count(*_):
        counts.append(sum(parameter.grad is not None for parameter in parameters))

    base, *fine_tunes = (checkpoint.content for checkpoint in tame.stored)
    for parameter in parameters:
        parameter.requires_grad_(True)
        parameter.register_hook(count)
        parameter.register_post_accumulate_grad_hook(count)
        parameter.register_post_accumulate_grad_hook(lambda leaf: reached.add(id(leaf)))
    with merged_model.reduce_gradients(base, fine_tunes):
        for loss in losses(model):
            loss.backward()
            assert not any(parameter.grad is not None for parameter in parameters)
    assert max(counts) == 1 and len(counts) == 2 * 2 * len(parameters) and len(reached) == len(parameters)
    assert not any(parameter.requires_grad for parameter in parameters)


def test_gradients_are_reduced_against_vectors_from_files(tame):
    contents, slopes = [checkpoint.content for checkpoint in tame.stored], []
    for streamed in ((), contents[:2]):
        model = empty_model(tame.stored[0].path, torch.float32)
        merged_model = MergedModel(model, tame.stored, streamed=streamed)
        merged_model.merge(tame.composite(UNITS[1]))
        slopes.append(reduced(merged_model, model, contents))
    assert slopes[0] == slopes[1]


def test_a_failure_within_leaves_the_model_without_gradients(tame):
    merged_model, model = tame.merged_model()
    merged_model.merge(tame.composite(UNITS[1]))
    base, *fine_tunes = (checkpoint.content for checkpoint in tame.stored)
    with pytest.raises(ZeroDivisionError), merged_model.reduce_gradients(base, fine_tunes):
        next(losses(model)).backward()
        raise ZeroDivisionError
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not next(losses(model)).requires_grad
    assert reduced(merged_model, model, [base, base]) == {base: 0.0}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_an_adapters_vector_is_what_it_makes_of_the_base(tmp_path):
    """The merged model's own vertex is the oracle; that it is the adapter's, test_adapters tells."""
    adapted = test_adapters.World(tmp_path, *test_adapters.CASES["dora"])
    stored = [adapted.base, adapted.other, *adapted.adapters]
    model = empty_model(adapted.base.path, torch.float64)
    merged_model, vertices = MergedModel(model, stored), []
    for checkpoint in stored:
        merged_model.merge(Composite.single(checkpoint.content))
        vertices.append({name: x.clone() for name, x in model.named_parameters()})
    merged_model.merge(
        Composite.of({checkpoint.content: units for checkpoint, units in zip(stored[1:], UNITS[1], strict=True)})
    )
    slopes = reduced(merged_model, model, [checkpoint.content for checkpoint in stored])
    adapted.weights = vertices
    assert list(slopes.values()) == pytest.approx([float(slope) for slope in expected(adapted, model)], rel=1e-10)


@pytest.mark.parametrize("block", [1, 7, 1000, 2**15])
def test_an_inner_product_is_exact_where_its_parts_cancel(block):
    """x_n - x_0 is 2^-20 in one place in ten: beside a 3 float32 has room for it, beside the sum of 4500 it has not."""
    g, x0 = torch.full((1000,), 1.5), torch.full((1000,), 3.0)
    x1 = x0 + (torch.arange(1000) % 10 == 0) * 2.0**-20
    assert inner_products(g, x0, [x1, x0, x1.double().float()], block).tolist() == [150 * 2.0**-20, 0.0, 150 * 2.0**-20]
    assert inner_products(g.bfloat16(), x0.half(), [x1], block).tolist() == [150 * 2.0**-20]
