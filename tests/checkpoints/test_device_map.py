"""Laws of a divided model: no operation meets two devices, and the bits are those of one."""

from pathlib import Path

import numpy as np
import pytest
import test_adapters
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from dem_opt.checkpoints.architecture import empty_model, read_architecture
from dem_opt.checkpoints.device_map import language_model, move_activations, split_layers
from dem_opt.checkpoints.files import content_hash, read_header
from dem_opt.errors import InputError
from dem_opt.evaluation.lm_head import find_head, token_nll
from dem_opt.evaluation.worker import Worker
from dem_opt.merging.merged_model import MergedModel
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, Corpus, Request, StoredModel, Windows, WorkerSpec

DEVICES = [torch.device("cpu", 0), torch.device("cpu", 1)]
"""Two names of one memory: what is moved from one to the other is copied, and what is not moved is not told."""

LAYERS = {"gpt2": "n_layer", "bloom": "n_layer", "t5": "num_layers", "bart": "decoder_layers"}
FOUR = {
    kind: {"text_config": settings["text_config"] | {"num_hidden_layers": 4}}
    if "text_config" in settings
    else {LAYERS.get(kind, "num_hidden_layers"): 4}
    for kind, settings in zoo.MODELS.values()
}
"""Four layers or more, by kind of model."""


class Apart(TorchDispatchMode):
    """Follows on which of DEVICES tensors lie, from parameters on, and refuses an operation that meets both.

    What an operation makes lies where its tensors do; numbers (0-dimensional tensors) and what is made from nothing
    lie nowhere yet.
    """

    def __init__(self, places):
        super().__init__()
        self.places = WeakTensorKeyDictionary(places)
        self.moves = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        met = {self.places[tensor] for tensor in tensors if tensor in self.places and tensor.dim()}
        made = function(*args, **(kwargs or {}))
        device = (kwargs or {}).get("device")
        if function is torch.ops.aten._to_copy.default and device is not None and device.index is not None:
            self.moves += met != {device.index}
            met = {device.index}
        assert len(met) < 2, f"{function} meets two devices: {tensors}"
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and met:
                self.places[leaf] = next(iter(met))
        return made


def apart(model, split, *inputs):
    """The mode that knows where a divided model's tensors are, and that its inputs are on the first device.

    Targets are not followed: `nll` moves them to where hidden states are, which on a CPU does nothing.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    return Apart({tensor: split.places[name] for name, tensor in named} | dict.fromkeys(inputs, 0))


def batch(model):
    ids_BT = torch.randint(3, zoo.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids_BT} | ({"decoder_input_ids": ids_BT.clone()} if model.config.is_encoder_decoder else {})


@pytest.mark.parametrize("name", zoo.MODELS)
@pytest.mark.parametrize("devices", [2, 4])
def test_no_operation_meets_two_devices(name, devices):
    """Forward; autograd sends each gradient back to where its tensor came from."""
    model = zoo.make(name, **FOUR[zoo.MODELS[name][0]] if devices > 2 else {})
    inputs, targets_BT, scored_R = batch(model), torch.ones(2, 9, dtype=torch.long), torch.arange(18)
    with torch.inference_mode():
        whole, head = token_nll(model, inputs, targets_BT, scored_R, None), find_head(model)
    split = split_layers(model, devices)
    assert {*split.places.values()} == {*range(devices)} and min(split.layers) > 0
    move_activations(model, split, [torch.device("cpu", index) for index in range(devices)])
    for lm_head in (head, None):
        with torch.no_grad(), apart(model, split, *inputs.values()) as mode:
            divided = token_nll(model, inputs, targets_BT, scored_R, lm_head)
        assert mode.moves >= devices - 1
        torch.testing.assert_close(divided, whole)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_shares_are_in_order_whole_and_even(name):
    """A layer is on one device, the layers are in order, and no other way to cut them has a smaller largest share."""
    model = zoo.make(name, **FOUR[zoo.MODELS[name][0]])
    split = split_layers(model, 2)
    language = {*language_model(model).modules()}
    parts = [block for block in split.modules if model.get_submodule(block) in language]
    blocks = [block for block in parts if type(model.get_submodule(block)).__name__ in model._no_split_modules]
    order = [split.modules[block] for block in blocks]
    assert order == sorted(order) and split.layers == (order.count(0), order.count(1)) and len(order) >= 4
    for key, place in split.places.items():
        assert all(split.modules[block] == place for block in blocks if key.startswith(f"{block}.")), key
    for module in model.modules():
        assert len({split.places[key] for key, value in named(model) if any(value is x for x in own(module))}) < 2
    assert split.places.keys() == {name for name, _ in named(model)}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = [sum(size for name, size in sizes.items() if name.startswith(f"{block}.")) for block in blocks]
    outside = [sum(sizes[name] for name in sizes if split.places[name] == number) for number in (0, 1)]
    before, behind = outside[0] - sum(layers[: split.layers[0]]), outside[1] - sum(layers[split.layers[0] :])
    cuts = [max(before + sum(layers[:cut]), behind + sum(layers[cut:])) for cut in range(1, len(layers))]
    assert max(outside) == min(cuts)


def named(model):
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def own(module):
    """A module's own parameters and buffers."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def test_tied_weights_lie_on_one_device_and_what_is_behind_the_layers_on_the_last():
    tied, free = (split_layers(zoo.make(name), 2).places for name in ("llama tied", "llama"))
    assert tied["lm_head.weight"] == tied["model.embed_tokens.weight"] == 0 and free["lm_head.weight"] == 1
    assert tied["model.norm.weight"] == free["model.norm.weight"] == 1 and free["model.embed_tokens.weight"] == 0


