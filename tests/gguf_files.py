"""Write a tiny Llama as a GGUF file, as llama.cpp's converter lays one out."""

import json
from pathlib import Path

import gguf
import numpy as np
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{"self_attn.o_proj": "attn_output"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
QUANTIZED = gguf.GGMLQuantizationType.Q8_0


def save(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, quantized: bool) -> Path:
    """Write a model's file; matrices are quantized to 8 bits where asked for."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    names = NAMES | {
        f"model.layers.{layer}.{name}": f"blk.{layer}.{short}"
        for layer in range(config.num_hidden_layers)
        for name, short in LAYER.items()
    }
    for name, parameter in model.named_parameters():
        values = _permuted(name, parameter.detach().float().numpy(), config)
        module = name.removesuffix(".weight")
        if quantized and values.ndim == 2:
            codes = gguf.quants.quantize(values, QUANTIZED)
            writer.add_tensor(f"{names[module]}.weight", codes, raw_dtype=QUANTIZED)
        else:
            writer.add_tensor(f"{names[module]}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer, tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(merge) for merge in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _permuted(name, values, config):
    """Rotary halves side by side, as llama.cpp has them."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return np.ascontiguousarray(values)
    halves = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(halves.reshape(values.shape))
