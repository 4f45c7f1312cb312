"""Model + windows -> nats for each window.

Shape suffixes as in records; R scored tokens of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import pairwise
from typing import Literal, Self, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from dem_opt.evaluation.interim_analyses import stops
from dem_opt.evaluation.lm_head import UNSCORED, Head, nll
from dem_opt.types import Score, Windows

Reading = Literal["packed", "separate", "paired"]
"""How documents are given to a model: packed in windows, one a row, or one pair of source and target a row."""


@dataclass(frozen=True, eq=False)
class PreparedWindows:
    """One corpus's windows as tensors on a device.

    ids_WT       token ids
    positions_WT positions, restarting where a document starts
    targets_WT   the token to be predicted after each token, -100 where that is not scored
    tokens_W     scored tokens of each window
    documents    each document that scores anything, longest first
    batches      what forward calls are given, by block, tokens and reading: made once, with nothing copied later
    """

    ids_WT: Tensor
    positions_WT: Tensor
    targets_WT: Tensor
    tokens_W: tuple[int, ...]
    documents: tuple["_Document", ...]
    batches: dict[tuple[range, int, Reading], tuple["_Batch", ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Document:
    """Where a document lies: tokens start to end of a window; those before `first` are not scored."""

    window: int
    start: int
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class _Batch:
    """What one forward call is given, what it is to predict, and the window that each row counts for.

    scored_R  the scored tokens, as places of the flat batch
    """

    inputs: Mapping[str, Tensor]
    targets_BT: Tensor
    window_B: tuple[int, ...]
    scored_R: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], targets_BT: Tensor, window_B: tuple[int, ...]) -> Self:
        """A batch; looking for what is scored waits for the device."""
        return cls(inputs, targets_BT, window_B, (targets_BT.flatten() != UNSCORED).nonzero().flatten())

    @property
    def tokens(self) -> int:
        """Tokens through the model, padding included."""
        return sum(ids.numel() for name, ids in self.inputs.items() if name.endswith("input_ids"))


def prepare(windows: Windows, device: torch.device) -> PreparedWindows:
    """Windows on a device for life, so that scoring copies nothing to it."""
    targets_WT = np.full_like(windows.ids_WT, UNSCORED)
    targets_WT[:, :-1] = np.where(windows.scored_WT[:, 1:], windows.ids_WT[:, 1:], UNSCORED)
    return PreparedWindows(
        torch.tensor(windows.ids_WT, device=device),
        torch.tensor(windows.positions_WT, device=device),
        torch.tensor(targets_WT, device=device),
        windows.tokens_W,
        tuple(sorted(_documents(windows), key=len, reverse=True)),
    )


def _documents(windows: Windows) -> Iterator[_Document]:
    """The documents that score anything; padding is documents of one token."""
    length = windows.ids_WT.shape[1]
    for window, positions_T in enumerate(windows.positions_WT):
        for start, end in pairwise([*np.flatnonzero(positions_T == 0).tolist(), length]):
            scored = np.flatnonzero(windows.scored_WT[window, start:end])
            if len(scored):
                yield _Document(window, start, start + int(scored[0]), end)


def reading(model: PreTrainedModel) -> Reading:
    """How a model is given documents, which is the same for all weights of an architecture."""
    if model.config.is_encoder_decoder:
        return "paired"
    return "packed" if isolates_documents(model) else "separate"


def score(
    model: PreTrainedModel,
    windows: PreparedWindows,
    batch_tokens: int,
    reading: Reading,
    known: Score | None = None,
    end: int | None = None,
    gradient: bool = False,
    head: Head | None = None,
) -> tuple[Score, int]:
    """Nats of the first `end` windows,  -sum_t ln p(x_t | x_<t of its own document),  and the tokens through the model.

    One forward call for each batch of at most `batch_tokens` tokens (at least one row).  No batch spans two blocks,
    which are the windows between two stops of a race: so a window's nats are the same to the bit, whether all windows
    are measured at once, or some are `known` and the others measured now.  Both must end at a stop; without `end`
    all windows are measured.

    Packed: rows are windows and positions restart.  Separate: rows are documents, padded at the end, which a
    causal model's earlier tokens do not see.  Paired: the encoder reads what stands before a document's first
    scored token, the decoder predicts the rest from its start token on.  Cross-entropy is taken in float32 and
    summed in float64.  Given its `head`, the model makes a few rows of logits at a time, of scored tokens only.

    `gradient`: the nats of each batch go backward too, into the parameters that want gradients.  The nats of models
    that read packed windows are the same to the bit on a CPU; others have kernels that are others where gradients are
    wanted (convolutions, attention with a learned bias), and their nats may differ by rounding.

    Raises EvaluationError where a window's nats are not finite.
    """
    before = known.nats_W if known else ()
    nats: list[Tensor] = []
    window_R: list[int] = []
    forward_tokens = 0
    end = len(windows.tokens_W) if end is None else end
    for block in _blocks(windows, len(before), end):
        for batch in _batches(model, windows, block, batch_tokens, reading):
            nats.append(_pass(model, head, batch, gradient))
            window_R.extend(batch.window_B)
            forward_tokens += batch.tokens
    if not nats:
        return Score(before[:end], windows.tokens_W[:end]), 0
    nats_W = np.bincount(window_R, weights=torch.cat(nats).cpu().numpy(), minlength=end)
    return Score((*before, *nats_W[len(before) :].tolist()), windows.tokens_W[:end]), forward_tokens


def _pass(model: PreTrainedModel, head: Head | None, batch: _Batch, gradient: bool) -> Tensor:
    """Nats of each row in float64,  sum_t -ln softmax(logits_t)[target_t] ; backward too where gradients are wanted."""
    assert not model.training, "dropout would make logits random"
    with torch.enable_grad() if gradient else torch.inference_mode():
        nats_B = nll(model, batch.inputs, batch.targets_BT, batch.scored_R, head).double().sum(dim=1)
    if gradient:
        nats_B.sum().backward()  # type: ignore[no-untyped-call]
    return nats_B.detach()


def _blocks(windows: PreparedWindows, first: int, end: int) -> Iterator[range]:
    """The blocks of windows from `first` to `end`."""
    edges = (0, *stops(len(windows.tokens_W)))
    assert {first, end} <= set(edges), f"windows {first} to {end} are no blocks"
    yield from (range(start, stop) for start, stop in pairwise(edges) if first <= start and stop <= end)


def _batches(
    model: PreTrainedModel, windows: PreparedWindows, block: range, batch_tokens: int, reading: Reading
) -> tuple[_Batch, ...]:
    """Rows of the kind that the model reads, of one block, and no more tokens than it has."""
    key = block, min(batch_tokens, len(block) * windows.ids_WT.shape[1]), reading
    if key not in windows.batches:
        windows.batches[key] = tuple(_make_batches(model, windows, *key))
    return windows.batches[key]


def _make_batches(
    model: PreTrainedModel, windows: PreparedWindows, block: range, most: int, reading: Reading
) -> Iterator[_Batch]:
    if reading == "packed":
        yield from _packed(windows, block, most)
        return
    for documents in _alike([one for one in windows.documents if one.window in block], most):
        yield _separate(windows, documents) if reading == "separate" else _paired(model, windows, documents)


def _packed(windows: PreparedWindows, block: range, batch_tokens: int) -> Iterator[_Batch]:
    """Whole windows in their order."""
    rows = max(1, batch_tokens // windows.ids_WT.shape[1])
    for first in range(block.start, block.stop, rows):
        part = slice(first, min(first + rows, block.stop))
        inputs = {"input_ids": windows.ids_WT[part], "position_ids": windows.positions_WT[part]}
        yield _Batch.of(inputs, windows.targets_WT[part], tuple(range(part.start, part.stop)))


def _alike(documents: Sequence[_Document], batch_tokens: int) -> Iterator[Sequence[_Document]]:
    """Documents of like length together, as many as fit when padded to the longest, which comes first."""
    first = 0
    while first < len(documents):
        rows = max(1, batch_tokens // len(documents[first]))
        yield documents[first : first + rows]
        first += rows


def _separate(windows: PreparedWindows, documents: Sequence[_Document]) -> _Batch:
    """One document a row."""
    ids = [windows.ids_WT[one.window, one.start : one.end] for one in documents]
    targets = [windows.targets_WT[one.window, one.start : one.end] for one in documents]
    return _Batch.of({"input_ids": _padded(ids)}, _padded(targets, UNSCORED), tuple(one.window for one in documents))


def _paired(model: PreTrainedModel, windows: PreparedWindows, documents: Sequence[_Document]) -> _Batch:
    """One pair a row.  What predicts a token stands one place before it: the start token, then the target's own."""
    sources = [windows.ids_WT[one.window, one.start : one.first] for one in documents]
    targets = [windows.targets_WT[one.window, one.first - 1 : one.end - 1] for one in documents]
    decoded = [windows.ids_WT[one.window, one.first : one.end - 1] for one in documents]
    start_1 = windows.ids_WT.new_tensor([model.config.decoder_start_token_id])
    inputs = {
        "input_ids": _padded(sources),
        "attention_mask": _padded([torch.ones_like(ids) for ids in sources]),
        "decoder_input_ids": _padded([torch.cat([start_1, ids]) for ids in decoded]),
    }
    return _Batch.of(inputs, _padded(targets, UNSCORED), tuple(one.window for one in documents))


def _padded(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)


def _logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Logits [B, T, V], without a cache (with it packed documents leak); a causal model gets no attention mask."""
    logits_BTV: Tensor = model(**inputs, use_cache=False).logits
    return logits_BTV


@torch.no_grad()
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
    packed_2T = torch.cat([before_2T, text_1T.expand(2, -1)], dim=1)
    packed_2TV = _logits(model, input_ids=packed_2T, position_ids=positions_1T.expand(2, -1))
    alone_TV = _logits(model, input_ids=text_1T, position_ids=positions_1T[:, 12:])[0]
    first_TV, second_TV = packed_2TV[:, 12:]
    return torch.equal(first_TV, second_TV) and _near(first_TV, alone_TV)


def _near(x_TV: Tensor, y_TV: Tensor) -> bool:
    """||x - y|| <= sqrt(eps) ||y||, eps being the resolution of the logits' dtype."""
    distance = (x_TV.double() - y_TV.double()).norm()
    return bool(distance <= torch.finfo(y_TV.dtype).eps ** 0.5 * y_TV.double().norm())
