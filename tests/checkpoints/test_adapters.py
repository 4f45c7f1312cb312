"""Laws of adapters: PEFT's own merge is the oracle, and factors give the bits of the dense checkpoint."""

import json

import pytest
import torch
import zoo
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dem_opt.checkpoints.adapter_edits import LowRank
from dem_opt.checkpoints.adapters import CONFIG, WEIGHTS, check_adapter, read_adapter
from dem_opt.checkpoints.architecture import empty_model, load_model, stored_names
from dem_opt.checkpoints.files import content_hash, read_header
from dem_opt.checkpoints.fit import check_base
from dem_opt.errors import InputError
from dem_opt.merging.merged_model import MergedModel
from dem_opt.merging.tensors import merged_tensors
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, StoredModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks for it
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),  # said of target_parameters too
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
    "own biases of B": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "embedding, dora": ("llama", {"target_modules": [*LINEAR, "embed_tokens"], "use_dora": True}),
    "tokens": (
        "llama",
        {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [5, 1], "lm_head": [2]}},
    ),
    "tied tokens": ("llama tied", {"target_modules": LINEAR, "trainable_token_indices": [5, 1]}),
    "tied embedding": ("llama tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "tied saved module": (
        "llama tied",
        {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "layers": ("llama", {"target_modules": LINEAR, "layers_to_transform": [1], "exclude_modules": ["v_proj"]}),
    "square, fan_in_fan_out unsaid": ("gpt2", {"target_modules": ["c_proj"]}),
    "fan_in_fan_out of a linear map": ("llama", {"target_modules": ["q_proj"], "fan_in_fan_out": True}),
    **{
        f"initialized: {init}": ("llama", {"target_modules": LINEAR, "init_lora_weights": init})
        for init in (False, "gaussian", "orthogonal", "eva", "mica")
    },
    "experts": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts' last": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    "experts, transposed": (
        "gpt_oss",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "experts' router": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]}),
    "experts' patterns": (
        "qwen3_moe",
        {
            **{"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
            **{"rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {"experts.down_proj": 3}, "use_rslora": True},
        },
    ),
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
        self.folder, self.settings = folder, settings
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
    composite = Composite.of(
        {checkpoint.content: count for checkpoint, count in zip(stored, units, strict=True) if count}
    )
    model = empty_model(world.base.path, torch.float32)
    merged_model = MergedModel(model, [world.base, *stored])
    merged_model.merge(composite)
    by_content = {checkpoint.content: checkpoint for checkpoint in (world.base, *stored)}
    names = stored_names(world.architecture, read_header(world.base.path, "base"))
    streamed = merged_tensors(world.architecture, world.base, by_content, composite, names)
    mine = {name: parameter.detach() for name, parameter in model.named_parameters()}
    as_stored = world.architecture.as_stored(mine)
    assert all(torch.equal(tensor.float(), as_stored[name]) for name, tensor in streamed)
    if world.architecture.layout(read_header(world.base.path, "base")).fused:
        return mine
    other = empty_model(world.base.path, torch.float32)
    MergedModel(other, [world.base, *stored], streamed=[world.base.content]).merge(composite)
    assert all(torch.equal(parameter, mine[name]) for name, parameter in other.named_parameters())
    return mine


@pytest.fixture(scope="module", params=CASES)
def world(request, tmp_path_factory):
    name, settings = CASES[request.param]
    return World(tmp_path_factory.mktemp("adapters"), name, settings)


def nll(model):
    """Nats of each of a few random tokens."""
    ids = torch.randint(3, zoo.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        logits = model(input_ids=ids, **more).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def test_an_adapter_computes_what_pefts_model_of_it_does(world):
    """The forward pass is the truth: PEFT's own merge differs from it where weights are tied."""
    for adapter in world.adapters:
        model = empty_model(world.base.path, torch.float32)
        MergedModel(model, [world.base, adapter]).merge(Composite.single(adapter.content))
        theirs = PeftModel.from_pretrained(load_model(world.base.path, torch.float32), adapter.path).eval()
        torch.testing.assert_close(nll(model), nll(theirs), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(nll(model), nll(load_model(world.base.path, torch.float32).eval()), atol=1e-3)


def test_an_adapter_is_merged_as_peft_merges_it(world):
    if "embed_tokens" in world.settings["target_modules"] and world.settings.get("ensure_weight_tying"):
        pytest.skip("PEFT adds the factors of tied weights twice; its own forward pass adds them once")
    for adapter in world.adapters:
        mine = merged(world, [world.other, adapter], (0, UNIT))
        theirs = PeftModel.from_pretrained(load_model(world.base.path, torch.float32), adapter.path).merge_and_unload()
        for name, tensor in theirs.named_parameters():
            if name in mine:
                torch.testing.assert_close(mine[name], tensor.detach(), rtol=1e-5, atol=1e-6, msg=name)


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
    stored = sum(tensor.nbytes for adapter in world.adapters for tensor in load_file(adapter.path / WEIGHTS).values())
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


def renamed(change):
    """A change of an adapter's folder: its tensors get other names."""

    def rename(folder):
        tensors = {change(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS)

    return rename


NAMES = {
    "adapter's name": renamed(lambda name: name.replace(".weight", ".default.weight")),
    "compiled": renamed(lambda name: f"_orig_mod.{name}"),
    "compiled inside": renamed(lambda name: name.replace("model.layers", "_orig_mod.model.layers")),
    "data-parallel": renamed(lambda name: f"module.{name}"),
    "sharded": renamed(lambda name: name.replace("base_model.", "_fsdp_wrapped_module.base_model.")),
    "without PEFT's prefix": renamed(lambda name: name.removeprefix("base_model.model.")),
    "without the model's prefix": renamed(lambda name: name.replace("base_model.model.model.", "base_model.model.")),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_wrappers_are_understood(plain, tmp_path, case):
    folder = make_adapter(plain.base.path, tmp_path / "adapter", 2, **CASES["lora"][1])
    NAMES[case](folder)
    mine = merged(plain, [plain.other, plain.adapter(folder)], (0, UNIT))
    theirs = merged(plain, [plain.other, plain.adapters[0]], (0, UNIT))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_saved_modules_of_a_raw_state_are_understood(plain, tmp_path):
    """`state_dict()` of PEFT's model names both the trained copy of a module and the base's own."""
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    folder = make_adapter(plain.base.path, tmp_path / "adapter", 2, **settings)
    head, base = "base_model.model.lm_head", load_model(plain.base.path, torch.float32).lm_head.weight.detach()
    raw = {f"{head}.original_module.weight": base.clone()}
    expected = merged(plain, [plain.other, plain.adapter(folder)], (0, UNIT))
    rewrite(folder, lambda x: x.update(raw | {f"{head}.modules_to_save.default.weight": x.pop(f"{head}.weight")}))
    mine = merged(plain, [plain.other, plain.adapter(folder)], (0, UNIT))
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    rewrite(folder, lambda x: x[f"{head}.original_module.weight"].add_(1))
    with pytest.raises(InputError, match="another lm_head"):
        plain.adapter(folder)


@pytest.mark.parametrize("version", ["0.18.1", "0.21.0"])
def test_factors_of_square_experts_are_laid_out_as_the_version_of_peft_says(tmp_path, version):
    """Until 0.18 the factors of a stack [experts, second, third] mapped second to third: B_e A_e is its transpose."""
    world = World(tmp_path, *CASES["experts"])
    folder = world.adapters[0].path
    name = "model.layers.0.mlp.experts.gate_up_proj"
    new = merged(world, [world.other, world.adapters[0]], (0, UNIT))[name]
    configure(folder, peft_version=version)
    mine = merged(world, [world.other, world.adapter(folder)], (0, UNIT))[name]
    base = dict(load_model(world.base.path, torch.float32).named_parameters())[name].detach()
    expected = new - base if version == "0.21.0" else (new - base).mT
    torch.testing.assert_close(mine - base, expected, rtol=1e-5, atol=1e-6)


def test_factors_of_experts_in_peft_s_old_layout_are_told_by_their_shape(tmp_path):
    world = World(tmp_path, *CASES["experts' last"])
    folder, name = world.adapters[0].path, "model.layers.1.mlp.experts.down_proj"
    expected = merged(world, [world.other, world.adapters[0]], (0, UNIT))[name]

    def to_old(tensors):
        """B_e A_e = (A_e^T B_e^T)^T : swap the factors, each with its own order of ranks and experts."""
        for module in {key.rpartition(".lora_")[0] for key in tensors if ".experts." in key}:
            down, up = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
            down_ERI, up_ORE = down.reshape(4, 4, -1), up.reshape(-1, 4, 4)
            tensors[f"{module}.lora_A.weight"] = up_ORE.permute(2, 1, 0).reshape(16, -1).contiguous()
            tensors[f"{module}.lora_B.weight"] = down_ERI.permute(2, 1, 0).reshape(-1, 16).contiguous()

    rewrite(folder, to_old)
    mine = merged(world, [world.other, world.adapter(folder)], (0, UNIT))[name]
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


TIED = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both apart": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved apart": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3]}},
    "other tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [2], "lm_head": [3]}},
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return World(tmp_path_factory.mktemp("tied"), "llama tied", CASES["lora"][1])


@pytest.mark.parametrize("case", TIED)
def test_an_adapter_that_trains_tied_weights_apart_is_refused(tied, tmp_path, case):
    folder = make_adapter(tied.base.path, tmp_path / "adapter", 5, **TIED[case])
    with pytest.raises(InputError, match="ensure_weight_tying"):
        tied.adapter(folder)


def test_an_adapter_of_a_vision_language_model_may_change_its_language_model_alone(tmp_path):
    world = World(tmp_path, "llava", {"target_modules": r".*language_model.*q_proj"})
    assert merged(world, world.adapters, (0, UNIT))
    folder = make_adapter(world.base.path, tmp_path / "adapter", 5, target_modules=["q_proj"])
    with pytest.raises(InputError, match="no part of the base's language model"):
        world.adapter(folder)


BAD = {
    "no such folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "has no adapter_config.json": lambda folder: (folder / CONFIG).unlink(),
    "has no adapter_model.safetensors": lambda folder: (folder / WEIGHTS).unlink(),
    "is pickled": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "is of the kind 'IA3'": lambda folder: configure(folder, peft_type="IA3"),
    "the config says lora_bias": lambda folder: configure(folder, lora_bias=True),
    "merge_and_unload": lambda folder: configure(folder, peft_type="VERA"),
    "acts on the input": lambda folder: configure(folder, peft_type="PROMPT_TUNING"),
    "is of the kind 'XLORA'": lambda folder: configure(folder, peft_type="XLORA"),
    "'pissa', which changed": lambda folder: configure(folder, init_lora_weights="pissa"),
    "'pissa_niter_16', which changed": lambda folder: configure(folder, init_lora_weights="pissa_niter_16"),
    "'olora', which changed": lambda folder: configure(folder, init_lora_weights="olora"),
    "'corda', which changed": lambda folder: configure(folder, init_lora_weights="corda"),
    "'loftq', which changed": lambda folder: configure(folder, init_lora_weights="loftq"),
    "'lora_ga', which changed": lambda folder: configure(folder, init_lora_weights="lora_ga"),
    "has alora_invocation_tokens": lambda folder: configure(folder, alora_invocation_tokens=[5, 6]),
    "has layer_replication": lambda folder: configure(folder, layer_replication=[[0, 2], [1, 2]]),
    "has megatron_config": lambda folder: configure(folder, megatron_config={"a": 1}, megatron_core="antigravity"),
    "has arrow_config": lambda folder: configure(folder, arrow_config={"top_k": 2}),
    "has kasa_config": lambda folder: configure(folder, kasa_config={"beta": 1e-4}),
    "has use_bdlora": lambda folder: configure(folder, use_bdlora={"nblocks": 2}),
    "has monteclora_config": lambda folder: configure(folder, monteclora_config={"num_samples": 8}),
    "has velora_config": lambda folder: configure(folder, velora_config={"num_groups": 8}),
    "has rank_pattern that": lambda folder: configure(folder, rank_pattern={"(": 3}),
    "has alpha_pattern that": lambda folder: configure(folder, alpha_pattern=["q_proj"]),
    "has rank 4, its config says 8": lambda folder: configure(folder, r=8),
    "has rank 3, its config says 4": lambda folder: rewrite(
        folder,
        lambda x: x.update(
            {
                (name := first(x, "A.weight")): x[name][:3].clone(),
                (other := name.replace("_A.", "_B.")): x[other][:, :3].clone(),
            }
        ),
    ),
    "has empty factors": lambda folder: rewrite(folder, lambda x: x.update({name: x[name][:0] for name in x})),
    "are for the same place": lambda folder: rewrite(
        folder,
        lambda x: x.update({(name := first(x, "A.weight")).replace("A.", "A.other."): x[name].clone()}),
    ),
    "no 1 tokens below 83": lambda folder: rewrite(
        folder,
        lambda x: x.update(
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 16)}
        ),
    ),
    "which PEFT can't merge either": lambda folder: rewrite(
        folder,
        lambda x: x.update({first(x, "B.weight").replace(".weight", ".bias"): torch.ones(16)}),
    ),
    "is edited twice": lambda folder: rewrite(
        folder,
        lambda x: x.update(
            {"base_model.model.model.layers.0.self_attn.q_proj.token_adapter.trainable_tokens_delta": torch.ones(1, 16)}
        ),
    ),
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


def test_factors_of_single_experts_are_told(tmp_path):
    """As PEFT wrote them before transformers 5 stacked the experts."""
    base = zoo.save(tmp_path / "base", "mixtral")
    folder = tmp_path / "adapter"
    folder.mkdir()
    factors = {"lora_A": torch.ones(4, 16), "lora_B": torch.ones(24, 4)}
    modules = [f"model.layers.0.block_sparse_moe.experts.{expert}.w1" for expert in range(4)]
    stored = {
        f"base_model.model.{module}.{part}.weight": x.clone() for module in modules for part, x in factors.items()
    }
    save_file(stored, folder / WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["w1"]}
    (folder / CONFIG).write_text(json.dumps(config))
    header = read_header(base, "base")
    with pytest.raises(InputError, match=r"4 modules are of single experts \(.*experts\.0\.w1\)") as refusal:
        check_adapter(check_base(header), header, read_adapter(folder, "adapter"))
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["checkpoint", "adapters in folders of their names", "empty"])
def test_a_folder_without_an_adapter_says_what_it_has(tmp_path, kind):
    words = {"checkpoint": "`checkpoint:`", "adapters in folders of their names": "such as default", "empty": CONFIG}
    if kind == "checkpoint":
        zoo.save(tmp_path, "llama")
    elif kind != "empty":
        (tmp_path / "default").mkdir()
        (tmp_path / "default" / CONFIG).write_text("{}")
    with pytest.raises(InputError, match=f"has no {CONFIG}") as refusal:
        read_adapter(tmp_path, "distributions.a.adapter")
    assert words[kind] in refusal.value.mend
