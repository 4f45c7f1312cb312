"""Conversations -> texts and token ids, by a tokenizer's chat template."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dem_opt.config import CHAT_DATE
from dem_opt.data.documents import Document, Pair
from dem_opt.data.messages import Chat, Turn
from dem_opt.data.tokenize import Source, Tokens
from dem_opt.data.tokenize import encode as encode_text
from dem_opt.errors import InputError

_GENERATION = re.compile(r"(\{%-?\s*)generation(\s*-?%\})")
_END_GENERATION = re.compile(r"(\{%-?\s*)endgeneration(\s*-?%\})")
_MARKS = "\ufdd0\ufdd1"
"""Characters that stand in no text: Unicode keeps them for uses such as this one."""

_DIRECTIVES = "aAbBcdDeFgGhHIjklmMnpPrRsSTuUVwWxXyYzZ"
_RENDERED = {"add_special_tokens": False}
"""Arguments of the tokenizer for a text that the template has written: it has its special tokens already."""

_PROBE = "\ue000"
"""A character of private use, which stands for the words of a message or the name of a tool."""

_ASKS_FOR_NULL = re.compile(r"content['\"\])\s]*\s(is|==)\s+none\b", re.IGNORECASE)
"""A template's test whether a message's content is null."""

_WITH_NULLS = (
    "{%- set with_nulls = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set with_nulls.messages = with_nulls.messages + "
    "[message if 'content' in message else dict(message, content=none)] -%}"
    "{%- endfor -%}{%- set messages = with_nulls.messages -%}{{ '' }}"
)
"""The beginning of a template that has null as the content of messages without one; transformers drops keys of null."""

_TEMPLATE_FAULTS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError, NotImplementedError),
)
"""Errors of a template: its own, and those of the expressions in it."""


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the chat template writes today's date."""
    return "strftime_now" in json.dumps(tokenizer.chat_template)


def rendered(document: Document, tokenizer: PreTrainedTokenizerBase, today: date = CHAT_DATE) -> str:
    """A document as a text: of a pair both parts, of a conversation what the chat template makes of it.

    Raises:
        InputError: The chat template refuses the conversation.
    """
    if isinstance(document, str):
        return document
    if isinstance(document, Pair):
        return document.prompt + document.completion
    return ChatTemplate(tokenizer, today).text(document)


