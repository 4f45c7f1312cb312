"""Weights that a merge can't combine as they are stored: float64, FP8 with scales, GGUF; converted once, and said."""

import json

import pytest
import torch
import worlds
import zoo
from recorded import RecordedProgress
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dem_opt.checkpoints.architecture import load_model
from dem_opt.checkpoints.convert import conversion_of
from dem_opt.checkpoints.files import INDEX, WEIGHTS, read_header
from dem_opt.checkpoints.fit import check_base
from dem_opt.checkpoints.locate import locate
from dem_opt.config import ModelSource
from dem_opt.errors import InputError
from dem_opt.progress import reporting

FP8 = torch.float8_e4m3fn
MATRIX = "model.layers.0.self_attn.q_proj.weight"


def change(folder, tensors, **settings):
    """Replace a folder's tensors, and fields of its config."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))


def converted(folder):
    """The folder that is read in the place of this one, and its tensors."""
    place = locate(ModelSource(path=folder), "base")
    header = read_header(place, "base")
    check_base(header)
    return place, {name: tensor for file in header.files for name, tensor in load_file(file).items()}


@pytest.fixture
def folder(tmp_path):
    return zoo.save(tmp_path / "model", "llama")


def test_float64_is_rounded_to_float32(folder):
    tensors = {name: tensor.double() * (1 + 1e-12) for name, tensor in load_file(folder / WEIGHTS).items()}
    change(folder, tensors, dtype="float64")
    place, rounded = converted(folder)
    assert place != folder and all(torch.equal(rounded[name], tensor.float()) for name, tensor in tensors.items())
    assert "float64" in conversion_of(place) and str(folder) in conversion_of(place)
    assert json.loads((place / "config.json").read_text())["dtype"] == "float32"
    assert converted(folder)[0] == place


# By case: the end of the scale's name, its values by the shape of the tensor, and what they are for each element.
SCALES = {
    "one for all": ("_scale", lambda rows, columns: torch.tensor(0.5)),
    "one in a list": ("_scale", lambda rows, columns: torch.tensor([0.5])),
    "for each row": ("_scale", lambda rows, columns: torch.rand(rows, 1) + 1),
    "for each row, flat": ("_scale", lambda rows, columns: torch.rand(rows) + 1),
    "blocks": ("_scale_inv", lambda rows, columns: torch.rand(-(-rows // 8), -(-columns // 8)) + 1),
}


@pytest.mark.parametrize("case", SCALES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_is_multiplied_by_its_scales_and_rounded_once(folder, case, dtype):
    end, make = SCALES[case]
    torch.manual_seed(0)
    tensors, expected = {}, {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        expected[name] = tensors[name] = tensor
        if tensor.ndim == 2 and "layers" in name:
            codes, scale = tensor.to(FP8), make(*tensor.shape)
            tensors |= {name: codes, name + end: scale, f"{name.removesuffix('weight')}input_scale": torch.ones(())}
            whole = scale.reshape(-1, 1) if scale.ndim == 1 else scale
            if case == "blocks":
                whole = torch.kron(scale, torch.ones(8, 8))[: tensor.shape[0], : tensor.shape[1]]
            expected[name] = (codes.float() * whole).to(getattr(torch, dtype))
    quantized = {"quant_method": "fp8"} | ({"weight_block_size": [8, 8]} if case == "blocks" else {})
    change(folder, tensors, dtype=dtype, quantization_config=quantized)
    place, rounded = converted(folder)
    assert rounded.keys() == expected.keys()
    assert all(rounded[name].dtype == x.dtype and torch.equal(rounded[name], x) for name, x in expected.items())
    assert "quantization_config" not in json.loads((place / "config.json").read_text())
    assert "FP8" in conversion_of(place) and dtype in conversion_of(place)
    load_model(place, torch.float32)


def test_a_scale_may_lie_in_another_file(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = {"a.safetensors": tensors | {MATRIX: tensors[MATRIX].to(FP8)}}
    parts["b.safetensors"] = {f"{MATRIX}_scale_inv": torch.tensor(2.0)}
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    _, rounded = converted(folder)
    assert torch.equal(rounded[MATRIX], (tensors[MATRIX].to(FP8).float() * 2).to(rounded[MATRIX].dtype))


REFUSED = {
    "no scale": ({MATRIX: lambda x: x.to(FP8)}, f"{MATRIX} is FP8 without a scale"),
    "another tensor's scale": (
        {MATRIX: lambda x: x.to(FP8), f"{MATRIX}_scale": lambda x: torch.ones(3, 3)},
        r"_scale is \[3, 3\], which does not fit",
    ),
    "codes of 8 bits": ({MATRIX: lambda x: x.to(torch.int8)}, "is I8: only F32, BF16, F16 can be merged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_without_what_they_mean_are_refused(folder, case):
    changes, words = REFUSED[case]
    tensors = load_file(folder / WEIGHTS)
    change(folder, tensors | {name: make(tensors[MATRIX]) for name, make in changes.items()})
    with pytest.raises(InputError, match=words):
        converted(folder)


@pytest.fixture
def gguf_files():
    pytest.importorskip("gguf")
    import gguf_files

    return gguf_files


@pytest.fixture
def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": worlds.VOCABULARY + 1, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False))


def tokenizer():
    made = worlds.tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    return made


@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "8 bits"])
def test_a_gguf_file_is_dequantized(gguf_files, llama, tmp_path, quantized, in_folder):
    (tmp_path / "m").mkdir()
    file = gguf_files.save(tmp_path / "m/model.gguf", llama, tokenizer(), quantized)
    progress = RecordedProgress()
    with reporting(progress):
        place, tensors = converted(file.parent if in_folder else file)
    assert any(file.name in phase for phase in progress.phases)
    dtype, error = (torch.bfloat16, 2e-3) if quantized else (torch.float32, 0)
    for name, parameter in llama.named_parameters():
        assert tensors[name].dtype == dtype
        torch.testing.assert_close(tensors[name].float(), parameter.detach(), rtol=error and 8e-3, atol=error)
    assert "GGUF" in conversion_of(place)
    words = AutoTokenizer.from_pretrained(place)("alpha beta")["input_ids"]
    assert words == worlds.tokenizer()("alpha beta")["input_ids"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "two"])
def test_a_damaged_gguf_file_is_refused(gguf_files, llama, tmp_path, damage):
    (tmp_path / "m").mkdir()
    file = gguf_files.save(tmp_path / "m/model.gguf", llama, tokenizer(), quantized=True)
    if damage == "two":
        (tmp_path / "m/other.gguf").write_bytes(file.read_bytes())
    else:
        file.write_bytes(file.read_bytes()[: 500 if damage == "truncated" else 0])
    with pytest.raises(InputError, match="2 GGUF files" if damage == "two" else "can't read this GGUF file") as refused:
        converted(tmp_path / "m")
    assert refused.value.field == "base" and len(str(refused.value)) < 500


@pytest.mark.parametrize("named", ["folder", "first part", "second part"])
def test_a_split_gguf_model_is_told_in_one_line(tmp_path, named):
    """Also where not all of its parts are there."""
    names = ["model-00001-of-00003.gguf", "model-00002-of-00003.gguf"]
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF")
    place = {"folder": tmp_path, "first part": tmp_path / names[0], "second part": tmp_path / names[1]}[named]
    with pytest.raises(InputError, match=r"is split into 3 files.*llama-gguf-split --merge") as refusal:
        converted(place)
    assert refusal.value.where == place and refusal.value.field == "base"
