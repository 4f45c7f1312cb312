"""Reading checkpoints: what is refused, what fits, and what a content hash depends on."""

import json
import os
import shutil
import struct

import pytest
import torch
import worlds
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
)

from dem_opt.checkpoints.adapters import read_adapter
from dem_opt.checkpoints.architecture import empty_model, read_architecture
from dem_opt.checkpoints.files import (
    CONTENTS,
    INDEX,
    WEIGHTS,
    content_hash,
    known_content,
    read_header,
    read_into,
    read_tensors,
)
from dem_opt.checkpoints.fit import check_base, check_fit
from dem_opt.checkpoints.loading import read_parameters
from dem_opt.checkpoints.user_cache import entry_file
from dem_opt.errors import InputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
WIDE = SMALL | {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    worlds.save_model(folder, seed=0)
    return folder


@pytest.fixture
def base(original):
    return read_header(original, "base")


@pytest.fixture
def other(original, tmp_path):
    """A copy of the base, to be changed."""
    return shutil.copytree(original, tmp_path / "other")


def rewrite(folder, change):
    """Change a folder's tensors by name."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def shard(folder, size="2KB"):
    """Save the folder's model in several files."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size=size)
    (folder / WEIGHTS).unlink(missing_ok=True)
    return folder


def truncate(file, size):
    with file.open("r+b") as stream:
        stream.truncate(size)


def rename_shards(folder, name):
    index = json.loads((shard(folder) / INDEX).read_text())
    index["weight_map"][EMBEDDING] = name
    (folder / INDEX).write_text(json.dumps(index))


def pickle_only(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def write_header(folder, text, data=b""):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def quantize(tensors):
    tensors[EMBEDDING] = tensors[EMBEDDING].to(torch.int8)


BAD_FILES = {
    "no such folder": lambda folder: shutil.rmtree(folder),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "has no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "pickled weights only": pickle_only,
    "truncated: tensor": lambda folder: truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1),
    "truncated or not": lambda folder: truncate(folder / WEIGHTS, 100),
    "not a safetensors file": lambda folder: truncate(folder / WEIGHTS, 3),
    "unreadable safetensors header": lambda folder: write_header(folder, b"not JSON"),
    "safetensors header: copy": lambda folder: write_header(
        folder, b'{"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}', bytes(4)
    ),
    "hold no tensors": lambda folder: write_header(folder, b"{}"),
    "shard outside its own folder": lambda folder: rename_shards(folder, "../other/x.safetensors"),
    "shard that is not there": lambda folder: rename_shards(folder, "gone.safetensors"),
    "JSON with a `weight_map`": lambda folder: (shard(folder) / INDEX).write_text("[]"),
}


@pytest.mark.parametrize("words", BAD_FILES)
def test_a_damaged_checkpoint_is_refused_from_its_headers(other, words):
    BAD_FILES[words](other)
    with pytest.raises(InputError) as refused:
        read_header(other, "distributions.code.checkpoint")
    assert words in str(refused.value)
    assert str(refused.value.where).startswith(str(other))
    assert refused.value.field == "distributions.code.checkpoint"


@pytest.mark.parametrize("sharded", [False, True])
def test_a_header_tells_what_the_files_hold(other, sharded):
    stored = {name: tensor.clone() for name, tensor in load_file(other / WEIGHTS).items()}
    header = read_header(shard(other) if sharded else other, "base")
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    assert (len(header.files) > 1) == sharded
    names = sorted(stored, reverse=True)
    read = list(read_tensors(header, names))
    assert [name for name, _ in read] == names
    assert all(torch.equal(tensor, stored[name]) for name, tensor in read)


def test_the_architecture_counts_tied_weights_once(base):
    architecture = check_base(base)
    assert architecture.name == "LlamaForCausalLM"
    assert architecture.aliases == {HEAD: EMBEDDING}
    assert architecture.embedding == EMBEDDING
    assert architecture.parameters.keys() == base.tensors.keys()


BAD_CONFIGS = {
    "not JSON": "{",
    "no model type": "{}",
    "unknown model type": '{"model_type": "abacus"}',
    "no causal language model": '{"model_type": "vit"}',
    "sizes of the wrong type": '{"model_type": "llama", "hidden_size": "wide"}',
    "sizes that do not divide": '{"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}',
    "code of its own": '{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}',
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_makes_no_model_is_refused(other, case):
    (other / "config.json").write_text(BAD_CONFIGS[case])
    with pytest.raises(InputError) as refused:
        check_base(read_header(other, "base"))
    assert refused.value.field == "base" and str(other) in str(refused.value)


def test_a_base_whose_weights_are_not_its_configs_is_refused(other):
    configure(other, num_hidden_layers=2)
    with pytest.raises(InputError, match=r"not the parameters of a LlamaForCausalLM: .*layers\.1\..* are missing"):
        check_base(read_header(other, "base"))


def test_weights_of_a_kind_that_can_not_be_merged_are_refused(other):
    rewrite(other, quantize)
    with pytest.raises(InputError, match=r"embed_tokens\.weight is I8: only F32, BF16, F16 can be merged"):
        check_base(read_header(other, "base"))


def test_tensors_that_older_versions_stored_are_passed_over(other):
    rewrite(other, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    architecture = check_base(read_header(other, "base"))
    header = read_header(other, "checkpoint")
    assert "inv_freq" not in "".join(name for name, _ in read_parameters(architecture, header, architecture.parameters))


def test_a_dtype_of_its_own_is_no_misfit(base, other):
    rewrite(other, halve)
    architecture = check_base(base)
    header = read_header(other, "distributions.code.checkpoint")
    check_fit(architecture, base, header)
    read = dict(read_parameters(architecture, header, architecture.parameters))
    assert read["model.norm.weight"].dtype == torch.bfloat16 and read[EMBEDDING].dtype == torch.float32


def test_an_added_token_may_be_beyond_the_embedding(other):
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["added_tokens"].append(dict(tokenizer["added_tokens"][0], id=worlds.VOCABULARY, content="<new>"))
    file.write_text(json.dumps(tokenizer))
    check_base(read_header(other, "base"))


def test_a_tokenizer_with_a_vocabulary_beyond_the_embedding_is_refused(other):
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["<new>"] = worlds.VOCABULARY
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=f"vocabulary has id {worlds.VOCABULARY}, .* only {worlds.VOCABULARY} rows"):
        check_base(read_header(other, "base"))


def store_twice(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()


@pytest.mark.parametrize("twice", ["neither", "base", "other", "both"])
def test_tied_weights_may_be_stored_once_or_twice(original, tmp_path, twice):
    headers = []
    for name in ("base", "other"):
        folder = shutil.copytree(original, tmp_path / name)
        if twice in (name, "both"):
            rewrite(folder, store_twice)
        headers.append(read_header(folder, name))
    check_fit(check_base(headers[0]), *headers)


def narrow(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()


def halve(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()


def cut_columns(tensors):
    tensors[EMBEDDING] = tensors[EMBEDDING][:, :-1].clone()


def untie(tensors):
    tensors[HEAD] = tensors[EMBEDDING] + 1


def rename_layers(tensors):
    for name in [name for name in tensors if "layers.0" in name]:
        tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)


MISFITS = {
    r"norm.weight is \[15\], not \[16\]": narrow,
    r"embed_tokens.weight is \[320, 15\], not \[320, 16\]": cut_columns,
    "embed_tokens.weight is missing": lambda tensors: tensors.pop(EMBEDDING),
    "differ, but the config.json of the base .* ties them": untie,
    r"layers\.0\..* are missing; it has model\.layers\.7\..* instead": rename_layers,
}


@pytest.mark.parametrize("words", MISFITS)
def test_a_checkpoint_that_does_not_fit_is_told_by_name_and_shapes(base, other, words):
    rewrite(other, MISFITS[words])
    with pytest.raises(InputError, match=words) as refused:
        check_fit(read_architecture(base), base, read_header(other, "distributions.code.checkpoint"))
    assert refused.value.where == other and refused.value.field == "distributions.code.checkpoint"


def test_another_vocabulary_in_the_config_is_refused(base, other):
    configure(other, vocab_size=worlds.VOCABULARY + 1)
    with pytest.raises(InputError, match=r"a vocabulary \(vocab_size\) of 321, the base's of 320"):
        check_fit(read_architecture(base), base, read_header(other, "distributions.code.checkpoint"))


def rename(folder):
    (folder / WEIGHTS).rename(folder / "model-1.safetensors")
    weight_map = dict.fromkeys(load_file(folder / "model-1.safetensors"), "model-1.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


SAME = {
    "shards": shard,
    "more shards": lambda folder: shard(folder, "1KB"),
    "file name": rename,
    "config": lambda folder: configure(folder, rope_theta=5e5),
    "order": lambda folder: rewrite(folder, lambda tensors: tensors.update(reversed(list(tensors.items())))),
}


@pytest.mark.parametrize("case", SAME)
def test_content_is_tensors_and_nothing_else(original, other, case):
    SAME[case](other)
    assert content_hash(other) == content_hash(original)


def flip(folder, byte):
    """Flip the lowest bit of one byte of the data."""
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.seek(byte, os.SEEK_END if byte < 0 else os.SEEK_SET)
        value = stream.read(1)[0] ^ 1
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([value]))


def rename_tensor(tensors):
    tensors["model.last_norm.weight"] = tensors.pop("model.norm.weight")


def reshape(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(4, 4)


DIFFERENT = {
    "last bit": lambda folder: flip(folder, -4),
    "a bit in the middle": lambda folder: flip(folder, -4000),
    "name": lambda folder: rewrite(folder, rename_tensor),
    "shape": lambda folder: rewrite(folder, reshape),
    "dtype": lambda folder: rewrite(folder, halve),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_any_change_of_a_tensor_changes_the_content(original, other, case):
    DIFFERENT[case](other)
    assert content_hash(other) != content_hash(original)


def test_content_is_known_until_a_file_changes(other):
    """The same size and inode, and the time set back as `cp -p` and rsync do, are not believed."""
    known = content_hash(other)
    assert known_content(read_header(other, "base")) == known
    stat = (other / WEIGHTS).stat()
    flip(other, -4)
    os.utime(other / WEIGHTS, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert known_content(read_header(other, "base")) is None
    assert content_hash(other) != known


@pytest.mark.parametrize("kept", ["nothing", "[]", '{"a": 3', "a file where the folder would be"])
def test_a_cache_that_can_not_be_used_is_done_without(original, tmp_path, monkeypatch, kept):
    known = content_hash(original)
    cache = tmp_path / "cache"
    if kept.startswith("a file"):
        cache.write_text("")
    elif kept != "nothing":
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        entry_file(CONTENTS, str(original.resolve())).parent.mkdir(parents=True)
        entry_file(CONTENTS, str(original.resolve())).write_text(kept)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    assert [content_hash(original) for _ in range(2)] == [known, known]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_every_time(other, dtype, value):
    def spoil(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})
        tensors[EMBEDDING][-1, -1] = value

    rewrite(other, spoil)
    for _ in range(2):
        with pytest.raises(InputError, match=f"{EMBEDDING} has NaN or infinite") as refused:
            content_hash(other, "distributions.code.checkpoint")
        assert refused.value.where == other / WEIGHTS
        assert refused.value.field == "distributions.code.checkpoint"


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**WIDE),
    "llama3": LlamaConfig(**WIDE, rope_parameters=LLAMA3),
    "gpt2": GPT2Config(**SMALL),
    "mistral": MistralConfig(**WIDE),
    "gemma2": Gemma2Config(**WIDE),
    "falcon": FalconConfig(**SMALL),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_model_is_the_loaded_one_without_weights(tmp_path, name, dtype):
    AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    check_base(read_header(tmp_path, "base"))
    empty, loaded = empty_model(tmp_path, dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert [(name, p.shape, p.dtype) for name, p in empty.named_parameters()] == [
        (name, p.shape, p.dtype) for name, p in loaded.named_parameters()
    ]
    buffers = dict(loaded.named_buffers())
    assert dict(empty.named_buffers()).keys() == buffers.keys()
    for name, buffer in empty.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name
    assert not empty.training and not any(p.requires_grad for p in empty.parameters())
    assert all(p.untyped_storage().nbytes() <= 4 for p in empty.parameters())


@pytest.mark.parametrize("most", [1, 1000, 2**30])
def test_what_is_read_to_its_place_is_what_is_stored(base, monkeypatch, most):
    monkeypatch.setattr("dem_opt.checkpoints.files.MOST_READ_BYTES", most)
    stored = dict(read_tensors(base, base.tensors))
    places = {name: torch.empty_like(tensor) for name, tensor in reversed(stored.items())}
    read_into(base, places.items())
    assert all(torch.equal(places[name], tensor) for name, tensor in stored.items())


def test_a_file_that_became_shorter_is_told(base, other):
    header = read_header(other, "base")
    places = {name: torch.empty_like(tensor) for name, tensor in read_tensors(base, base.tensors)}
    with (other / WEIGHTS).open("r+b") as file:
        file.truncate((other / WEIGHTS).stat().st_size - 1)
    with pytest.raises(InputError, match="has become shorter"):
        read_into(header, places.items())


@pytest.mark.parametrize("value", ["somebody/kernel", {"text_config": "somebody/kernel"}])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_that_names_code_on_the_hub_is_refused(tmp_path, key, value):
    worlds.save_model(tmp_path / "model", seed=0)
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(InputError, match="remove the key") as refusal:
        read_header(tmp_path / "model", "base")
    assert refusal.value.where == file and refusal.value.field == f"base: {key}"


@pytest.mark.parametrize("read", [read_header, read_adapter])
def test_a_file_in_the_place_of_a_folder_is_told(tmp_path, read):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    for place, mend in ((file, "is a file"), (tmp_path / "gone", "no such folder")):
        with pytest.raises(InputError, match=mend) as refusal:
            read(place, "distributions.math.checkpoint")
        assert refusal.value.where == place
