"""Laws of loading: a vertex computes what the library computes, and no model sees later tokens."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from test_adapters import LINEAR, make_adapter
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dem_opt.checkpoints.adapters import read_adapter
from dem_opt.checkpoints.files import content_hash
from dem_opt.errors import InputError
from dem_opt.evaluation.forward_check import NotComparableError, compare_forward, refuse_acausal
from dem_opt.types import StoredModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*falling back to its reference.*"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MASKED = {
    "bert": TINY | {"max_position_embeddings": 80},
    "roberta": TINY | {"max_position_embeddings": 80},
    "electra": TINY | {"max_position_embeddings": 80},
    "megatron-bert": TINY | {"max_position_embeddings": 80},
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    "xlm": {"emb_dim": 16, "n_layers": 2, "n_heads": 2},
}
"""Architectures that read in both directions as their configs are by default."""


def stored(folder: Path) -> StoredModel:
    return StoredModel(folder, content_hash(folder))


def random_model(kind: str, **fields) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=83, **MASKED[kind] | fields)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_later_token_changes_no_earlier_loss(name, dtype):
    refuse_acausal(zoo.make(name, dtype=dtype), Path("base"))


@pytest.mark.parametrize("kind", MASKED)
def test_models_that_read_in_both_directions_are_refused(kind):
    with pytest.raises(InputError, match="causal") as refusal:
        refuse_acausal(random_model(kind), Path("base"), "base")
    assert (refusal.value.where, refusal.value.field) == (Path("base"), "base")


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra", "megatron-bert"])
def test_the_same_as_decoders_are_not(kind):
    refuse_acausal(random_model(kind, is_decoder=True), Path("base"))


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_vertex_computes_what_transformers_computes(tmp_path, name):
    base, other = (stored(zoo.save(tmp_path / str(seed), name, seed)) for seed in (0, 1))
    for model in (base, other):
        comparison = compare_forward(base, model)
        assert comparison.difference <= 1e-6 and comparison.library == pytest.approx(comparison.vertex)


@pytest.mark.parametrize("rows", [zoo.VOCABULARY + 5, zoo.VOCABULARY - 5])
def test_a_fine_tune_with_other_tokens_is_compared_on_those_shared(tmp_path, rows):
    base, other = (stored(zoo.save(tmp_path / str(seed), "llama", seed)) for seed in (0, 1))
    model = AutoModelForCausalLM.from_pretrained(other.path)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(other.path)
    assert compare_forward(base, replace(other, vocabulary=base.content)).difference <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_checkpoint_in_another_dtype_computes_the_same(tmp_path, dtype):
    base = stored(zoo.save(tmp_path / "base", "llama", 0, torch.bfloat16))
    assert compare_forward(base, stored(zoo.save(tmp_path / "other", "llama", 1, dtype))).difference == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_computes_what_peft_computes(tmp_path, settings, dtype):
    base = stored(zoo.save(tmp_path / "base", "llama", 0, dtype))
    make_adapter(base.path, tmp_path / "adapter", 1, target_modules=LINEAR, **settings)
    adapter = StoredModel(
        tmp_path / "adapter", read_adapter(tmp_path / "adapter", "a").content(base.content), base.content
    )
    unchanged = compare_forward(base, base)
    comparison = compare_forward(base, adapter)
    assert comparison.difference <= (1e-5 if dtype == torch.float32 else 5e-2)
    assert abs(comparison.library - unchanged.library) > 1e-3, "the adapter does something"


def test_a_configuration_that_nobody_compared_is_seen(tmp_path):
    base, other = (stored(zoo.save(tmp_path / str(seed), "llama", seed)) for seed in (0, 1))
    file = other.path / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps(fields | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}))
    assert compare_forward(base, other).difference > 1e-3


def rename(folder: Path, change: Callable[[str], str]) -> None:
    """Save the tensors under other names."""
    tensors = load_file(folder / "model.safetensors")
    save_file({change(name): x for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def wrapped(folder: Path) -> None:
    """Save the tensors as from a compiled model."""
    rename(folder, lambda name: f"_orig_mod.{name}")


def lost(folder: Path) -> None:
    """Save one tensor under a name that nobody knows."""
    rename(folder, lambda name: name.replace("model.norm", "elsewhere"))


def damaged(folder: Path) -> None:
    """Write a config.json that is none."""
    (folder / "config.json").write_text("{}")


def test_names_of_a_wrapper_are_understood(tmp_path):
    base, other = (zoo.save(tmp_path / str(seed), "llama", seed) for seed in (0, 1))
    wrapped(other)
    assert compare_forward(stored(base), stored(other)).difference == 0


@pytest.mark.parametrize("spoil", [lost, damaged])
def test_what_the_library_does_not_load_is_no_oracle(tmp_path, spoil):
    base, other = (zoo.save(tmp_path / str(seed), "llama", seed) for seed in (0, 1))
    spoil(other)
    with pytest.raises(NotComparableError):
        compare_forward(stored(base), StoredModel(other, "content"))
