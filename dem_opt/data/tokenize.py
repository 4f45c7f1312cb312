"""Texts and pairs -> token ids, with a mask of the scored ones.

Shape suffix: L tokens of one document.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.util import find_spec
from itertools import count, groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dem_opt.data.documents import Pair
from dem_opt.errors import InputError

_D = TypeVar("_D")
_CHARACTERS_AT_ONCE = 2**16
_PLAIN = {"add_special_tokens": False}


@dataclass(frozen=True, kw_only=True)
class Source:
    """The text that a document's scored tokens are made of.

    Attributes:
        text: The text.
        start: Place in the document of the text's first token; below 0 where its first tokens were cut off.
        options: Further arguments of the tokenizer.
        target: The text is what an encoder-decoder predicts.
    """

    text: str
    start: int = 0
    options: Mapping[str, bool] = field(default_factory=dict)
    target: bool = False

    def encode(self, tokenizer: PreTrainedTokenizerBase, **options: bool) -> Mapping[str, Any]:
        """The tokenizer's encoding of the text, as the document was made from it."""
        return encode(tokenizer, **{"text_target" if self.target else "text": self.text}, **self.options, **options)


@dataclass(frozen=True, eq=False)
class Tokens:
    """One document: token ids, and a mask of those scored given the tokens before them in it.

    Attributes:
        ids_L: Token ids.
        scored_L: The mask.
        source: The text of the scored tokens.
        document: Number of the document among those that were encoded together; a conversation may be several.
    """

    ids_L: NDArray[np.int64]
    scored_L: NDArray[np.bool_]
    source: Source
    document: int = 0

    def __len__(self) -> int:
        return len(self.ids_L)

    def cut(self, start: int, length: int) -> "Tokens":
        """At most `length` tokens from `start` on."""
        part = slice(start, start + length)
        source = replace(self.source, start=self.source.start - start)
        return Tokens(self.ids_L[part], self.scored_L[part], source, self.document)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder, from its files alone.

    Raises InputError when the folder is missing or its tokenizer can't be read.
    """
    if not folder.is_dir():
        raise InputError(folder, None, None, "no such folder")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        if not _is_unreadable(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        if any(folder.glob("*.model")) and find_spec("sentencepiece") is None:
            reason = "a SentencePiece model needs sentencepiece: pip install 'dem-opt[sentencepiece]'"
        raise InputError(folder, None, None, f"its tokenizer can't be read ({reason})") from error
    return tokenizer


def without_pad_beyond(tokenizer: PreTrainedTokenizerBase, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer, without a padding token for which a model of `rows` embeddings has none.

    Padding stands behind all tokens that are scored and is read by none, so any other id will do.
    """
    if (tokenizer.pad_token_id or 0) >= rows:
        tokenizer.pad_token = None
    return tokenizer


def _is_unreadable(error: Exception) -> bool:
    """An error of loading means bad files, for which the tokenizers library raises plain `Exception`."""
    return type(error) is Exception or isinstance(
        error, OSError | ValueError | KeyError | TypeError | ImportError | AttributeError | RecursionError
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, chat: bool = False) -> str:
    """SHA-256 of everything that decides the ids of a text; of a conversation (`chat`), with the chat template.

    Truncation and padding are left out, since calls set them.
    """
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        identity = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    else:
        identity = {"vocabulary": tokenizer.get_vocab(), "special": tokenizer.special_tokens_map}
    if chat:
        identity |= {"chat_template": tokenizer.chat_template, "special_tokens": tokenizer.special_tokens_map}
    return sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def encode_texts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Each text's tokens with EOS at the end, all scored but the first; encoded in batches as they are asked for."""
    number = count()
    for batch in _batches(texts, len):
        for text, ids in zip(batch, encode(tokenizer, text=batch)["input_ids"], strict=True):
            ids_L = np.array(_with_end(ids, tokenizer), dtype=np.int64)
            yield Tokens(ids_L, np.arange(len(ids_L)) > 0, Source(text=text), next(number))


