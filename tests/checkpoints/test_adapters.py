"""Laws of adapters: PEFT's own merge is the oracle, and factors give the bits of the dense checkpoint."""

import json

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dem_opt.checkpoints.adapters import CONFIG, WEIGHTS, LowRank, check_adapter, read_adapter
from dem_opt.checkpoints.architecture import empty_model, load_model, stored_names
from dem_opt.checkpoints.files import content_hash, read_header
from dem_opt.checkpoints.fit import check_base
from dem_opt.errors import InputError
from dem_opt.merging.merged_model import MergedModel, merged_tensors
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, StoredModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

LINEAR = ["q_proj", "v_proj", "down_proj"]
CASES = {
    "lora": ("llama", {"target_modules": LINEAR}),
    "rslora": ("llama", {"target_modules": LINEAR, "use_rslora": True}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "dora, rslora": ("llama", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
    "patterns": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*up_proj": 3}},
    ),
    "saved module": ("llama", {"target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]}),
    "embedding": ("llama", {"target_modules": [*LINEAR, "embed_tokens"]}),
    "biases": ("qwen2", {"target_modules": LINEAR, "bias": "all"}),
    "own biases": ("qwen2", {"target_modules": LINEAR, "bias": "lora_only", "use_dora": True}),
    "transposed": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "transposed dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "encoder-decoder": ("t5, untied", {"target_modules": ["q", "wo"]}),
}


def make_adapter(base, folder, seed, **settings):
    """A PEFT adapter with random factors, biases and saved modules."""
    torch.manual_seed(seed)
    model = get_peft_model(load_model(base, torch.float32), LoraConfig(r=4, lora_alpha=6, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return folder


class World:
    """A base, an ordinary checkpoint and two adapters on disk."""

    def __init__(self, folder, name, settings, dtype=torch.float32):
        self.folder = folder
        path = zoo.save(folder / "base", name, 0, dtype)
        self.base = StoredModel(path, content_hash(path))
        other = zoo.save(folder / "other", name, 1, dtype)
        self.other = StoredModel(other, content_hash(other))
        self.architecture = check_base(read_header(path, "base"))
        self.adapters = [
            self.adapter(make_adapter(path, folder / f"adapter-{seed}", seed, **settings)) for seed in (2, 3)
        ]

    def adapter(self, path):
        adapter = read_adapter(path, "distributions.a.adapter")
        check_adapter(self.architecture, read_header(self.base.path, "base"), adapter)
        return StoredModel(path, adapter.content(self.base.content), self.base.content)

    def dense(self, adapter):
        """The checkpoint that an adapter makes, written as the base is stored."""
        header = read_header(self.base.path, "base")
        names, stored = stored_names(self.architecture, header), {adapter.content: adapter}
        tensors = merged_tensors(self.architecture, self.base, stored, Composite.single(adapter.content), names)
        folder = self.folder / f"dense-{adapter.path.name}"
        folder.mkdir()
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_bytes((self.base.path / "config.json").read_bytes())
        return StoredModel(folder, content_hash(folder))


def merged(world, stored, units):
    """Parameters of a composite in a merged model and streamed, which must be the same."""
    composite = Composite.of({one.content: count for one, count in zip(stored, units, strict=True) if count})
    model = empty_model(world.base.path, torch.float32)
    merged_model = MergedModel(model, [world.base, *stored])
    merged_model.merge(composite)
    by_content = {one.content: one for one in (world.base, *stored)}
    names = list(world.architecture.parameters)
    streamed = merged_tensors(world.architecture, world.base, by_content, composite, names)
    mine = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert all(torch.equal(tensor.float(), mine[name]) for name, tensor in streamed)
    other = empty_model(world.base.path, torch.float32)
    MergedModel(other, [world.base, *stored], streamed=[world.base.content]).merge(composite)
    assert all(torch.equal(parameter, mine[name]) for name, parameter in other.named_parameters())
    return mine


@pytest.fixture(scope="module", params=CASES)
def world(request, tmp_path_factory):
    name, settings = CASES[request.param]
    return World(tmp_path_factory.mktemp("adapters"), name, settings)


def test_an_adapter_is_what_peft_makes_of_it(world):
    for adapter in world.adapters:
        mine = merged(world, [world.other, adapter], (0, UNIT))
        theirs = PeftModel.from_pretrained(load_model(world.base.path, torch.float32), adapter.path).merge_and_unload()
        for name, tensor in theirs.named_parameters():
            torch.testing.assert_close(mine[name], tensor.detach(), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("units", [(3 * 10**8, 7 * 10**8), (5 * 10**8, 5 * 10**8), (UNIT, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_give_the_bits_of_dense_checkpoints(tmp_path, dtype, units):
    """Terms stand in the order of their content, which the dense checkpoints have another of; two of them commute."""
    world = World(tmp_path, *CASES["lora"], dtype)
    factored = merged(world, world.adapters, units)
    dense = merged(world, [world.dense(adapter) for adapter in world.adapters], units)
    assert all(torch.equal(factored[name], dense[name]) for name in dense)


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(2048, 1024, 16), (999, 513, 7), (320, 16, 4)])
def test_threads_change_no_bit_of_an_applied_adapter(outputs, inputs, rank):
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    shapes = ((rank, inputs), (outputs, rank), (outputs, inputs))
    down_RI, up_OR, base = (torch.randn(*shape, generator=generator) for shape in shapes)
    made = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(LowRank(down_RI, up_OR, 0.5, False).apply(base))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)


def test_a_factored_adapter_costs_its_factors(tmp_path):
    """32 adapters of rank 16 take less than two dense vectors from a hidden size of 2048 on.

    An O x I map has O I weights, its factors 16 (O + I): with O = I = 2048 that is 1/64, and 32 of them are half of
    one dense vector.
    """
    hidden, rank, count = 2048, 16, 32
    factors = LowRank(torch.zeros(rank, hidden), torch.zeros(hidden, rank), 1.0, False)
    assert count * factors.nbytes == hidden * hidden * 4 // 2
    world = World(tmp_path, *CASES["lora"])
    alone = MergedModel(empty_model(world.base.path, torch.float32), [world.base]).nbytes
    both = MergedModel(empty_model(world.base.path, torch.float32), [world.base, *world.adapters]).nbytes
    stored = sum(one.nbytes for adapter in world.adapters for one in load_file(adapter.path / WEIGHTS).values())
    assert both - alone == stored


def test_on_a_wide_layer_thirty_two_adapters_take_less_than_two_dense_vectors(tmp_path):
    wide = {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 16}
    path = zoo.save(tmp_path / "base", "llama", 0, torch.bfloat16, **wide, num_key_value_heads=16)
    base = StoredModel(path, content_hash(path))
    folder = make_adapter(path, tmp_path / "adapter", 1, target_modules="all-linear")
    dense = MergedModel(empty_model(path, torch.bfloat16), [base, StoredModel(path, "another name")]).nbytes
    alone = MergedModel(empty_model(path, torch.bfloat16), [base]).nbytes
    adapter = StoredModel(folder, "adapter", base.content)
    factored = MergedModel(empty_model(path, torch.bfloat16), [base, adapter]).nbytes
    # The adapter made here has rank 4: one of rank 16 takes four times its bytes.
    assert 32 * 4 * (factored - alone) < 2 * (dense - alone)


def configure(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def first(tensors, end):
    return next(name for name in tensors if name.endswith(end))


BAD = {
    "no such folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "has no adapter_config.json": lambda folder: (folder / CONFIG).unlink(),
    "has no adapter_model.safetensors": lambda folder: (folder / WEIGHTS).unlink(),
    "is pickled": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "is of the kind 'IA3'": lambda folder: configure(folder, peft_type="IA3"),
    "has lora_bias": lambda folder: configure(folder, lora_bias=True),
    "has no lora_alpha": lambda folder: configure(folder, lora_alpha=None),
    "not a JSON object": lambda folder: (folder / CONFIG).write_text("[]"),
    "only one of its two factors": lambda folder: rewrite(folder, lambda x: x.pop(first(x, "lora_B.weight"))),
    "which the base does not have": lambda folder: rewrite(
        folder,
        lambda x: (
            x.update({"base_model.model.strange.lora_A.weight": torch.ones(4, 3)})
            or x.update({"base_model.model.strange.lora_B.weight": torch.ones(3, 4)})
        ),
    ),
    "does not fit the base": lambda folder: rewrite(
        folder, lambda x: x.update({(name := first(x, "lora_A.weight")): x[name][:, :-1].clone()})
    ),
    "is I8: only": lambda folder: rewrite(folder, lambda x: x.update({(name := first(x, "A.weight")): x[name].char()})),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return World(tmp_path_factory.mktemp("plain"), *CASES["lora"])


@pytest.mark.parametrize("words", BAD)
def test_an_adapter_that_does_not_fit_is_refused(plain, tmp_path, words):
    folder = make_adapter(plain.base.path, tmp_path / "adapter", 5, **CASES["lora"][1])
    BAD[words](folder)
    with pytest.raises(InputError, match=words.replace("(", r"\(")) as refused:
        plain.adapter(folder)
    assert refused.value.field == "distributions.a.adapter"


def test_content_is_factors_settings_and_base(plain, tmp_path):
    folder = make_adapter(plain.base.path, tmp_path / "adapter", 5, **CASES["lora"][1])
    known = plain.adapter(folder).content
    assert plain.adapter(folder).content == known
    assert read_adapter(folder, "a").content("another base") != known
    configure(folder, lora_alpha=7)
    assert plain.adapter(folder).content != known
