"""Files of one model in the forms in which hubs and other tools have them: opened, merged, and exported by name."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
import worlds
import zoo
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaProcessor

from dem_opt.checkpoints.architecture import empty_model, load_model
from dem_opt.checkpoints.files import WEIGHTS, content_hash, read_header
from dem_opt.checkpoints.fit import check_base, check_fit, left_out
from dem_opt.checkpoints.vocabulary import with_base_rows
from dem_opt.errors import InputError
from dem_opt.export.writer import prove, write_composite
from dem_opt.merging.merged_model import MergedModel
from dem_opt.simplex import UNIT
from dem_opt.types import Composite, StoredModel

FIELD = "distributions.code.checkpoint"


def rewrite(folder, change):
    """Replace a folder's tensors by what `change` makes of them."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(change(tensors), folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def as_they_are(tensors):
    return tensors


def prefixed(prefix):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without(prefix):
    return lambda tensors: {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def within(module, wrapper):
    """A wrapper around the modules of this name."""
    return lambda tensors: {name.replace(module, module + wrapper): tensor for name, tensor in tensors.items()}


def adding(**shapes):
    """Tensors of other parts of a model; two underscores stand for a dot."""
    return lambda tensors: (
        tensors | {name.replace("__", "."): torch.full(shape, -1e9) for name, shape in shapes.items()}
    )


def language_model(tensors):
    start = "language_model."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def another_layer(tensors):
    return tensors | {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }


def head_twice(dtype):
    return lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].to(dtype).clone()}


def head_alone(tensors):
    embedding = tensors.pop("model.embed_tokens.weight")
    return tensors | {"lm_head.weight": embedding}


MASKS = {
    f"transformer__h__{layer}__attn__{name}": shape
    for layer in (0, 1)
    for name, shape in (("bias", (1, 1, 64, 64)), ("masked_bias", ()))
}
FREQUENCIES = {f"model__layers__{layer}__self_attn__rotary_emb__inv_freq": (4,) for layer in (0, 1)}


@dataclass
class Form:
    """A form of a model's files: its architecture, what is done to base and fine-tune, and what is said of them."""

    model: str
    base: object = as_they_are
    fine_tune: object = as_they_are
    said_of_base: tuple = ()
    said_of_fine_tune: tuple = ()
    dtype: torch.dtype = torch.float32


FORMS = {
    "masks": Form("gpt2", *2 * [adding(**MASKS)], *2 * [(r"4 tensors .*h\.\*\.attn\.bias \(2\)",)]),
    "masks of the base alone": Form("gpt2", adding(**MASKS), said_of_base=("attn.masked_bias",)),
    "masks of a fine-tune alone": Form("gpt2", fine_tune=adding(**MASKS), said_of_fine_tune=("attn.masked_bias",)),
    "rotary frequencies": Form("llama", *2 * [adding(**FREQUENCIES)], *2 * [("2 tensors .*inv_freq",)]),
    "extra prediction layer": Form("llama", *2 * [another_layer], *2 * [(r"9 tensors .*model\.layers\.2\.",)]),
    "value head": Form(
        "llama", fine_tune=adding(v_head__summary__weight=(1, 16)), said_of_fine_tune=("1 tensor .*v_head",)
    ),
    "reward head": Form("llama tied", fine_tune=adding(score__weight=(2, 16)), said_of_fine_tune=("score.weight",)),
    "compiled": Form("llama", fine_tune=prefixed("_orig_mod."), said_of_fine_tune=("21 tensors .*'_orig_mod.'",)),
    "compiled base": Form("llama tied", prefixed("_orig_mod."), said_of_base=("_orig_mod",)),
    "compiled by layer": Form("llama", fine_tune=within("self_attn.", "_orig_mod."), said_of_fine_tune=("8 tensors",)),
    "distributed": Form("llama", fine_tune=prefixed("module."), said_of_fine_tune=("'module.'",)),
    "distributed, compiled": Form("gpt2", fine_tune=prefixed("module._orig_mod."), said_of_fine_tune=("'module.'",)),
    "sharded": Form(
        "qwen2",
        fine_tune=lambda tensors: prefixed("_fsdp_wrapped_module.")(
            within("layers.0.", "_fsdp_wrapped_module.")(tensors)
        ),
        said_of_fine_tune=("_fsdp_wrapped_module",),
    ),
    "sharded, with checkpoints": Form(
        "llama",
        fine_tune=within("layers.0.", "_fsdp_wrapped_module._checkpoint_wrapped_module."),
        said_of_fine_tune=("9 tensors .*_fsdp_wrapped_module.*9 tensors .*_checkpoint_wrapped_module",),
    ),
    "within an adapter's model": Form(
        "llama", fine_tune=prefixed("base_model.model."), said_of_fine_tune=("'base_model.model.'",)
    ),
    "doubled": Form("llama", fine_tune=prefixed("model.")),
    "of any name": Form("gpt_neox", prefixed("policy.net."), said_of_base=("'policy.net.'",)),
    "not named after the base model": Form("llama", fine_tune=without("model.")),
    "not named after the base model, tied": Form("gpt2", without("transformer.")),
    "fused experts, compiled": Form("mixtral", fine_tune=prefixed("_orig_mod."), said_of_fine_tune=("_orig_mod",)),
    "encoder-decoder, compiled": Form("t5", prefixed("module."), said_of_base=("module",)),
    "reads images": Form("mistral3", said_of_base=("vision_tower",), said_of_fine_tune=("vision_tower",)),
    "reads images, compiled": Form(
        "llava", prefixed("_orig_mod."), said_of_base=("_orig_mod", "vision_tower"), said_of_fine_tune=("vision_tower",)
    ),
    "the language model alone of one that reads images": Form(
        "llava",
        fine_tune=language_model,
        said_of_base=("vision_tower",),
        said_of_fine_tune=("'model.' in the place of 'model.language_model.'",),
    ),
    "tied head stored": Form("llama tied", head_twice(torch.float32)),
    "tied head of a fine-tune": Form("llama tied", fine_tune=head_twice(torch.float32)),
    "tied head in another dtype": Form("llama tied", fine_tune=head_twice(torch.float32), dtype=torch.bfloat16),
    "tied head alone": Form("llama tied", fine_tune=head_alone),
    "tied head alone in the base": Form("llama tied", head_alone),
}