def encode_chats(
    chats: Iterable[Chat], tokenizer: PreTrainedTokenizerBase, today: date = CHAT_DATE
) -> Iterator[Tokens]:
    """Each conversation in the tokenizer's chat template; what the assistant says is scored.

    That is what stands within {% generation %} where the template has such marks.  Where it has none, it is what an
    assistant's turn adds to the conversation before it and the generation prompt.  Of a template that writes earlier
    turns in another way than the last one, without their reasoning for example, each assistant's turn is scored in
    the rendering in which it is last, so that such a conversation is encoded once for each of these turns.

    Raises:
        InputError: The tokenizer has no chat template, it refuses a conversation or leaves out its tool calls, or it
            can't be told which of its tokens are the assistant's.  The error names no file; the caller adds it.
    """
    template = ChatTemplate(tokenizer, today)
    for number, chat in enumerate(chats):
        for tokens in template.encode(chat):
            yield replace(tokens, document=number)


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
        tokenizer: The tokenizer.
        today: The date that the template gets as today's.
    """

    tokenizer: PreTrainedTokenizerBase
    today: date

    def text(self, chat: Chat, prompted: bool = False) -> str:
        """A conversation as text, with the generation prompt where `prompted`."""
        messages, source = self._messages(chat), self._source(chat)
        return str(self._apply(chat, messages, source, add_generation_prompt=prompted, tokenize=False))

    def texts(self, chat: Chat) -> tuple[str, ...]:
        """The texts that `encode` may make tokens of: the conversation, and those that end with a scored turn."""
        return self.text(chat), *(self.text(_first(chat, place + 1)) for place in chat.scored_places)

    def encode(self, chat: Chat) -> Iterator[Tokens]:
        """A conversation as token ids, or as several where turns have to be scored apart."""
        self._check_calls(chat)
        if self.tokenizer.is_fast and not chat.scored_from and _GENERATION.search(self._source(chat)):
            tokens = self._by_marks(chat)
            if tokens is not None and tokens.scored_L.any():
                yield tokens
                return
        text = self.text(chat)
        whole = self._ids_of(text)
        spans = [self._span(chat, place, whole) for place in chat.scored_places]
        if None not in spans:
            yield _tokens(text, whole, [span for span in spans if span is not None])
            return
        for place in chat.scored_places:
            yield self._last_turn(_first(chat, place + 1))

    def _by_marks(self, chat: Chat) -> Tokens | None:
        """A conversation of which the tokens within the marks are scored, each that has a character there.

        None where turns are masked and the template does not write one pair of marks for each of the assistant's.
        """
        source = _with_marks(self._source(chat))
        pieces = re.split(f"[{_MARKS}]", str(self._apply(chat, self._messages(chat), source, tokenize=False)))
        text = "".join(pieces)
        encoding = self.tokenizer(text, add_special_tokens=False, verbose=False)
        ids, places = list(encoding["input_ids"]), np.cumsum([len(piece) for piece in pieces]).tolist()
        regions = list(zip(places[:-1:2], places[1::2], strict=True))
        if chat.masked_places:
            masked = [turn.masked for turn in chat.turns if turn.role == "assistant"]
            if len(regions) != len(masked):
                return None
            regions = [region for region, is_masked in zip(regions, masked, strict=True) if not is_masked]
        spans = []
        for start, end in regions:
            if start < end:
                first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
                begin = self._tokens_before(text, start, ids) if first is None else first
                spans.append((begin, self._tokens_before(text, end, ids) if last is None else last + 1))
        return _tokens(text, ids, spans)

    def _tokens_before(self, text: str, place: int, ids: list[int]) -> int:
        """How many of a text's tokens stand before a character to which no token has been assigned.

        Tokenizers that trim offsets, as those of GPT-2 and Llama 3 do, assign none to white space.
        """
        before = list(self.tokenizer(text[:place], add_special_tokens=False, verbose=False)["input_ids"])
        if ids[: len(before)] == before:
            return len(before)
        return int(np.searchsorted(self._character_ends(text), place, side="right"))

    def _span(self, chat: Chat, place: int, whole: list[int]) -> tuple[int, int] | None:
        """Where a turn begins and ends within the ids of all; None where the template rewrites what stands before."""
        before = self._ids(_first(chat, place), prompted=True)
        through = self._ids(_first(chat, place + 1))
        agrees = whole[: len(before)] == before and whole[: len(through)] == through
        return (len(before), len(through)) if agrees else None

    def _last_turn(self, chat: Chat) -> Tokens:
        """A conversation of which the last turn is scored."""
        text = self.text(chat)
        before, whole = self._ids(_first(chat, len(chat.turns) - 1), prompted=True), self._ids_of(text)
        if whole[: len(before)] == before:
            return _tokens(text, whole, [(len(before), len(whole))])
        ends_L = self._character_ends(text)
        first = int(np.searchsorted(ends_L, self._start_of_last(chat, text), side="right"))
        return _tokens(text, whole, [(first, len(whole))])

    def _start_of_last(self, chat: Chat, text: str) -> int:
        """The character at which the last turn begins: behind the generation prompt.

        Some templates prompt for reasoning and then leave it out of the turn, or write earlier turns in another way
        while the assistant is prompted.  There the turn begins where one with other words would differ.
        """
        *earlier, last = chat.turns
        prompt = self.text(_first(chat, len(earlier)), prompted=True)
        if text.startswith(prompt):
            return len(prompt)
        probe = self.text(replace(chat, turns=(*earlier, replace(last, content=_PROBE))))
        start = next((place for place, pair in enumerate(zip(text, probe, strict=False)) if pair[0] != pair[1]), -1)
        if start < 0 or not probe.startswith(_PROBE, start):
            raise self._untold()
        return start

    def _character_ends(self, text: str) -> NDArray[np.int64]:
        """The character behind each token of a rendered text."""
        if not self.tokenizer.is_fast:
            raise self._untold()
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return np.array([end for _, end in encoding["offset_mapping"]], dtype=np.int64)

    def _untold(self) -> InputError:
        mend = (
            "the template does not write the assistant's words as they are, or a token spans where a turn begins, so "
            "the assistant's tokens can't be told; mark them in it with {% generation %}, or give pairs: format "
            "prompt_completion"
        )
        return InputError(self.tokenizer.name_or_path, "chat_template", None, mend)

    def _check_calls(self, chat: Chat) -> None:
        """Raise InputError where the template leaves out the arguments of tool calls, or the name of one without.

        Anything could stand in their place.
        """
        if not chat.has_calls:
            return
        place = self._left_out(chat, self._messages(chat))
        if place is None:
            return
        turn, mend = chat.turns[place], "take one that writes them"
        if turn.content and _ASKS_FOR_NULL.search(self._source(chat)):
            mend = "it writes those of messages whose content is null: make it null, or take one that writes both"
        mend = f"the chat template leaves out the tool calls of message {place + 1}; {mend}"
        raise InputError(None, "messages", turn.message, mend)

    def _left_out(self, chat: Chat, messages: list[dict[str, Any]]) -> int | None:
        """The place of the first message with a tool call that the template leaves out; None if it writes all."""
        messages, places = deepcopy(messages), list[int]()
        for place, (turn, message) in enumerate(zip(chat.turns, messages, strict=True)):
            for original, function in zip(_calls(turn.message), _calls(message), strict=True):
                probe = f"{_PROBE}{len(places)}{_PROBE}"
                if not original.get("arguments"):
                    function["name"] = probe
                elif isinstance(function["arguments"], dict):
                    function["arguments"] = {probe: probe}
                else:
                    function["arguments"] = json.dumps({probe: probe}, ensure_ascii=False)
                places.append(place)
        text = str(self._apply(chat, messages, self._source(chat), tokenize=False))
        return next((place for k, place in enumerate(places) if f"{_PROBE}{k}{_PROBE}" not in text), None)

    def _ids(self, chat: Chat, prompted: bool = False) -> list[int]:
        return self._ids_of(self.text(chat, prompted))

    def _ids_of(self, text: str) -> list[int]:
        """Token ids of a rendered text, which has its special tokens already."""
        return list(encode_text(self.tokenizer, text=text, **_RENDERED)["input_ids"])

    def _messages(self, chat: Chat) -> list[dict[str, Any]]:
        """The messages in the first spelling that the template takes.

        Data and templates differ in three ways that change no meaning: whether a message with tool calls has an empty
        content, none or null, whether the calls' arguments are an object or its JSON text, and who gives the
        instructions where a template knows no developer.  Of a template that asks for null, as DeepSeek's do, a
        spelling has to have its tool calls written: such a template leaves them out beside any other content.
        """
        source = self._source(chat)
        developer = "developer" if "developer" in source else "system"
        turns = [replace(turn, role=developer) if turn.role == "developer" else turn for turn in chat.turns]
        if not chat.has_calls and all(turn.content is not None for turn in turns):
            return [turn.message for turn in turns]
        asks_for_null = _ASKS_FOR_NULL.search(source) is not None
        contents: list[dict[str, str | None]] = [{}, {"content": ""}]
        spellings = [
            [_spelled(turn, as_object, each) for turn in turns] for as_object in (True, False) for each in contents
        ]
        if asks_for_null:
            spellings += [
                [_spelled(turn, as_object, {"content": None}) for turn in turns] for as_object in (True, False)
            ]
        readable = []
        for messages in spellings:
            try:
                text = str(self._apply(chat, messages, source, tokenize=False))
                is_written = not asks_for_null or self._left_out(chat, messages) is None
            except InputError:
                continue
            if not _shows_python(text, messages):
                readable.append(messages)
                if is_written:
                    return messages
        return readable[0] if readable else spellings[0]

    def _apply(self, chat: Chat, messages: list[dict[str, Any]], source: str, **options: Any) -> Any:
        roles = [turn.role for turn in chat.turns]
        if not roles:
            mend = "a conversation begins with the assistant, which needs a chat template with {% generation %}"
            raise InputError(None, "messages", None, mend)
        source = _on_date(source, self.today)
        if any(message.get("content", "") is None for message in messages):
            source = _WITH_NULLS + source
        tools = json.loads(chat.tools) if chat.tools else None
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, chat_template=source, **options)
        except _TEMPLATE_FAULTS as error:
            reason = str(error).partition("\n")[0]
            mend = f"the chat template refuses a conversation ({reason})"
            raise InputError(None, "messages", roles, mend) from None

    def _source(self, chat: Chat) -> str:
        """The template's text; a tokenizer may have one of its own for conversations with tools."""
        try:
            return str(self.tokenizer.get_chat_template(tools=[] if chat.tools else None))
        except ValueError:
            mend = "the tokenizer has no chat template, which format messages needs; add one, or give prompt_completion"
            raise InputError(self.tokenizer.name_or_path, "chat_template", None, mend) from None