@pytest.mark.parametrize("name", ["llava", "mistral3", "gemma3, with images", "qwen2_vl", "qwen3_vl"])
def test_layers_that_read_images_are_not_counted(name):
    """Each of these has two layers that read tokens and one that reads images."""
    assert split_layers(zoo.make(name), 2).layers == (1, 1)
    with pytest.raises(InputError, match=r"compute\.gpus_per_worker = 3: \w+ has 2 layers"):
        split_layers(zoo.make(name), 3)


def test_more_devices_than_layers_are_refused():
    assert split_layers(zoo.make("llama"), 2).layers == (1, 1)
    with pytest.raises(InputError, match=r"study.yaml: compute.gpus_per_worker = 3: LlamaForCausalLM has 2 layers"):
        split_layers(zoo.make("llama"), 3, "study.yaml")


KINDS = {
    "exact": {},
    "bfloat16, live in float32": {"dtype": torch.bfloat16},
    "int8": {"vectors": "int8"},
    "from files": {"streamed": True},
}
ARCHITECTURES = ["llama", "llama tied", "gpt2", "mixtral", "t5", "bart", "mamba"]
UNITS = (2 * 10**8, 5 * 10**8, 3 * 10**8)

CASES = [(name, kind) for name in ARCHITECTURES for kind in KINDS if (name, kind) != ("mixtral", "from files")]
"""A mixture's experts are fused on loading, and do not stay in their files."""


class World:
    """A base and two fine-tunes on disk, a corpus, and workers of them on one device and on several."""

    def __init__(self, folder: Path, name: str, dtype=torch.float32, streamed=False, **how):
        stored = [zoo.save(folder / part, name, seed, dtype) for seed, part in enumerate("abc")]
        self.stored = [StoredModel(path, content_hash(path)) for path in stored]
        self.streamed = tuple(checkpoint.content for checkpoint in self.stored[:2]) if streamed else ()
        self.how = how

    def worker(self, devices):
        base, *fine_tunes = self.stored
        how = {"batch_tokens": 48, "streamed": self.streamed, "devices": devices} | self.how
        return Worker(WorkerSpec(base=base, fine_tunes=tuple(fine_tunes), corpora=(corpus(),), **how))

    @property
    def composites(self):
        mixed = Composite.of({checkpoint.content: count for checkpoint, count in zip(self.stored, UNITS, strict=True)})
        return [mixed, Composite.single(self.stored[1].content)]


