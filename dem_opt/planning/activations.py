"""What a pass through a model takes, from the model's dimensions: bytes and floating-point operations.

Arithmetic on config.json and shapes; nothing is loaded.  It follows what perplexity and heads do, so it
changes when they do.
Shape suffixes as in records; H is the hidden width, I the intermediate one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from dem_opt.checkpoints.architecture import Architecture
from dem_opt.evaluation.lm_head import chunk_rows

KEPT = 32 * 2**20
"""The C library gives freed tensors of at least so many bytes back to the system, and may keep smaller ones (glibc)."""


@dataclass(frozen=True)
class Widths:
    """The dimensions of a transformer that its activations and FLOPs depend on.

    queries, keys    heads times the width of a head: of queries, of keys (and of values)
    materialized     whether attention scores are held as a matrix, which soft-capped attention does
    capped           whether logits are soft-capped, which makes a copy of them
    experts          of a mixture, those that a token is sent to
    states           numbers that a state-space layer keeps for a token
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
    """Dimensions from the embedding's shape and from config.json, under the names that the common families use."""
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


def head_bytes(widths: Widths, tokens: int, itemsize: int, device: str = "cpu", backward: bool = False) -> int:
    """The most bytes that the end of a model and its loss hold at once, of so many tokens, all of them scored.

    The last hidden states, as they come and as they are scored (2 H), and of `chunk_rows` rows the largest of
    cap       the logits thrice, where they are soft-capped
    loss      the logits, the same in float32 where they are narrower, their log-softmax
    way back  three times float32, the logits where they are soft-capped; beside them the gradients of the hidden
              states (2 H), and of the output embedding (V H), to which each chunk's is added

    A model that ends in another way than `heads` knows makes all of its logits at once, which nobody knows before it
    is loaded.
    """
    rows = min(chunk_rows(widths.vocabulary, device), tokens)
    hidden, wide = 2 * tokens * widths.hidden * itemsize, rows * widths.vocabulary * 4
    logits = rows * widths.vocabulary * itemsize
    if backward:
        embedding = widths.vocabulary * widths.hidden * itemsize
        return 2 * hidden + 3 * wide + (logits if widths.capped else 0) + embedding
    return hidden + max(3 * logits if widths.capped else 0, logits + wide + (wide if itemsize < 4 else 0))


def activation_bytes(widths: Widths, rows: int, window: int, itemsize: int, device: str = "cpu") -> int:
    """The most bytes that a forward call on `rows` windows and its loss hold at once, in inference mode.

    The largest of three moments, for B T tokens:
    attention     embedding, layer's input, its norm (3H); q, its output twice (3Q), k and v (2K), where heads share
                  keys their expansion (2Q); the mask and its float copy [B, T, T]; the scores where they are held
    feed-forward  embedding, layer's input, residual, its norm (4H); gate, up and their product (3I)
    loss          the end of the model; on a CPU also what the layers have freed and the allocator has kept
    """
    tokens, square = rows * window, rows * window**2
    hidden, inner = tokens * widths.hidden * itemsize, tokens * widths.intermediate * itemsize
    shared = 2 * widths.queries if widths.keys < widths.queries else 0
    attention = 3 * hidden + tokens * (3 * widths.queries + 2 * widths.keys + shared) * itemsize
    attention += square * (1 + itemsize)
    attention += square * widths.heads * (2 * itemsize + 4) if widths.materialized else 0
    kept = sum(count * size for count, size in ((4, hidden), (3, inner)) if device == "cpu" and size < KEPT)
    return max(attention, 4 * hidden + 3 * inner, head_bytes(widths, tokens, itemsize, device) + kept)


def gradient_bytes(widths: Widths, rows: int, window: int, itemsize: int, device: str = "cpu") -> int:
    """The most bytes that a forward call on `rows` windows, its loss and the way back hold at once, beside parameters.

    What autograd keeps of every layer, for B T tokens and s bytes a number:
    norms         two times input and output (s), and the input in float32, as Llama's does it:  2 H (4 + 2 s)
    attention     q, k and v, expanded where heads share keys, and the output:  4 Q s ;  the mask as numbers, B T T s ;
                  where scores are held, these before and after the softmax, in float32
    feed-forward  gate, its activation, up and their product, of each expert that a token is sent to:  4 I s
    states        of a state-space layer, as its reference code in Python keeps them: four times, in float32
    Beside the layers: the last norm's  H (4 + 2 s),  and the end of the model with its way back.
    """
    tokens, square = rows * window, rows * window**2
    norm = widths.hidden * (4 + 2 * itemsize)
    layer = 2 * norm + 4 * itemsize * (widths.queries + widths.experts * widths.intermediate) + 4 * 4 * widths.states
    scores = square * (itemsize + (2 * 4 * widths.heads if widths.materialized else 0))
    end = head_bytes(widths, tokens, itemsize, device, backward=True)
    return widths.layers * (tokens * layer + scores) + tokens * norm + end


def flops_per_token(architecture: Architecture, model: Mapping[str, Any], widths: Widths, window: int) -> float:
    """2 P_active + 4 L T Q : a multiplication and an addition for each weight; scores and their sums over a window.

    P_active: the matrices, the embedding only where it is the output's too; of a mixture of experts the share that
    a token is sent to.
    """
    matrices = {name: prod(shape) for name, shape in architecture.parameters.items() if len(shape) > 1}
    if not architecture.aliases:
        del matrices[architecture.embedding]
    chosen = _look(model, "num_experts_per_tok", default=1)
    share = chosen / _look(model, "num_local_experts", "num_experts", "n_routed_experts", default=chosen)
    active = sum(size * (share if ".experts." in name else 1) for name, size in matrices.items())
    return 2 * active + 4 * widths.layers * window * widths.queries


def _look(model: Mapping[str, Any], *names: str, default: Any) -> Any:
    """The first of these that config.json has, at its top or for the text part of a model of several kinds."""
    text = model.get("text_config")
    for part in (model, text if isinstance(text, Mapping) else {}):
        for name in names:
            if part.get(name) is not None:
                return part[name]
    return default