def encode_plain(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Each text's token ids without any special token, encoded in batches as they are asked for."""
    for batch in _batches(texts, len):
        yield from encode(tokenizer, text=batch, **_PLAIN)["input_ids"]


def encode_pairs(pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, paired: bool) -> Iterator[Tokens]:
    """Each pair as its prompt's tokens, not scored, then its completion's and EOS, scored.

    The prompt is encoded as the tokenizer does it.  For a causal model the completion goes on where the prompt
    ends: EOS is taken off the prompt, the completion gets no other special token, and its first token is not
    scored where no token stands before it.  For an encoder-decoder (`paired`) the completion is encoded as a
    target, and all of it is scored: the first token follows the decoder's start token.

    A tokenizer that puts a space before every text (Llama 2's) would put one before the completion, too: it encodes
    prompt and completion as one text, of which the tokens behind those that the prompt alone begins with are scored.

    Joined pairs are encoded otherwise (`_encode_like_harness`).

    Raises InputError where an encoder-decoder's prompt has no token.
    """
    number = count()
    encode_unjoined = _encode_as_one if not paired and _adds_space(tokenizer) else _encode_apart
    for joined, group in groupby(pairs, lambda pair: pair.joined):
        for tokens in (_encode_like_harness if joined else encode_unjoined)(group, tokenizer, paired):
            yield replace(tokens, document=next(number))


def _encode_apart(pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, paired: bool) -> Iterator[Tokens]:
    options = {} if paired else _PLAIN
    for batch in _batches(pairs, _characters):
        prompts = encode(tokenizer, text=[pair.prompt for pair in batch])["input_ids"]
        if not paired:
            prompts = [_without_end(ids, tokenizer) for ids in prompts]
        completions = {"text_target" if paired else "text": [pair.completion for pair in batch]}
        targets = encode(tokenizer, **completions, **options)["input_ids"]
        for pair, prompt, target in zip(batch, prompts, targets, strict=True):
            if paired and not prompt:
                raise _no_tokens(pair)
            source = Source(text=pair.completion, start=len(prompt), options=options, target=paired)
            yield _behind(prompt, _with_end(target, tokenizer), source)


def _encode_like_harness(pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, paired: bool) -> Iterator[Tokens]:
    """Each pair as lm-evaluation-harness encodes a context and its continuation, so that nats are the same.

    White space at the end of the prompt belongs to the completion.  For a causal model both are encoded as one text:
    its tokens behind as many as the prompt has by itself are scored.  An empty prompt is the tokenizer's BOS, or its
    EOS where it has none.  For an encoder-decoder (`paired`) both are encoded by themselves.  No EOS is scored.
    """
    for batch in _batches(pairs, _characters):
        texts = [pair.prompt.rstrip() for pair in batch]
        prompts = encode(tokenizer, text=texts)["input_ids"]
        for pair, text, prompt in zip(batch, texts, prompts, strict=True):
            whole = pair.prompt + pair.completion
            if paired:
                if not prompt:
                    raise _no_tokens(pair)
                source = Source(text=whole[len(text) :], start=len(prompt), options=_PLAIN, target=True)
                yield _behind(prompt, source.encode(tokenizer)["input_ids"], source)
            elif text:
                source, scored_from = Source(text=whole), len(_without_end(prompt, tokenizer))
                ids = _without_end(source.encode(tokenizer)["input_ids"], tokenizer)
                yield _behind(ids[:scored_from], ids[scored_from:], source)
            else:
                first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
                start = [] if first is None else [first]
                source = Source(text=whole, start=len(start), options=_PLAIN)
                yield _behind(start, source.encode(tokenizer)["input_ids"], source)


def _behind(prompt: list[int], ids: list[int], source: Source) -> Tokens:
    """Tokens that are scored behind a prompt's; a document's first token follows none, and is not scored."""
    ids_L = np.array([*prompt, *ids], dtype=np.int64)
    return Tokens(ids_L, np.arange(len(ids_L)) >= max(len(prompt), 1), source)


def _no_tokens(pair: Pair) -> InputError:
    return InputError(None, "prompt", pair.prompt, "has no tokens, and an encoder-decoder needs some")


def _characters(pair: Pair) -> int:
    return len(pair.prompt) + len(pair.completion)


def _encode_as_one(pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, paired: bool) -> Iterator[Tokens]:
    assert not paired, "an encoder-decoder encodes both by themselves"
    for batch in _batches(pairs, _characters):
        prompts = encode(tokenizer, text=[pair.prompt for pair in batch])["input_ids"]
        texts = [pair.prompt + pair.completion for pair in batch]
        for text, prompt, whole in zip(texts, prompts, encode(tokenizer, text=texts)["input_ids"], strict=True):
            ids = _with_end(whole, tokenizer)
            shared = _shared(_without_end(prompt, tokenizer), whole)
            yield _behind(ids[:shared], ids[shared:], Source(text=text))


def _adds_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if a text's tokens begin with a space that it does not have, as SentencePiece or byte-level BPE spell it."""
    first = tokenizer.convert_ids_to_tokens(encode(tokenizer, text="0", add_special_tokens=False)["input_ids"])[:1]
    return any(str(token).startswith(("\u2581", "\u0120")) for token in first)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of ids that two lists begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(first), len(second)))


def encode(tokenizer: PreTrainedTokenizerBase, **options: Any) -> Mapping[str, Any]:
    """The tokenizer's encoding of texts (`text` or `text_target`), as they are: neither cut nor padded."""
    encoding: Mapping[str, Any] = tokenizer(
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **options,
    )
    return encoding


def _with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _batches(documents: Iterable[_D], characters: Callable[[_D], int]) -> Iterator[list[_D]]:
    """The documents in their order, each batch closed by the one that fills it."""
    batch: list[_D] = []
    filled = 0
    for document in documents:
        batch.append(document)
        filled += characters(document)
        if filled >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch
