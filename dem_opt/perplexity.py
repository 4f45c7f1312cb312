"""Model + windows -> nats for each window.

Shape suffixes as in records; R rows of logits, L tokens of the longest document in a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dem_opt.records import Score, Windows

ROWS = 512
"""Logits are brought to float32 this many rows at a time."""

_UNSCORED = -100


@dataclass(frozen=True, eq=False)
class PreparedWindows:
    """One corpus's windows as tensors on a device.

    ids_WT       token ids
    positions_WT positions, restarting where a document starts
    targets_WT   the token to be predicted after each token, -100 where that is not scored
    tokens_W     scored tokens of each window
    documents    (window, start, end) of each document that scores anything, longest first
    """

    ids_WT: Tensor
    positions_WT: Tensor
    targets_WT: Tensor
    tokens_W: tuple[int, ...]
    documents: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class _Batch:
    """What one forward call sees, and the window that each row counts for; no positions are plain ones."""

    ids_BT: Tensor
    positions_BT: Tensor | None
    targets_BT: Tensor
    window_B: tuple[int, ...]


def prepare(windows: Windows, device: torch.device) -> PreparedWindows:
    """Windows on a device for life, so that scoring copies nothing to it."""
    targets_WT = np.full_like(windows.ids_WT, _UNSCORED)
    targets_WT[:, :-1] = np.where(windows.scored_WT[:, 1:], windows.ids_WT[:, 1:], _UNSCORED)
    return PreparedWindows(
        torch.tensor(windows.ids_WT, device=device),
        torch.tensor(windows.positions_WT, device=device),
        torch.tensor(targets_WT, device=device),
        windows.tokens_W,
        tuple(sorted(_documents(windows), key=lambda place: place[1] - place[2])),
    )


def _documents(windows: Windows) -> Iterator[tuple[int, int, int]]:
    """(window, start, end) of each document of at least two tokens; padding is documents of one token."""
    length = windows.ids_WT.shape[1]
    for window, positions_T in enumerate(windows.positions_WT):
        for start, end in pairwise([*np.flatnonzero(positions_T == 0).tolist(), length]):
            if end - start > 1:
                yield window, start, end


def score(model: PreTrainedModel, windows: PreparedWindows, batch_tokens: int, isolates: bool) -> tuple[Score, int]:
    """Nats per window,  -sum_t ln p(x_t | x_<t of its own document),  and the tokens through the model.

    One forward call for each batch of at most `batch_tokens` tokens (at least one window), batches being the
    same at every call.  Where the architecture isolates packed documents, rows are windows and positions
    restart; where it does not, rows are documents, padded at the end, which a causal model's earlier tokens
    do not see.  Cross-entropy is taken in float32 and summed in float64.

    Raises EvaluationError where a window's nats are not finite.
    """
    batches = _packed(windows, batch_tokens) if isolates else _separate(windows, batch_tokens)
    nats: list[Tensor] = []
    window_R: list[int] = []
    forward_tokens = 0
    with torch.inference_mode():
        for batch in batches:
            nats.append(_nats(_logits(model, batch.ids_BT, batch.positions_BT), batch.targets_BT))
            window_R.extend(batch.window_B)
            forward_tokens += batch.ids_BT.numel()
        nats_R = torch.cat(nats).cpu().numpy()
    nats_W = np.bincount(window_R, weights=nats_R, minlength=len(windows.tokens_W))
    return Score(tuple(nats_W.tolist()), windows.tokens_W), forward_tokens


def _packed(windows: PreparedWindows, batch_tokens: int) -> Iterator[_Batch]:
    """Whole windows in their order."""
    count, length = windows.ids_WT.shape
    rows = max(1, batch_tokens // length)
    for first in range(0, count, rows):
        part = slice(first, first + rows)
        yield _Batch(
            windows.ids_WT[part],
            windows.positions_WT[part],
            windows.targets_WT[part],
            tuple(range(count)[part]),
        )


def _separate(windows: PreparedWindows, batch_tokens: int) -> Iterator[_Batch]:
    """One document a row, longest first, each batch as wide as its first row."""
    first = 0
    while first < len(windows.documents):
        _, start, end = windows.documents[first]
        rows = max(1, batch_tokens // (end - start))
        places = windows.documents[first : first + rows]
        ids = [windows.ids_WT[window, start:end] for window, start, end in places]
        targets = [windows.targets_WT[window, start:end] for window, start, end in places]
        yield _Batch(
            pad_sequence(ids, batch_first=True),
            None,
            pad_sequence(targets, batch_first=True, padding_value=_UNSCORED),
            tuple(window for window, _, _ in places),
        )
        first += rows


def _logits(model: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor | None) -> Tensor:
    """Logits [B, T, V], without a cache (with it packed documents leak) and without an attention mask."""
    assert not model.training, "dropout would make logits random"
    positions = {} if positions_BT is None else {"position_ids": positions_BT}
    logits_BTV: Tensor = model(ids_BT, use_cache=False, **positions).logits
    return logits_BTV


def _nats(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Nats of each row in float64: -sum_t ln softmax(logits_t)[target_t] over the scored t."""
    logits_RV, targets_R = logits_BTV.flatten(0, 1), targets_BT.flatten()
    parts = [slice(first, first + ROWS) for first in range(0, len(targets_R), ROWS)]
    nll_R = torch.cat([_nll(logits_RV[part], targets_R[part]) for part in parts])
    return nll_R.double().view(targets_BT.shape).sum(dim=1)


def _nll(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    return functional.cross_entropy(logits_RV.float(), targets_R, ignore_index=_UNSCORED, reduction="none")


@torch.inference_mode()
def isolates_documents(model: PreTrainedModel) -> bool:
    """Whether packed documents with restarting positions are as good as separate ones to this model.

    Packs one short random text behind each of two others.  Its logits must be the same behind both, to the
    bit (a masked token has weight exactly 0, while the leaks of hybrid architectures can be smaller than
    bfloat16's rounding), and up to rounding those of the text alone.
    """
    if "position_ids" not in signature(model.forward).parameters:
        return False
    device = model.device
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    generator = torch.Generator().manual_seed(0)
    text_1T = torch.randint(vocabulary, (1, 20), generator=generator).to(device)
    before_2T = torch.randint(vocabulary, (2, 12), generator=generator).to(device)
    positions_1T = torch.cat([torch.arange(12), torch.arange(20)])[None].to(device)
    packed_2TV = _logits(model, torch.cat([before_2T, text_1T.expand(2, -1)], dim=1), positions_1T.expand(2, -1))
    alone_TV = _logits(model, text_1T, positions_1T[:, 12:])[0]
    first_TV, second_TV = packed_2TV[:, 12:]
    return torch.equal(first_TV, second_TV) and _near(first_TV, alone_TV)


def _near(x_TV: Tensor, y_TV: Tensor) -> bool:
    """||x - y|| <= sqrt(eps) ||y||, eps being the resolution of the logits' dtype."""
    distance = (x_TV.double() - y_TV.double()).norm()
    return bool(distance <= torch.finfo(y_TV.dtype).eps ** 0.5 * y_TV.double().norm())