def _first(chat: Chat, count: int) -> Chat:
    return replace(chat, turns=chat.turns[:count])


def _tokens(text: str, ids: list[int], spans: list[tuple[int, int]]) -> Tokens:
    """Ids of a rendered text, of which those within the spans are scored, but never the first, which follows none."""
    scored_L = np.zeros(len(ids), dtype=np.bool_)
    for start, end in spans:
        scored_L[start:end] = True
    scored_L[:1] = False
    return Tokens(np.array(ids, dtype=np.int64), scored_L, Source(text=text, options=_RENDERED))


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The functions that a message calls: objects with name and arguments, which belong to the message."""
    calls = [call.get("function", call) for call in message.get("tool_calls", ())]
    return [*calls, message["function_call"]] if "function_call" in message else calls


def _spelled(turn: Turn, as_object: bool, content: Mapping[str, str | None]) -> dict[str, Any]:
    """A turn's message with its calls' arguments as objects or as text, and with this content where it has none."""
    message = turn.message
    for function in _calls(message):
        arguments = function.get("arguments")
        if as_object and isinstance(arguments, str):
            function["arguments"] = _object(arguments)
        elif not as_object and isinstance(arguments, dict):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    return {"role": turn.role, **content} | message


def _object(text: str) -> Any:
    """The JSON object that a text is; the text where it is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _shows_python(text: str, messages: list[dict[str, Any]]) -> bool:
    """True if an object of arguments was printed as Python does, by a template that expects JSON text."""
    arguments = [function.get("arguments") for message in messages for function in _calls(message)]
    return any(isinstance(each, dict) and each and str(each) in text for each in arguments)


@lru_cache(maxsize=32)
def _with_marks(template: str) -> str:
    """A template that writes a character at the beginning and one at the end of what it marks."""
    begin, end = _MARKS[0], _MARKS[1]
    marked = _END_GENERATION.sub(r"\1endcall\2", _GENERATION.sub(r"\1call marked()\2", template))
    return f"{{%- macro marked() -%}}{begin}{{{{ caller() }}}}{end}{{%- endmacro -%}}{marked}"


@lru_cache(maxsize=32)
def _on_date(template: str, today: date) -> str:
    """A template to which `strftime_now` gives this day at midnight.

    Only a macro can take the place of the function: transformers makes anything else that is given to a template a
    constant.
    """
    if "strftime_now" not in template:
        return template
    parts = [(f"%-{letter}", today.strftime(f"%{letter}").lstrip("0") or "0") for letter in "dmHIMSjy"]
    parts += [(f"%{letter}", today.strftime(f"%{letter}")) for letter in _DIRECTIVES]
    replacements = "".join(
        f"|replace({json.dumps(name)}, {json.dumps(value)})" for name, value in (*parts, ("%%", "%"))
    )
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{replacements} }}}}{{%- endmacro -%}}{template}"
