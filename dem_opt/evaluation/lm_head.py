"""The end of a model: the hidden states of its last layer -> nats, a few rows of logits at a time.

Shape suffixes as in records; R scored tokens of a batch, H the hidden width.
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
"""Rows of logits that are there at once, at most."""

_CPU_BYTES, _CPU_ROWS = 16 * 2**20, 64
"""On a CPU so many bytes of float32 logits at once, or so many rows if these are more: the C library gives larger
memory back to the system, and takes it anew for every chunk (a seventh of the time at a vocabulary of 32,000)."""

UNSCORED = -100
"""The target of a token whose prediction is not scored."""

_SAME = 1e-5
"""Relative distance of two logits in float32 that were summed in another order; in narrower dtypes twice their eps."""

_TRIED = 16


@dataclass(frozen=True, eq=False)
class Head:
    """What a model makes logits z of hidden states with:  z = e(h) ,  then  z s / d ,  then  c tanh(z / c) .

    embedding  e, the output embedding with its bias, if any
    vocabulary how many logits it makes
    scale      s (Cohere)
    divisor    d (Granite)
    cap        c (Gemma); none where there is no soft-cap
    """

    embedding: nn.Module
    vocabulary: int
    scale: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    def logits(self, hidden_RH: Tensor) -> Tensor:
        """The logits [R, V], rounded where the model itself rounds them."""
        logits_RV: Tensor = self.embedding(hidden_RH)
        if self.scale != 1.0:
            logits_RV = logits_RV * self.scale
        if self.divisor != 1.0:
            logits_RV = logits_RV / self.divisor
        return logits_RV if self.cap is None else torch.tanh(logits_RV / self.cap) * self.cap

    def hidden(self, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
        """Hidden states [B, T, H] as they come to the output embedding, which is shown none: so there are no logits."""
        caught: list[Tensor] = []

        def catch(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            caught.append(given[0])
            return (given[0][:, :0],)

        handle = self.embedding.register_forward_pre_hook(catch)
        try:
            model(**inputs, use_cache=False)
        finally:
            handle.remove()
        if len(caught) != 1:
            raise ValueError(f"the output embedding was called {len(caught)} times")
        return caught[0]


def rows_at_once(vocabulary: int, device: str) -> int:
    """Rows of logits that are there at once on a kind of device."""
    return ROWS if device != "cpu" else min(ROWS, max(_CPU_BYTES // (4 * vocabulary), _CPU_ROWS))


@torch.no_grad()
def find_head(model: PreTrainedModel) -> Head | None:
    """The model's head, if the logits that it makes of hidden states are the model's own; else None.

    A few random tokens are tried with the weights that the model has now.
    """
    embedding = cast(nn.Module | None, model.get_output_embeddings())  # type: ignore[no-untyped-call]
    if embedding is None:
        return None
    rows = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    ids_1T = torch.randint(rows, (1, _TRIED), generator=torch.Generator().manual_seed(0)).to(model.device)
    inputs = {"input_ids": ids_1T} | ({"decoder_input_ids": ids_1T} if model.config.is_encoder_decoder else {})
    own_1TV: Tensor = model(**inputs, use_cache=False).logits
    config = model.config.get_text_config(decoder=True)
    head = Head(
        embedding,
        own_1TV.shape[-1],
        getattr(config, "logit_scale", None) or 1.0,
        getattr(config, "logits_scaling", None) or 1.0,
        getattr(config, "final_logit_softcapping", None),
    )
    try:
        mine_1TV = head.logits(head.hidden(model, inputs))
    except (ValueError, RuntimeError, IndexError):  # what a model may make of logits that are not there
        return None
    return head if mine_1TV.shape == own_1TV.shape and _same(mine_1TV, own_1TV) else None


def _same(x_TV: Tensor, y_TV: Tensor) -> bool:
    """||x - y|| <= max(1e-5, 2 eps) ||y||, eps being the resolution of the dtype; 1e-5 alone in float32."""
    eps = torch.finfo(y_TV.dtype).eps
    most = _SAME if y_TV.dtype.itemsize >= 4 else 2 * eps
    return bool((x_TV.double() - y_TV.double()).norm() <= most * y_TV.double().norm())


def nll(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], targets_BT: Tensor, scored_R: Tensor, head: Head | None
) -> Tensor:
    """-ln softmax(logits_t)[target_t] in float32 for each token [B, T]; 0 where it is not scored.

    `scored_R` lists the scored tokens of the flat batch.  Nats are where the model's hidden states, or logits, come
    out, which is not where its inputs are if its layers lie on several devices.  With a head there are few rows of
    logits at once, on the way back neither: they are computed again there.  Without one the model makes all of its
    logits.
    """
    if head is None:
        logits_RV = model(**inputs, use_cache=False).logits.flatten(0, 1)
        targets_R = targets_BT.flatten().to(logits_RV.device)
        parts = zip(torch.split(logits_RV, ROWS), torch.split(targets_R, ROWS), strict=True)
        return torch.cat([_nll(part_RV, part_R) for part_RV, part_R in parts]).view(targets_BT.shape)
    hidden_BTH = head.hidden(model, inputs)
    scored_R, targets_R = scored_R.to(hidden_BTH.device), targets_BT.flatten()[scored_R].to(hidden_BTH.device)
    hidden_RH = hidden_BTH.flatten(0, 1)[scored_R]
    rows = rows_at_once(head.vocabulary, hidden_RH.device.type)
    parts = zip(torch.split(hidden_RH, rows), torch.split(targets_R, rows), strict=True)
    nll_R = torch.cat([_forgetting(head, part_RH, part_R) for part_RH, part_R in parts])
    return nll_R.new_zeros(targets_BT.numel()).index_copy(0, scored_R, nll_R).view(targets_BT.shape)


def _forgetting(head: Head, hidden_RH: Tensor, targets_R: Tensor) -> Tensor:
    """The nats of some rows, whose logits are not kept for the way back."""
    if not torch.is_grad_enabled():
        return _nll(head.logits(hidden_RH), targets_R)
    found: Tensor = checkpoint(
        lambda rows_RH: _nll(head.logits(rows_RH), targets_R), hidden_RH, use_reentrant=False, preserve_rng_state=False
    )
    return found


def _nll(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    return functional.cross_entropy(wide_RV, targets_R, ignore_index=UNSCORED, reduction="none")
