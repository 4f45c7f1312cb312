"""Tiny random models of many architectures: adding one is a line of MODELS."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from dem_opt.checkpoints.architecture import silence_transformers

silence_transformers()

VOCABULARY = 83
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = SMALL | {"intermediate_size": 24, "max_position_embeddings": 64}
GROUPED = WIDE | {"num_key_value_heads": 1}
HEADED = GROUPED | {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
PAIRED = {"d_model": 16, "decoder_start_token_id": 2}

SEEING = {"intermediate_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}
MULTIPLE_POSITIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def seeing(text: str, vision: str, text_settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Settings of a model that reads images too."""
    texts = {"model_type": text, "num_key_value_heads": 1} | TOKENS | text_settings
    tokens = {"image_token_id": 80, "image_token_index": 80, "video_token_id": 81} | {
        name: 82 for name in ("vision_start_token_id", "vision_end_token_id", "boi_token_index", "eoi_token_index")
    }
    return {"text_config": texts, "vision_config": {"model_type": vision} | SEEING | more} | tokens


MODELS = {
    "llama": ("llama", GROUPED | {"tie_word_embeddings": False}),
    "llama tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 48}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", HEADED),
    "gemma": ("gemma", HEADED),
    "gemma2, soft-capped": ("gemma2", HEADED | {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", HEADED),
    "cohere": ("cohere", GROUPED | {"logit_scale": 0.25}),
    "granite": ("granite", GROUPED | {"logits_scaling": 4.0}),
    "phi": ("phi", WIDE),
    "phi3": ("phi3", GROUPED),
    "gpt_neox": ("gpt_neox", WIDE),
    "opt": ("opt", SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64}),
    "bloom": ("bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "mamba": ("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "jamba, hybrid": (
        "jamba",
        GROUPED | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 8}),
    "qwen3_moe": ("qwen3_moe", HEADED | EXPERTS),
    "olmoe": ("olmoe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "llava": ("llava", seeing("llama", "clip_vision_model", GROUPED)),
    "mistral3": ("mistral3", seeing("mistral", "pixtral", HEADED, head_dim=8)),
    "gemma3, with images": (
        "gemma3",
        seeing("gemma3_text", "siglip_vision_model", HEADED) | {"mm_tokens_per_image": 4},
    ),
    "qwen2_vl": (
        "qwen2_vl",
        seeing(
            "qwen2_vl_text",
            "qwen2_vl_vision",
            GROUPED | {"rope_parameters": MULTIPLE_POSITIONS, "tie_word_embeddings": False},
            depth=1,
            embed_dim=16,
            num_heads=2,
            mlp_ratio=2,
        ),
    ),
    "qwen3_vl": (
        "qwen3_vl",
        seeing(
            "qwen3_vl_text",
            "qwen3_vl_vision",
            HEADED | {"rope_parameters": MULTIPLE_POSITIONS, "tie_word_embeddings": False},
            depth=1,
            out_hidden_size=16,
            num_heads=2,
            deepstack_visual_indexes=[0],
        ),
    ),
    "gpt_oss": (
        "gpt_oss",
        HEADED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 48, "layer_types": None},
    ),
    "t5": ("t5", PAIRED | {"d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}),
    "t5, untied": (
        "t5",
        PAIRED
        | {"d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
    ),
    "bart": (
        "bart",
        PAIRED
        | {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        | {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64, "forced_eos_token_id": 2},
    ),
}


def config(name: str, **changes: Any) -> PretrainedConfig:
    """The configuration of a tiny model."""
    kind, settings = MODELS[name]
    return AutoConfig.for_model(kind, **TOKENS | settings | changes)


def make(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model for evaluation, every weight of which is drawn anew (norms and biases are not 1 and 0)."""
    torch.manual_seed(seed)
    made = config(name, **changes)
    language = AutoModelForCausalLM if type(made) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM
    family = AutoModelForSeq2SeqLM if made.is_encoder_decoder else language
    model = family.from_config(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def save(folder: Path, name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The same on disk."""
    make(name, seed, dtype, **changes).save_pretrained(folder)
    return folder
