"""Negative log-likelihood of a corpus: a model and token windows -> nats per window.

    nats_w = -sum_t ln p(x_t | x_<t of its own document)

Cross-entropy is taken in float32 and summed over a window in float64.

Shape suffixes: W windows of a corpus, B batch rows, T tokens, R scored tokens of a batch, V vocabulary.
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

from dem_opt.evaluation.interim_analyses import windows_by_analysis
from dem_opt.evaluation.lm_head import UNSCORED, LanguageModelHead, token_nll
from dem_opt.types import Score, Windows

DocumentLayout = Literal["packed", "separate", "paired"]
"""Rows of a forward call: windows of packed documents, single documents, or pairs of source and target."""

# A prepared token: its id, position, target and, if it is scored, place in the flat batch, all int64.  The worker's
# spec keeps the arrays they were made from: id, position, document and bytes as int64, and a bool.
_PREPARED_TOKEN_BYTES, _SPEC_TOKEN_BYTES = 4 * 8, 4 * 8 + 1


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedWindows:
    """One corpus's windows as tensors on a device.

    Attributes:
        ids_WT: Token ids.
        positions_WT: Positions, which restart where a document starts.
        targets_WT: The token to predict after each token; UNSCORED where it is not scored.
        tokens_W: Scored tokens of each window.
        bytes_W: UTF-8 bytes of the text that is scored in each window; empty where they are not known.
        documents: Documents with at least one scored token, longest first.
        batches: Arguments of forward calls by block, batch size and layout, made on first use and kept.
    """

    ids_WT: Tensor
    positions_WT: Tensor
    targets_WT: Tensor
    tokens_W: tuple[int, ...]
    bytes_W: tuple[int, ...]
    documents: tuple["_Document", ...]
    batches: dict[tuple[range, int, DocumentLayout], tuple["_Batch", ...]] = field(default_factory=dict)

    @staticmethod
    def memory_bytes(windows: int, length: int) -> int:
        """Bytes of a corpus's tensors and of the arrays in the worker's spec, if every token is scored."""
        return windows * length * (_PREPARED_TOKEN_BYTES + _SPEC_TOKEN_BYTES)


@dataclass(frozen=True, kw_only=True)
class _Document:
    """Tokens `start` to `end` of a window; those before `first` are not scored."""

    window: int
    start: int
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, eq=False)
class _Batch:
    """One forward call.

    Attributes:
        inputs: Its arguments.
        targets_BT: The token to predict at each place.
        window_B: The window that each row's nats count for.
        scored_R: Places of the scored tokens in the flattened batch.
    """

    inputs: Mapping[str, Tensor]
    targets_BT: Tensor
    window_B: tuple[int, ...]
    scored_R: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], targets_BT: Tensor, window_B: tuple[int, ...]) -> Self:
        """Make a batch.  `nonzero` waits for the device, so this happens once and not in every forward call."""
        return cls(inputs, targets_BT, window_B, (targets_BT.flatten() != UNSCORED).nonzero().flatten())

    @property
    def tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return sum(ids.numel() for name, ids in self.inputs.items() if name.endswith("input_ids"))


def prepare(windows: Windows, device: torch.device) -> PreparedWindows:
    """Copy windows to a device, where they stay, so that scoring copies nothing."""
    targets_WT = np.full_like(windows.ids_WT, UNSCORED)
    targets_WT[:, :-1] = np.where(windows.scored_WT[:, 1:], windows.ids_WT[:, 1:], UNSCORED)
    return PreparedWindows(
        ids_WT=torch.tensor(windows.ids_WT, device=device),
        positions_WT=torch.tensor(windows.positions_WT, device=device),
        targets_WT=torch.tensor(targets_WT, device=device),
        tokens_W=windows.tokens_W,
        bytes_W=windows.bytes_W,
        documents=tuple(sorted(_documents(windows), key=len, reverse=True)),
    )


def _documents(windows: Windows) -> Iterator[_Document]:
    """Yield the documents with scored tokens; positions make each token of padding a document of its own."""
    length = windows.ids_WT.shape[1]
    for window, positions_T in enumerate(windows.positions_WT):
        for start, end in pairwise([*np.flatnonzero(positions_T == 0).tolist(), length]):
            scored = np.flatnonzero(windows.scored_WT[window, start:end])
            if len(scored):
                yield _Document(window=window, start=start, first=start + int(scored[0]), end=end)


def document_layout(model: PreTrainedModel) -> DocumentLayout:
    """Choose the rows of a model's forward calls; the choice holds for all weights of an architecture."""
    if model.config.is_encoder_decoder:
        return "paired"
    return "packed" if isolates_documents(model) else "separate"