def corpus():
    ids_WT = np.random.default_rng(0).integers(3, zoo.VOCABULARY, (5, 12))
    positions_WT = np.tile(np.r_[np.arange(7), np.arange(5)], (5, 1))
    return Corpus(distribution="a", split="search", key="key", windows=Windows(ids_WT, positions_WT, positions_WT > 1))


def same_bits(left, right):
    """Bitwise equality of two models' parameters."""
    pairs = zip(left.named_parameters(), right.named_parameters(), strict=True)
    return all(x == y and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for (x, a), (y, b) in pairs)


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def world(request, tmp_path_factory):
    name, kind = request.param
    return World(tmp_path_factory.mktemp("world"), name, **KINDS[kind])


def test_merges_nats_and_gradients_are_those_of_one_device_to_the_bit(world):
    whole, divided = world.worker(1), world.worker(2)
    assert len({segment.device for segment in divided.merged_model._segments}) == 2
    for composite in world.composites:
        requests = [
            Request(ticket=0, composite=composite, corpora=("key",), gradient=gradient) for gradient in (False, True)
        ]
        for request in requests:
            expected, answer = (worker.evaluate(request) for worker in (whole, divided))
            assert expected.scores == answer.scores and expected.gradients == answer.gradients
            assert len(expected.gradients) == request.gradient
        assert same_bits(whole.model, divided.model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("case", test_adapters.CASES)
@pytest.mark.parametrize("streamed", [False, True])
def test_adapters_give_the_bits_of_one_device(tmp_path, case, streamed):
    made = test_adapters.World(tmp_path, *test_adapters.CASES[case])
    header = read_header(made.base.path, "base")
    if streamed and read_architecture(header).layout(header).fused:
        pytest.skip("its tensors are fused while they are loaded, and not read from the file in parts")
    stored, models, results = [made.base, made.other, *made.adapters], [], []
    for devices in (1, 2):
        models.append(empty_model(made.base.path, torch.float32))
        merged_model = MergedModel(
            models[-1], stored, ["cpu"] * devices, streamed=[made.base.content] if streamed else ()
        )
        merged_model.merge(Composite.of({checkpoint.content: UNIT // 4 for checkpoint in stored}))
        inputs = batch(models[-1])
        with merged_model.reduce_gradients(
            made.base.content, [checkpoint.content for checkpoint in stored[1:]]
        ) as sums:
            token_nll(models[-1], inputs, torch.ones(2, 9, dtype=torch.long), torch.arange(18), None).sum().backward()
        results.append((sums, merged_model.nbytes))
    assert results[0] == results[1] and same_bits(*models)


def test_what_lies_on_a_device_are_its_layers_alone(tmp_path):
    """By memory: parameters of one share have one memory, and no other one's."""
    world = World(tmp_path, "llama")
    model = world.worker(2).model
    memories = [set(), set()]
    for name, place in split_layers(model, 2).places.items():
        if name in dict(model.named_parameters()):
            memories[place].add(model.get_parameter(name).untyped_storage().data_ptr())
    assert [len(memory) for memory in memories] == [1, 1] and not memories[0] & memories[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_gpus_give_the_bits_of_one(tmp_path, name):
    world = World(tmp_path, name)
    whole, divided = world.worker(1), world.worker(2)
    devices = {parameter.device.index for parameter in divided.model.parameters()}
    assert devices == {0, 1}
    for composite in world.composites:
        for gradient in (False, True):
            request = Request(ticket=0, composite=composite, corpora=("key",), gradient=gradient)
            expected, answer = (worker.evaluate(request) for worker in (whole, divided))
            assert expected.scores == answer.scores
            assert expected.gradients.get("key", {}) == pytest.approx(answer.gradients.get("key", {}), rel=1e-6)
