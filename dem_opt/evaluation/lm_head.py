"""The language-model head: hidden states of the last layer -> nats per token, a few rows of logits at a time.

    nats_t = -ln softmax(z_t)[target_t] ,    z = head(h)

All logits of a batch take  B T V  numbers, often more than the rest of a forward pass; here at most `chunk_rows` rows
of V exist at once, of scored tokens only, and on the backward pass each chunk is computed again.

Shape suffixes: B batch rows, T tokens, R scored tokens of a batch, H hidden width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

ROWS = 512
"""Most rows of logits at once."""

# On a CPU chunks have at most so many bytes of float32 logits, or so many rows if these are more: the C library returns
# larger memory to the system and takes it anew for every chunk (a seventh of the time at a vocabulary of 32,000).
_CPU_BYTES, _CPU_ROWS = 16 * 2**20, 64

UNSCORED = -100
"""Target of a token whose prediction is not scored: the `ignore_index` of torch's cross-entropy."""

# Relative distance of float32 logits that were summed in another order.
_FLOAT32_TOLERANCE = 1e-5

_PROBE_TOKENS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModelHead:
    """The map from hidden states h to logits:  y = s e(h) / d ,  z = c tanh(y / c) .

    Attributes:
        embedding: e, the output embedding with its bias, if any.
        vocabulary: V, the number of logits.
        scale: s (Cohere).
        divisor: d (Granite).
        cap: c, a soft cap (Gemma 2; Gemma Team 2024, section 2); None for  z = y .
    """

    embedding: nn.Module
    vocabulary: int
    scale: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """Compute logits [R, V] step by step as the model does, so that they are rounded at the same places."""
        logits_RV: Tensor = self.embedding(hidden_RH)
        if self.scale != 1.0:
            logits_RV = logits_RV * self.scale
        if self.divisor != 1.0:
            logits_RV = logits_RV / self.divisor
        return logits_RV if self.cap is None else torch.tanh(logits_RV / self.cap) * self.cap

    def hidden(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the model up to its output embedding and return the hidden states [B, T, H].

        A hook takes the embedding's input and passes on no rows of it, so that the model makes no logits.
        """
        captured: list[Tensor] = []

        def capture(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
            captured.append(arguments[0])
            return (arguments[0][:, :0],)

        handle = self.embedding.register_forward_pre_hook(capture)
        try:
            model(**inputs, use_cache=False)
        finally:
            handle.remove()
        if len(captured) != 1:
            raise ValueError(f"the output embedding was called {len(captured)} times")
        return captured[0]


def chunk_rows(vocabulary: int, device: str) -> int:
    """Rows of logits computed at once on a kind of device, "cpu" or "cuda"."""
    return ROWS if device != "cpu" else min(ROWS, max(_CPU_BYTES // (4 * vocabulary), _CPU_ROWS))


def memory_bytes(
    *, vocabulary: int, hidden: int, tokens: int, itemsize: int, device: str, capped: bool, backward: bool = False
) -> int:
    """Most bytes that `token_nll` holds at once for so many tokens, all of them scored.

    Forward: the last hidden states as they come and as they are scored (2 H each), and of a chunk's rows the larger of
    three copies of the logits where they are soft-capped, and of logits, float32 logits where they are narrower, and
    their log-softmax.  Backward: three float32 copies, and the logits where they are soft-capped, beside hidden states
    and their gradients (4 H), and the gradient of the output embedding (V H), to which every chunk adds.

    A model whose head `find_head` does not recognize makes all of its logits at once; that is not known before it is
    loaded, and not counted here.
    """
    rows = min(chunk_rows(vocabulary, device), tokens)
    hidden_bytes, logits, wide = 2 * tokens * hidden * itemsize, rows * vocabulary * itemsize, rows * vocabulary * 4
    if backward:
        return 2 * hidden_bytes + 3 * wide + (logits if capped else 0) + vocabulary * hidden * itemsize
    return hidden_bytes + max(3 * logits if capped else 0, logits + wide + (wide if itemsize < 4 else 0))


@torch.no_grad()
def find_head(model: PreTrainedModel) -> LanguageModelHead | None:
    """Return the model's head if it reproduces the model's own logits of a few random tokens, else None.

    The comparison uses the weights that the model has now; the result holds for all weights of an architecture.
    """
    embedding = cast(nn.Module | None, model.get_output_embeddings())  # type: ignore[no-untyped-call]
    if embedding is None:
        return None
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    ids_1T = torch.randint(rows, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    inputs = {"input_ids": ids_1T} | ({"decoder_input_ids": ids_1T} if model.config.is_encoder_decoder else {})
    expected_1TV: Tensor = model(**inputs, use_cache=False).logits
    config = model.config.get_text_config(decoder=True)
    head = LanguageModelHead(
        embedding=embedding,
        vocabulary=expected_1TV.shape[-1],
        scale=getattr(config, "logit_scale", None) or 1.0,
        divisor=getattr(config, "logits_scaling", None) or 1.0,
        cap=getattr(config, "final_logit_softcapping", None),
    )
    try:
        logits_1TV = head.logits(head.hidden(model, inputs))
    except (ValueError, RuntimeError, IndexError):  # the model uses logits that `hidden` left out
        return None
    return head if logits_1TV.shape == expected_1TV.shape and _agree(logits_1TV, expected_1TV) else None


def _agree(x_TV: Tensor, y_TV: Tensor) -> bool:
    """Return whether  ||x - y|| <= tolerance ||y|| : 1e-5 in float32, twice the dtype's eps in narrower ones."""
    tolerance = _FLOAT32_TOLERANCE if y_TV.dtype.itemsize >= 4 else 2 * torch.finfo(y_TV.dtype).eps
    return bool((x_TV.double() - y_TV.double()).norm() <= tolerance * y_TV.double().norm())


def token_nll(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    targets_BT: Tensor,
    scored_R: Tensor,
    head: LanguageModelHead | None,
) -> Tensor:
    """Compute  -ln softmax(z_t)[target_t]  in float32 nats for each token [B, T]; 0 where it is not scored.

    Args:
        model: The merged model.
        inputs: Arguments of its forward call.
        targets_BT: The token to predict at each place, UNSCORED where there is none.
        scored_R: Places of the scored tokens in the flattened batch.
        head: The model's head; without one the model makes all of its logits at once.

    Returns:
        Nats on the device of the hidden states, which is not that of the inputs if layers are divided over devices.
    """
    if head is None:
        logits_RV = model(**inputs, use_cache=False).logits.flatten(0, 1)
        targets_R = targets_BT.flatten().to(logits_RV.device)
        chunks = zip(torch.split(logits_RV, ROWS), torch.split(targets_R, ROWS), strict=True)
        nll_R = torch.cat([_cross_entropy(chunk_RV, chunk_R) for chunk_RV, chunk_R in chunks])
        return nll_R.view(targets_BT.shape)
    hidden_BTH = head.hidden(model, inputs)
    scored_R, targets_R = scored_R.to(hidden_BTH.device), targets_BT.flatten()[scored_R].to(hidden_BTH.device)
    hidden_RH = hidden_BTH.flatten(0, 1)[scored_R]
    rows = chunk_rows(head.vocabulary, hidden_RH.device.type)
    chunks = zip(torch.split(hidden_RH, rows), torch.split(targets_R, rows), strict=True)
    nll_R = torch.cat([_chunk_nll(head, chunk_RH, chunk_R) for chunk_RH, chunk_R in chunks])
    return nll_R.new_zeros(targets_BT.numel()).index_copy(0, scored_R, nll_R).view(targets_BT.shape)


def _chunk_nll(head: LanguageModelHead, hidden_RH: Tensor, targets_R: Tensor) -> Tensor:
    """Compute the nats of some rows; on the backward pass their logits are computed again instead of kept."""
    if not torch.is_grad_enabled():
        return _cross_entropy(head.logits(hidden_RH), targets_R)
    nll_R: Tensor = checkpoint(
        lambda rows_RH: _cross_entropy(head.logits(rows_RH), targets_R),
        hidden_RH,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing here is random, and saving the state costs a synchronization
    )
    return nll_R


def _cross_entropy(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))  # ln sum exp needs float32
    return functional.cross_entropy(wide_RV, targets_R, ignore_index=UNSCORED, reduction="none")