class World:
    """A base and a fine-tune as transformers saves them, and the same in another form."""

    def __init__(self, folder, form):
        self.plain = [
            zoo.save(folder / "plain" / part, form.model, seed, form.dtype) for seed, part in enumerate(("base", "a"))
        ]
        folders = [zoo.save(folder / part, form.model, seed, form.dtype) for seed, part in enumerate(("base", "a"))]
        for path, change in zip(folders, (form.base, form.fine_tune), strict=True):
            rewrite(path, change)
        self.stored = [StoredModel(path, content_hash(path)) for path in folders]
        self.headers = [read_header(path, name) for path, name in zip(folders, ("base", FIELD), strict=True)]
        self.architecture = check_base(self.headers[0])
        check_fit(self.architecture, *self.headers)


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture(scope="module")
def world(form, tmp_path_factory):
    return World(tmp_path_factory.mktemp("forms"), form)


def test_vertices_are_the_models_to_the_bit(world):
    model = empty_model(world.stored[0].path, torch.float32)
    merged_model = MergedModel(model, world.stored)
    for stored, plain in zip(world.stored, world.plain, strict=True):
        merged_model.merge(Composite.single(stored.content))
        expected = dict(load_model(plain, torch.float32).named_parameters())
        mine = dict(model.named_parameters())
        assert all(torch.equal(mine[name], expected[name]) for name in world.architecture.parameters)


def test_transformers_loads_the_same(world):
    for stored, plain in zip(world.stored, world.plain, strict=True):
        mine, expected = (dict(load_model(path, torch.float32).named_parameters()) for path in (stored.path, plain))
        assert mine.keys() == expected.keys()
        assert all(torch.equal(mine[name], expected[name]) for name in world.architecture.parameters)


def test_what_is_left_out_is_said(world, form):
    for header, words in zip(world.headers, (form.said_of_base, form.said_of_fine_tune), strict=True):
        lines = left_out(world.architecture, header)
        assert bool(lines) == bool(words)
        assert all(re.search(expected, "; ".join(lines)) for expected in words)


