"""Documents -> token ids, with a mask of the scored ones.

Shape suffix: L tokens of one document.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dem_opt.data.documents import Chat, Document, Pair, Turn
from dem_opt.errors import InputError

_D = TypeVar("_D")
_CHARACTERS_AT_ONCE = 2**16
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, eq=False)
class Tokens:
    """One document: token ids, and a mask of those scored given the tokens before them in it."""

    ids_L: NDArray[np.int64]
    scored_L: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids_L)


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
        raise InputError(folder, None, None, f"its tokenizer can't be read ({reason})") from error
    return tokenizer


def _is_unreadable(error: Exception) -> bool:
    """An error of loading means bad files, for which the tokenizers library raises plain `Exception`."""
    return type(error) is Exception or isinstance(
        error, OSError | ValueError | KeyError | TypeError | ImportError | AttributeError
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


def rendered(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """A document as the text that is encoded.

    Raises InputError for conversations that the chat template refuses.
    """
    if isinstance(document, str):
        return document
    if isinstance(document, Pair):
        return document.prompt + document.completion
    return str(_apply_template(document.turns, tokenizer, tokenize=False))


def encode_texts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Each text's token ids with EOS at the end, encoded in batches as they are asked for."""
    for batch in _batches(texts, len):
        for ids in _ids(tokenizer, text=batch):
            yield _with_end(ids, tokenizer)


def encode_pairs(pairs: Iterable[Pair], tokenizer: PreTrainedTokenizerBase, paired: bool) -> Iterator[Tokens]:
    """Each pair as its prompt's tokens, not scored, then its completion's and EOS, scored.

    The prompt is encoded as the tokenizer does it.  For a causal model the completion goes on where the prompt
    ends: EOS is taken off the prompt, the completion gets no other special token, and its first token is not
    scored where no token stands before it.  For an encoder-decoder (`paired`) the completion is encoded as a
    target, and all of it is scored: the first token follows the decoder's start token.

    Raises InputError where an encoder-decoder's prompt has no token.
    """
    for batch in _batches(pairs, lambda pair: len(pair.prompt) + len(pair.completion)):
        sources = _ids(tokenizer, text=[pair.prompt for pair in batch])
        completions = [pair.completion for pair in batch]
        if paired:
            targets = _ids(tokenizer, text_target=completions)
        else:
            sources = [_without_end(ids, tokenizer) for ids in sources]
            targets = _ids(tokenizer, text=completions, add_special_tokens=False)
        for pair, source, target in zip(batch, sources, targets, strict=True):
            if paired and not source:
                raise InputError(None, "prompt", pair.prompt, "has no tokens, and an encoder-decoder needs some")
            yield _parts([(source, False), (_with_end(target, tokenizer), True)])


def encode_chats(chats: Iterable[Chat], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Each conversation in the tokenizer's chat template; what the assistant says is scored.

    That is what stands within {% generation %} where the template has such marks.  Where it has none, it is what
    an assistant's turn adds to the conversation before it and the generation prompt.

    Raises InputError where the tokenizer has no chat template, and where that has no marks and what it makes of
    the first turns is not the beginning of what it makes of all.  Where it refuses a conversation, the error
    names no file; the caller adds it.
    """
    template = _template(tokenizer)
    encode = _by_marks if tokenizer.is_fast and _GENERATION.search(template) else _by_prefixes
    for chat in chats:
        tokens = encode(chat, tokenizer)
        tokens.scored_L[:1] = False
        yield tokens


def _by_marks(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    made = _apply_template(chat.turns, tokenizer, return_dict=True, return_assistant_tokens_mask=True)
    return Tokens(np.array(made["input_ids"], dtype=np.int64), np.array(made["assistant_masks"], dtype=np.bool_))


def _by_prefixes(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Assistant turn i is scored from the end of turns[:i] with the generation prompt to the end of turns[:i + 1]."""
    whole = _turn_ids(chat.turns, tokenizer)
    scored_L = np.zeros(len(whole), dtype=np.bool_)
    for place, turn in enumerate(chat.turns):
        if turn.role == "assistant":
            start = _end(chat.turns[:place], whole, tokenizer, prompted=True)
            scored_L[start : _end(chat.turns[: place + 1], whole, tokenizer)] = True
    return Tokens(np.array(whole, dtype=np.int64), scored_L)


def _end(turns: tuple[Turn, ...], whole: list[int], tokenizer: PreTrainedTokenizerBase, prompted: bool = False) -> int:
    """Where the first turns end within the ids of all."""
    ids = _turn_ids(turns, tokenizer, add_generation_prompt=prompted)
    if whole[: len(ids)] != ids:
        mend = (
            "the template rewrites earlier turns, or a token spans where a turn begins, so the assistant's tokens "
            "can't be told; mark them in it with {% generation %}, or give pairs: format prompt_completion"
        )
        raise InputError(tokenizer.name_or_path, "chat_template", None, mend)
    return len(ids)


def _turn_ids(turns: tuple[Turn, ...], tokenizer: PreTrainedTokenizerBase, **how: Any) -> list[int]:
    if not turns:
        mend = "begins with the assistant, which needs a chat template with {% generation %}"
        raise InputError(None, "messages", None, f"a conversation {mend}")
    return list(_apply_template(turns, tokenizer, return_dict=True, **how)["input_ids"])


def _apply_template(turns: tuple[Turn, ...], tokenizer: PreTrainedTokenizerBase, **how: Any) -> Any:
    conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
    template = _template(tokenizer)
    try:
        return tokenizer.apply_chat_template(conversation, chat_template=template, **how)
    except (TemplateError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        mend = f"the chat template refuses a conversation ({reason})"
        raise InputError(None, "messages", [turn.role for turn in turns], mend) from None


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        mend = "the tokenizer has no chat template, which format messages needs; add one, or give prompt_completion"
        raise InputError(tokenizer.name_or_path, "chat_template", None, mend) from None


def _parts(parts: Sequence[tuple[list[int], bool]]) -> Tokens:
    """Ids one after the other, scored or not; a document's first token is scored only behind another."""
    ids_L = np.array([token for ids, _ in parts for token in ids], dtype=np.int64)
    scored_L = np.repeat([scored for _, scored in parts], [len(ids) for ids, _ in parts])
    scored_L[:1] = False
    return Tokens(ids_L, scored_L)


def _ids(tokenizer: PreTrainedTokenizerBase, **given: Any) -> list[list[int]]:
    """Token ids of a batch of texts (`text` or `text_target`), as they are: neither cut nor padded."""
    encoding: Mapping[str, list[list[int]]] = tokenizer(
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
        **given,
    )
    return encoding["input_ids"]


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
