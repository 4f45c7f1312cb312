"""Bytes and floating-point operations of a pass through transformers' layers, from the model's dimensions.

Arithmetic on config.json and shapes; nothing is loaded.  The layers' activations are allocated by transformers and
torch, so they are modelled here; those of the language-model head are counted beside it.

Symbols: B rows, T tokens of a window, H hidden width, I intermediate width, Q and K widths of all query and key heads
together, L layers, V vocabulary, s bytes of a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from dem_opt.checkpoints.architecture import Architecture
from dem_opt.evaluation import lm_head

# glibc's largest threshold for mmap: freed tensors of so many bytes go back to the system, smaller ones may stay.
_KEPT_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Widths:
    """The dimensions of a transformer that its activations and FLOPs depend on.

    Attributes:
        vocabulary: V.
        hidden: H.
        intermediate: I, of one expert in a mixture of experts.
        layers: L.
        heads: Query heads.
        queries: Q, query heads times their width.
        keys: K, key heads times their width; the same for values.
        materialized: Whether attention scores exist as a matrix, as in soft-capped attention.
        capped: Whether logits are soft-capped, which copies them.
        experts: Experts that a token is sent to in a mixture of experts.
        states: Numbers that a state-space layer keeps for a token.
    """

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    queries: int
    keys: int
    materialized: bool
    capped: bool
    experts: int = 1
    states: int = 0


def read_widths(architecture: Architecture, model: Mapping[str, Any]) -> Widths:
    """Read dimensions from the embedding's shape and config.json, under the names that common families use."""
    vocabulary, hidden = architecture.parameters[architecture.embedding]
    heads = int(_look(model, "num_attention_heads", "n_head", "num_heads", "decoder_attention_heads", default=1))
    width = int(_look(model, "head_dim", default=hidden // heads))
    groups = int(_look(model, "num_key_value_heads", default=heads))
    return Widths(
        vocabulary=vocabulary,
        hidden=hidden,
        intermediate=int(
            _look(model, "intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim", default=4 * hidden)
        ),
        layers=int(_look(model, "num_hidden_layers", "n_layer", "num_layers", "decoder_layers", default=1)),
        heads=heads,
        queries=heads * width,
        keys=groups * width,
        materialized=_look(model, "attn_logit_softcapping", default=None) is not None,
        capped=_look(model, "final_logit_softcapping", default=None) is not None,
        experts=int(_look(model, "num_experts_per_tok", default=1)),
        states=int(_look(model, "state_size", "mamba_d_state", "ssm_state_size", default=0))
        * int(_look(model, "expand", "mamba_expand", default=2) * hidden),
    )


def activation_bytes(widths: Widths, rows: int, window: int, itemsize: int, device: str = "cpu") -> int:
    """Most bytes that a forward call on `rows` windows and its loss hold at once, in inference mode.

    The largest of three moments, for B T tokens:

        attention     3 H + 3 Q + 2 K, and 2 Q where heads share keys: embedding, layer's input and its norm; queries
                      and twice the output; keys and values; these expanded.  The mask and its float copy,
                      B T T (1 + s).  Materialized scores and their softmax, B T T heads (2 s + 4).
        feed-forward  4 H + 3 I: embedding, layer's input, residual and its norm; gate, up and their product.
        loss          the language-model head's bytes; on a CPU also what the layers freed and the allocator kept.
    """
    tokens, square = rows * window, rows * window**2
    hidden, inner = tokens * widths.hidden * itemsize, tokens * widths.intermediate * itemsize
    shared = 2 * widths.queries if widths.keys < widths.queries else 0
    attention = 3 * hidden + tokens * (3 * widths.queries + 2 * widths.keys + shared) * itemsize
    attention += square * (1 + itemsize)
    attention += square * widths.heads * (2 * itemsize + 4) if widths.materialized else 0
    kept = sum(count * size for count, size in ((4, hidden), (3, inner)) if device == "cpu" and size < _KEPT_BYTES)
    return max(attention, 4 * hidden + 3 * inner, _head_bytes(widths, tokens, itemsize, device) + kept)


def gradient_bytes(widths: Widths, rows: int, window: int, itemsize: int, device: str = "cpu") -> int:
    """Most bytes that a forward call on `rows` windows, its loss and the backward pass hold, without parameters.

    Autograd saves of every layer, for each of B T tokens:

        norms         2 H (4 + 2 s): of two, input and output, and the input in float32, as Llama's RMSNorm has it.
        attention     4 Q s: queries, keys and values (expanded where heads share keys), output.  The mask as numbers,
                      B T T s.  Materialized scores before and after the softmax, in float32.
        feed-forward  4 I s: gate, its activation, up and their product, of each expert that a token is sent to.
        states        16 bytes a state: a state-space layer's reference code in Python keeps four copies in float32.

    Beside the layers: the last norm, H (4 + 2 s), and the language-model head with its backward pass.
    """
    tokens, square = rows * window, rows * window**2
    norm = widths.hidden * (4 + 2 * itemsize)
    layer = 2 * norm + 4 * itemsize * (widths.queries + widths.experts * widths.intermediate) + 4 * 4 * widths.states
    scores = square * (itemsize + (2 * 4 * widths.heads if widths.materialized else 0))
    head = _head_bytes(widths, tokens, itemsize, device, backward=True)
    return widths.layers * (tokens * layer + scores) + tokens * norm + head


def _head_bytes(widths: Widths, tokens: int, itemsize: int, device: str, backward: bool = False) -> int:
    """Bytes of the language-model head and the loss."""
    return lm_head.memory_bytes(
        vocabulary=widths.vocabulary,
        hidden=widths.hidden,
        tokens=tokens,
        itemsize=itemsize,
        device=device,
        capped=widths.capped,
        backward=backward,
    )


def flops_per_token(architecture: Architecture, model: Mapping[str, Any], widths: Widths, window: int) -> float:
    """Floating-point operations of a forward pass for one token:  2 P_active + 4 L T Q .

    A multiplication and an addition for each weight; attention scores and their weighted sums over a window of T tokens
    (Kaplan et al. 2020, section 2.1, without their assumption that the attention term is small).  P_active counts
    matrices: the embedding only where it is tied to the output, and of a mixture's experts the share that a token is
    sent to.
    """
    matrices = {name: prod(shape) for name, shape in architecture.parameters.items() if len(shape) > 1}
    if not architecture.aliases:
        del matrices[architecture.embedding]
    chosen = _look(model, "num_experts_per_tok", default=1)
    share = chosen / _look(model, "num_local_experts", "num_experts", "n_routed_experts", default=chosen)
    active = sum(size * (share if ".experts." in name else 1) for name, size in matrices.items())
    return 2 * active + 4 * widths.layers * window * widths.queries


def _look(model: Mapping[str, Any], *names: str, default: Any) -> Any:
    """The first of these names that config.json has, at its top or in the text part of a multimodal model's."""
    text = model.get("text_config")
    for part in (model, text if isinstance(text, Mapping) else {}):
        for name in names:
            if part.get(name) is not None:
                return part[name]
    return default