def score(
    model: PreTrainedModel,
    windows: PreparedWindows,
    batch_tokens: int,
    layout: DocumentLayout,
    known: Score | None = None,
    end: int | None = None,
    gradient: bool = False,
    head: LanguageModelHead | None = None,
) -> tuple[Score, int]:
    """Score the first windows of a corpus, one forward call for each batch.

    No batch spans two blocks, which are the windows between two interim analyses: so a window's nats are the same to
    the bit whether all windows are scored at once, or some are `known` and the others scored now.

    Layouts: "packed" rows are windows, and positions restart with each document.  "separate" rows are documents, padded
    at the end, where a causal model's earlier tokens do not see it.  "paired" rows are pairs: the encoder reads the
    tokens before a document's first scored one, the decoder predicts the others from its start token on.

    Args:
        model: The merged model.
        windows: The corpus.
        batch_tokens: Most tokens of a forward call; at least one row is passed.
        layout: The rows of forward calls.
        known: Nats of the first windows; they end at an interim analysis and are not scored again.
        end: Number of windows to score, which an interim analysis sees; all by default.
        gradient: Also backpropagate each batch's nats into the parameters that require gradients.  Packed nats are the
            same to the bit on a CPU; other layouts' kernels (convolutions, attention with a learned bias) differ with
            gradients, and nats may differ by rounding.
        head: The model's head, which saves memory.

    Returns:
        Nats of the first `end` windows, and the tokens that went through the model.

    Raises:
        EvaluationError: A window's nats are not finite.
    """
    before = known.nats_W if known else ()
    nats: list[Tensor] = []
    window_R: list[int] = []
    forward_tokens = 0
    end = len(windows.tokens_W) if end is None else end
    for block in _blocks(windows, len(before), end):
        for batch in _batches(model, windows, block, batch_tokens, layout):
            nats.append(_pass(model, head, batch, gradient))
            window_R.extend(batch.window_B)
            forward_tokens += batch.tokens
    if not nats:
        return Score(before[:end], windows.tokens_W[:end], windows.bytes_W[:end]), 0
    nats_W = np.bincount(window_R, weights=torch.cat(nats).cpu().numpy(), minlength=end)
    all_nats = (*before, *nats_W[len(before) :].tolist())
    return Score(all_nats, windows.tokens_W[:end], windows.bytes_W[:end]), forward_tokens


def _pass(model: PreTrainedModel, head: LanguageModelHead | None, batch: _Batch, gradient: bool) -> Tensor:
    """Compute the nats of each row in float64, and backpropagate their sum if asked to."""
    assert not model.training, "dropout would make logits random"
    with torch.enable_grad() if gradient else torch.inference_mode():
        nats_B = token_nll(model, batch.inputs, batch.targets_BT, batch.scored_R, head).double().sum(dim=1)
    if gradient:
        nats_B.sum().backward()  # type: ignore[no-untyped-call]
    return nats_B.detach()


def _blocks(windows: PreparedWindows, first: int, end: int) -> Iterator[range]:
    """Yield the blocks of windows from `first` to `end`."""
    edges = (0, *windows_by_analysis(len(windows.tokens_W)))
    assert {first, end} <= set(edges), f"windows {first} to {end} do not make up whole blocks"
    yield from (range(start, stop) for start, stop in pairwise(edges) if first <= start and stop <= end)


