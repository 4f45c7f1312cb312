"""Internals of transformers that this project relies on still behave as it expects."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PretrainedConfig

from dem_opt.checkpoints.transformers_internals import layer_classes, loading_rules, without_initialization

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, head_dim=8)
MIXTRAL = MixtralConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, head_dim=8, num_local_experts=2)
GPT2 = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)


def model_of(config: PretrainedConfig):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("config", "stored", "name", "converted"),
    [
        (LLAMA, "model.norm.weight", "model.norm.weight", False),
        (GPT2, "wte.weight", "transformer.wte.weight", False),
        (
            MIXTRAL,
            "model.layers.0.block_sparse_moe.experts.1.w1.weight",
            "model.layers.0.mlp.experts.gate_up_proj",
            True,
        ),
    ],
)
def test_a_stored_tensor_becomes_the_parameter_of_this_name(config, stored, name, converted):
    rules = loading_rules(model_of(config))
    assert rules.target(stored) == (name, converted)


def test_every_parameter_is_loaded_under_its_own_name():
    model = model_of(LLAMA)
    rules = loading_rules(model)
    assert [rules.target(name) for name, _ in model.named_parameters()] == [
        (name, False) for name, _ in model.named_parameters()
    ]


def test_buffers_of_older_versions_are_passed_over():
    rules = loading_rules(model_of(LLAMA))
    assert rules.is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq") and not rules.is_ignored("lm_head.weight")


@pytest.mark.parametrize(("config", "kind"), [(LLAMA, "LlamaDecoderLayer"), (GPT2, "GPT2Block")])
def test_layers_are_named_by_their_class(config, kind):
    assert kind in layer_classes(model_of(config))


def test_construction_draws_no_random_weights():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    with without_initialization():
        AutoModelForCausalLM.from_config(LLAMA)
    assert torch.equal(torch.random.get_rng_state(), state)
