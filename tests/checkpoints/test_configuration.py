"""Laws of configurations: what computes is compared, labels are not, and spellings do not matter."""

import json
from pathlib import Path
from typing import Any

import pytest
import worlds
import zoo

from dem_opt.checkpoints.configuration import LABELS, check_configuration, read_configuration
from dem_opt.errors import InputError


@pytest.fixture
def folders(tmp_path):
    """Writes two config.json, the second with changed fields, and returns their folders."""

    def write(name: str, changes: dict[str, Any], of_base: dict[str, Any] | None = None) -> tuple[Path, Path]:
        base = json.loads(zoo.config(name).to_json_string(use_diff=False)) | (of_base or {})
        for folder, fields in (("base", base), ("other", base | changes)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "config.json").write_text(json.dumps(fields))
        return tmp_path / "base", tmp_path / "other"

    return write


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}
COMPUTING = [
    ("llama", {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, "rope_parameters.rope_theta"),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 1e4}}, "rope_parameters.factor"),
    ("llama", {"rope_parameters": LONG, "max_position_embeddings": 32}, "max_position_embeddings"),
    ("llama", {"rope_theta": 5e5, "rope_parameters": None}, "rope_parameters.rope_theta"),
    ("llama", {"rms_norm_eps": 1e-3}, "rms_norm_eps"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"hidden_act": "relu"}, "hidden_act"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function"),
    ("gpt2", {"activation_function": "quick_gelu"}, "activation_function"),
    ("gpt2", {"activation_function": "gelu_10"}, "activation_function"),
    ("gpt2", {"activation_function": "xielu"}, "activation_function"),
    ("llama", {"head_dim": 4}, "head_dim"),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}}, "rope_parameters.factor"),
    ("llama", {"num_attention_heads": 1}, "num_attention_heads"),
    ("llama", {"model_type": "mistral"}, "model_type"),
    ("mistral", {"sliding_window": 8}, "sliding_window"),
    ("gemma2, soft-capped", {"final_logit_softcapping": 4.0}, "final_logit_softcapping"),
    ("gemma2, soft-capped", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
    ("gemma2, soft-capped", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar"),
    ("cohere", {"logit_scale": 1.0}, "logit_scale"),
    ("granite", {"attention_multiplier": 0.5}, "attention_multiplier"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
    ("qwen3_moe", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("opt", {"activation_function": "gelu"}, "activation_function"),
    ("t5", {"feed_forward_proj": "gated-gelu"}, "feed_forward_proj"),
    ("bart", {"scale_embedding": True}, "scale_embedding"),
    ("bart", {"decoder_start_token_id": 1}, "decoder_start_token_id"),
]


@pytest.mark.parametrize(("name", "changes", "field"), COMPUTING)
def test_a_field_that_computes_is_refused_by_its_name(folders, name, changes, field):
    with pytest.raises(InputError) as refusal:
        check_configuration(*folders(name, changes), "distributions.math.checkpoint")
    assert field in refusal.value.mend and refusal.value.where.name == "config.json"
    assert "\n" not in str(refusal.value)


SAME = [
    ("llama", {"dtype": "bfloat16", "architectures": ["X"], "transformers_version": "4.1.0", "_name_or_path": "x"}),
    ("llama", {"torch_dtype": "float16", "use_cache": False, "attention_dropout": 0.5, "initializer_range": 1.0}),
    ("llama", {"pad_token_id": 5, "bos_token_id": 6, "eos_token_id": [7, 8], "id2label": {"0": "a"}}),
    ("llama", {"rope_theta": 1e4, "rope_parameters": None}),
    ("llama", {"rope_theta": 1e4, "rope_scaling": None, "rope_parameters": None, "head_dim": None}),
    ("llama", {"quantization_config": {"quant_method": "fp8"}, "vocab_size": 90}),
    ("llama", {"rms_norm_eps": 9.999999974752427e-07, "rope_theta": 10000, "rope_parameters": None}),
    ("gpt2", {"resid_pdrop": 0.5, "summary_type": "mean", "task_specific_params": {"a": 1}}),
    ("mixtral", {"router_aux_loss_coef": 0.5, "router_jitter_noise": 0.1, "output_router_logits": True}),
    ("bart", {"forced_eos_token_id": 1, "decoder_layerdrop": 0.5, "classifier_dropout": 0.5, "num_beams": 4}),
]


@pytest.mark.parametrize(("name", "changes"), SAME)
def test_labels_and_spellings_are_the_same(folders, name, changes):
    base, other = folders(name, changes)
    assert check_configuration(base, other, "checkpoint") == []
    assert read_configuration(base, "base").differences(read_configuration(other, "other")) == {}


YARN = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_theta": 1e4, "rope_type": "linear", "factor": 2}
SAME_FUNCTION: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("llama", {"hidden_act": "silu"}, {"hidden_act": "swish"}),
    ("gpt2", {"activation_function": "gelu_new"}, {"activation_function": "gelu_pytorch_tanh"}),
    ("gpt2", {"activation_function": "gelu_new"}, {"activation_function": "gelu_fast"}),
    ("gpt2", {"activation_function": "gelu"}, {"activation_function": "gelu_python"}),
    ("gpt2", {"n_inner": None}, {"n_inner": 64}),
    (
        "mixtral",
        {"head_dim": None},
        {"head_dim": zoo.config("mixtral").hidden_size // zoo.config("mixtral").num_attention_heads},
    ),
    ("qwen2", {"max_window_layers": 28, "layer_types": None}, {"max_window_layers": 21, "layer_types": None}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 32768}, {"use_sliding_window": False}),
    ("llama", {"rope_parameters": YARN}, {"rope_parameters": YARN | {"beta_fast": 32, "beta_slow": 1.0}}),
    ("llama", {"rope_parameters": YARN}, {"rope_parameters": YARN | {"truncate": True, "attention_factor": None}}),
    ("llama", {"rope_parameters": LINEAR}, {"rope_parameters": None, "rope_theta": 10000, "rope_scaling": LINEAR}),
    ("llama", {}, {"rope_parameters": LINEAR | {"factor": 1.0}}),
    ("llama", {"rope_parameters": None, "rope_theta": 10000}, {"rope_parameters": None, "rope_scaling": None}),
    ("llama", {}, {"torchscript": True, "use_bfloat16": True, "prefix": "a"}),
]


@pytest.mark.parametrize(("name", "of_base", "changes"), SAME_FUNCTION)
def test_configurations_that_compute_the_same_function_are_the_same(folders, name, of_base, changes):
    base, other = folders(name, changes, of_base)
    for pair in ((base, other), (other, base)):
        assert check_configuration(*pair, "checkpoint") == []


@pytest.mark.parametrize("field", ["reorder_and_upcast_attn"])
def test_another_precision_of_the_same_function_is_told(folders, field):
    (warning,) = check_configuration(*folders("gpt2", {field: True}), "checkpoint")
    assert field in warning


@pytest.mark.parametrize("changes", [{"max_position_embeddings": 128}, {"unsloth_version": "1"}, {"n_ctx": 3}])
def test_lengths_and_unknown_fields_are_told(folders, changes):
    (warning,) = check_configuration(*folders("llama", changes), "distributions.math.checkpoint")
    assert all(name in warning for name in changes) and "distributions.math.checkpoint" in warning


@pytest.mark.parametrize("text", ["[]", "{", "null"])
def test_a_damaged_config_is_refused(folders, text):
    base, other = folders("llama", {})
    (other / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        check_configuration(base, other, "checkpoint")


@pytest.mark.parametrize("changes", [{"model_type": "no such"}, {"rms_norm_eps": "many"}, {"rope_parameters": 3}])
def test_a_config_that_no_class_reads_is_compared_as_it_is_written(folders, changes):
    base, other = folders("llama", changes)
    with pytest.raises(InputError, match=next(iter(changes))):
        check_configuration(base, other, "checkpoint")
    assert check_configuration(other, other, "checkpoint") == []


def test_no_field_of_the_zoo_that_computes_is_a_label():
    computing = {"hidden_act", "rms_norm_eps", "rope_parameters", "sliding_window", "layer_types", "head_dim"}
    assert not computing & LABELS


def test_the_fingerprint_knows_no_label(tmp_path):
    worlds.save_model(tmp_path, seed=0)
    before = read_configuration(tmp_path, "base").fingerprint
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"dtype": "float16", "architectures": []}))
    assert read_configuration(tmp_path, "base").fingerprint == before
    (tmp_path / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 0.5}))
    assert read_configuration(tmp_path, "base").fingerprint != before