def _batches(
    model: PreTrainedModel, windows: PreparedWindows, block: range, batch_tokens: int, layout: DocumentLayout
) -> tuple[_Batch, ...]:
    """Return the batches of one block, made on first use."""
    key = block, min(batch_tokens, len(block) * windows.ids_WT.shape[1]), layout
    if key not in windows.batches:
        windows.batches[key] = tuple(_make_batches(model, windows, *key))
    return windows.batches[key]


def _make_batches(
    model: PreTrainedModel, windows: PreparedWindows, block: range, batch_tokens: int, layout: DocumentLayout
) -> Iterator[_Batch]:
    if layout == "packed":
        yield from _packed(windows, block, batch_tokens)
        return
    in_block = [document for document in windows.documents if document.window in block]
    for documents in _by_length(in_block, batch_tokens):
        yield _separate(windows, documents) if layout == "separate" else _paired(model, windows, documents)


def _packed(windows: PreparedWindows, block: range, batch_tokens: int) -> Iterator[_Batch]:
    """Batch whole windows in their order."""
    rows = max(1, batch_tokens // windows.ids_WT.shape[1])
    for first in range(block.start, block.stop, rows):
        part = slice(first, min(first + rows, block.stop))
        inputs = {"input_ids": windows.ids_WT[part], "position_ids": windows.positions_WT[part]}
        yield _Batch.of(inputs, windows.targets_WT[part], tuple(range(part.start, part.stop)))


def _by_length(documents: Sequence[_Document], batch_tokens: int) -> Iterator[Sequence[_Document]]:
    """Group documents, sorted by length, so that each group padded to its longest has at most `batch_tokens`."""
    first = 0
    while first < len(documents):
        rows = max(1, batch_tokens // len(documents[first]))
        yield documents[first : first + rows]
        first += rows


def _separate(windows: PreparedWindows, documents: Sequence[_Document]) -> _Batch:
    """Batch documents, one a row."""
    ids = [windows.ids_WT[document.window, document.start : document.end] for document in documents]
    targets = [windows.targets_WT[document.window, document.start : document.end] for document in documents]
    window_B = tuple(document.window for document in documents)
    return _Batch.of({"input_ids": _padded(ids)}, _padded(targets, UNSCORED), window_B)


def _paired(model: PreTrainedModel, windows: PreparedWindows, documents: Sequence[_Document]) -> _Batch:
    """Batch pairs, one a row.  The decoder's input is its target shifted by one, behind the start token."""
    sources = [windows.ids_WT[pair.window, pair.start : pair.first] for pair in documents]
    targets = [windows.targets_WT[pair.window, pair.first - 1 : pair.end - 1] for pair in documents]
    decoded = [windows.ids_WT[pair.window, pair.first : pair.end - 1] for pair in documents]
    start_1 = windows.ids_WT.new_tensor([model.config.decoder_start_token_id])
    inputs = {
        "input_ids": _padded(sources),
        "attention_mask": _padded([torch.ones_like(ids) for ids in sources]),
        "decoder_input_ids": _padded([torch.cat([start_1, ids]) for ids in decoded]),
    }
    return _Batch.of(inputs, _padded(targets, UNSCORED), tuple(pair.window for pair in documents))


def _padded(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_value=value)


def _logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    """Logits [B, T, V].  With a cache transformers does not mask by positions, and packed documents leak."""
    logits_BTV: Tensor = model(**inputs, use_cache=False).logits
    return logits_BTV


@torch.no_grad()
def isolates_documents(model: PreTrainedModel) -> bool:
    """Return whether a model keeps packed documents apart when their positions restart.

    Packs one short random text behind each of two others.  Its logits must be the same behind both, to the bit: a
    masked token has weight exactly 0, while a leak of a hybrid architecture can be smaller than bfloat16's rounding.
    Up to rounding they must be those of the text alone.
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
    """Return whether  ||x - y|| <= sqrt(eps) ||y|| , eps being the resolution of the logits' dtype."""
    distance = (x_TV.double() - y_TV.double()).norm()
    return bool(distance <= torch.finfo(y_TV.dtype).eps ** 0.5 * y_TV.double().norm())