@pytest.mark.parametrize("units", [(UNIT // 4, 3 * UNIT // 4), (0, UNIT)])
def test_an_export_has_the_tensors_of_the_bases_file(world, tmp_path, units, capfd):
    """It is read back without a report of the library's on what it passes over."""
    composite = Composite.of(
        {checkpoint.content: count for checkpoint, count in zip(world.stored, units, strict=True) if count}
    )
    by_content = {checkpoint.content: checkpoint for checkpoint in world.stored}
    prove(write_composite(world.stored[0], by_content, composite, tmp_path / "out", lambda written: {}))
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    layout = world.architecture.layout(world.headers[0])
    base = {layout.renaming(name): tensor for name, tensor in load_file(world.stored[0].path / WEIGHTS).items()}
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert {name: (x.shape, x.dtype) for name, x in written.items()} == {
        name: (x.shape, x.dtype) for name, x in base.items()
    }
    assert all(torch.equal(written[name], base[name]) for name in map(layout.renaming, layout.kept))


def empty(tensors):
    return {name: torch.empty(0) for name in tensors}


def beside_each_other(tensors):
    return prefixed("student.")(tensors) | prefixed("teacher.")({name: x + 1 for name, x in tensors.items()})


def unmerged(tensors):
    name = "model.layers.0.self_attn.q_proj"
    weight = tensors.pop(f"{name}.weight")
    factors = {f"{name}.lora_{part}.default.weight": torch.zeros(2, 2) for part in "AB"}
    return prefixed("base_model.model.")(tensors | {f"{name}.base_layer.weight": weight} | factors)


def with_bias(tensors):
    return tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}


def strange(tensors):
    return {f"net.{number}": tensor for number, tensor in enumerate(tensors.values())}


def another_head(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}


REFUSED = {
    "placeholders": ("llama", empty, {}, "21 tensors of size 0.*ZeRO-3"),
    "flat shards": ("llama", lambda tensors: {"_fsdp_wrapped_module._flat_param": torch.ones(9)}, {}, "shards of FSDP"),
    "two models": ("llama", beside_each_other, {}, "several models, named 'student.', 'teacher.'"),
    "an adapter that is not merged": ("llama", unmerged, {}, "holds an adapter's factors .*lora_A"),
    "a bias that its own config has": ("llama", with_bias, {"attention_bias": True}, "q_proj.bias is unknown"),
    "strange names": ("llama", strange, {}, r"missing; it has net\.\* \(21\) instead"),
    "no head": ("llama", without("lm_head."), {}, "lm_head.weight is missing"),
    "a tied head that was rounded": ("llama tied", head_twice(torch.bfloat16), {}, "differ, but .*base.* ties them"),
    "a head of its own": ("llama tied", another_head, {"tie_word_embeddings": False}, "differ, but .*base.* ties them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_merged_is_refused(tmp_path, case):
    model, change, settings, words = REFUSED[case]
    base, other = (zoo.save(tmp_path / part, model, seed) for seed, part in enumerate(("base", "other")))
    rewrite(other, change)
    configure(other, **settings)
    header = read_header(base, "base")
    with pytest.raises(InputError, match=words) as refused:
        check_fit(check_base(header), header, read_header(other, FIELD))
    assert refused.value.where == other and refused.value.field == FIELD and len(str(refused.value)) < 900


@pytest.mark.parametrize(("field", "words"), [("base", "is an adapter: the base is"), (FIELD, "`adapter:`")])
def test_an_adapter_is_no_checkpoint(tmp_path, field, words):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=words):
        read_header(tmp_path, field)


@pytest.mark.parametrize(
    ("base_ties", "fine_tune_ties"), [(False, True), (True, False)], ids=["untied base", "tied base"]
)
def test_a_tied_fine_tune_of_an_untied_base_has_its_embedding_as_head(tmp_path, base_ties, fine_tune_ties):
    """And an untied fine-tune of a tied base has to be tied in fact."""
    folders = [
        zoo.save(tmp_path / part, "llama", seed, tie_word_embeddings=ties)
        for seed, part, ties in ((0, "base", base_ties), (1, "a", fine_tune_ties))
    ]
    if not fine_tune_ties:
        rewrite(folders[1], lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    headers = [read_header(folder, FIELD) for folder in folders]
    check_fit(check_base(headers[0]), *headers)
    stored = [StoredModel(folder, content_hash(folder)) for folder in folders]
    model = empty_model(folders[0], torch.float32)
    MergedModel(model, stored).merge(Composite.single(stored[1].content))
    expected = load_model(folders[1], torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    composite = Composite.of({stored[0].content: UNIT // 2, stored[1].content: UNIT // 2})
    by_content = {checkpoint.content: checkpoint for checkpoint in stored}
    prove(write_composite(stored[0], by_content, composite, tmp_path / "out", lambda written: {}))
    assert read_header(tmp_path / "out", "out").tensors.keys() == headers[0].tensors.keys()


def resized(path, rows):
    """Give a saved model another number of tokens, with rows of its own."""
    model = load_model(path, torch.float32)
    torch.manual_seed(rows)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.weight.add_(torch.randn_like(embedding.weight), alpha=0.1)
    model.save_pretrained(path)


ROWS = {
    "added": ("llama", {"a": 2}),
    "added, tied": ("llama tied", {"a": 2}),
    "added, with a bias": ("phi", {"a": 5}),
    "fewer": ("llama", {"a": -3}),
    "fewer, tied": ("llama tied", {"a": -3}),
    "padded and fewer": ("gpt2", {"a": 13, "b": -3}),
    "encoder-decoder": ("bart", {"a": 4}),
}


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_a_composite_has_the_bases_rows(tmp_path, case, streamed):
    """Rows beyond are left out; those that a fine-tune lacks are the base's."""
    name, changes = ROWS[case]
    folders = {part: zoo.save(tmp_path / part, name, seed) for seed, part in enumerate(("base", "a", "b"))}
    for part, change in changes.items():
        resized(folders[part], zoo.VOCABULARY + change)
    base = read_header(folders["base"], "base")
    architecture = check_base(base)
    headers = {}
    for part in ("a", "b"):
        header = read_header(folders[part], FIELD)
        check_fit(architecture, base, header)
        headers[part] = with_base_rows(architecture, base, header)
        said = [line for line in left_out(architecture, headers[part]) if "rows" in line]
        assert bool(said) == (part in changes) and f"{zoo.VOCABULARY}" in "".join([*said, str(zoo.VOCABULARY)])
    stored = [StoredModel(folder, content_hash(folder)) for folder in folders.values()]
    model = empty_model(folders["base"], torch.float32)
    contents = {checkpoint.content for checkpoint in stored} if streamed else ()
    merged_model = MergedModel(model, stored, streamed=contents)
    base_parameters = dict(load_model(folders["base"], torch.float32).named_parameters())
    for checkpoint in stored:
        merged_model.merge(Composite.single(checkpoint.content))
        for parameter, theirs in load_model(checkpoint.path, torch.float32).named_parameters():
            rows = slice(min(len(theirs), len(base_parameters[parameter])))
            expected = base_parameters[parameter].clone()
            expected.data[rows] = theirs[rows]
            assert torch.equal(model.get_parameter(parameter), expected)
    composite = Composite.of({stored[0].content: UNIT // 2, stored[1].content: UNIT // 2})
    by_content = {checkpoint.content: checkpoint for checkpoint in stored}
    prove(write_composite(stored[0], by_content, composite, tmp_path / "out", lambda written: {}))
    written, original = (read_header(folder, "out").tensors for folder in (tmp_path / "out", folders["base"]))
    assert {name: x.shape for name, x in written.items()} == {name: x.shape for name, x in original.items()}


def test_other_tokens_by_the_same_ids_are_refused(tmp_path):
    folders = [zoo.save(tmp_path / part, "llama", seed) for seed, part in enumerate(("base", "a"))]
    resized(folders[1], zoo.VOCABULARY + 1)
    for folder, word in zip(folders, ("left", "right"), strict=True):
        tokens = {"vocab": {"first": 0, word: 1}, "type": "WordLevel"}
        (folder / "tokenizer.json").write_text(json.dumps({"model": tokens, "added_tokens": []}))
    base = read_header(folders[0], "base")
    with pytest.raises(InputError, match=r"1 ids .*id 1: 'right', the base's 'left'") as refused:
        check_fit(check_base(base), base, read_header(folders[1], FIELD))
    assert refused.value.where == folders[1] / "tokenizer.json"


def save_processor(folder, form):
    """A processor of images and text, in one file as it is saved today, or in two as in older folders."""
    tokenizer = worlds.tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    size = {"height": 28, "width": 28}
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default").save_pretrained(folder)
    if form == "two files":
        file = folder / "processor_config.json"
        settings = json.loads(file.read_text())
        (folder / "preprocessor_config.json").write_text(json.dumps(settings.pop("image_processor")))
        file.write_text(json.dumps(settings))


@pytest.mark.parametrize("form", ["one file", "two files"])
def test_an_export_loads_with_the_bases_processor(tmp_path, form):
    folders = [zoo.save(tmp_path / part, "llava", seed) for seed, part in enumerate(("base", "a"))]
    save_processor(folders[0], form)
    stored = [StoredModel(folder, content_hash(folder)) for folder in folders]
    by_content = {checkpoint.content: checkpoint for checkpoint in stored}
    composite = Composite.of({checkpoint.content: UNIT // 2 for checkpoint in stored})
    prove(write_composite(stored[0], by_content, composite, tmp_path / "out", lambda written: {}))
    base, exported = (AutoProcessor.from_pretrained(folder) for folder in (folders[0], tmp_path / "out"))
    image = Image.effect_noise((40, 30), 50).convert("RGB")
    expected, inputs = (each(images=image, text="alpha <image>", return_tensors="pt") for each in (base, exported))
    assert type(exported) is type(base) is LlavaProcessor and inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
