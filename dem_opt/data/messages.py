"""Messages of a data file -> conversations, with every key that a chat template may read."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dem_opt.data.rows import MISSING, Row
from dem_opt.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles of a conversation's turns."""

SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""Roles by the names that ShareGPT's `from` has for them, beside `ROLES`."""

_TEXT_PARTS = ("text", "input_text", "output_text")
_SPEECH = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Keys in which the assistant says something beside its content."""

MASKS = ("weight", "train", "training", "loss")
"""Keys of a message that say by 0 or 1, or by false or true, whether to learn what the assistant says in it.

OpenAI's, Mistral's and Together's fine-tuning call it `weight`, axolotl `train` or `training`, ms-swift `loss`.
"""

_PARTIAL_MASKS = ("train_detail", "training_detail")

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    """A message of a conversation; the assistant's are scored.

    Attributes:
        role: One of `ROLES`.
        content: Its text; None where it has none beside its tool calls or reasoning.
        more: Its other keys as a JSON object, in the order of the file; "" where there are none.
        masked: It is not to be learned: no token of it is scored.
    """

    role: str
    content: str | None
    more: str = ""
    masked: bool = False

    @property
    def message(self) -> dict[str, Any]:
        """The message as a chat template gets it; a content of None has no key."""
        content = {} if self.content is None else {"content": self.content}
        return {"role": self.role, **content, **(json.loads(self.more) if self.more else {})}

    @property
    def speaks(self) -> bool:
        """True if it holds more than white space."""
        message = self.message
        return bool((self.content or "").strip()) or any(message.get(key) for key in _SPEECH)


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        turns: Its messages.
        tools: Definitions of its tools as a JSON array; "" where there are none.
        scored_from: Number of turns, the prompt, in which the assistant is not scored.
    """

    turns: tuple[Turn, ...]
    tools: str = ""
    scored_from: int = 0

    @property
    def scored_places(self) -> list[int]:
        """Places of the turns that are scored."""
        places = range(self.scored_from, len(self.turns))
        return [place for place in places if self.turns[place].role == "assistant" and not self.turns[place].masked]

    @property
    def masked_places(self) -> list[int]:
        """Places of the assistant's turns that the data leaves out of what is scored."""
        return [place for place, turn in enumerate(self.turns) if turn.role == "assistant" and turn.masked]

    @property
    def bare(self) -> "Chat":
        """The conversation of roles and contents alone."""
        turns = (Turn(turn.role, turn.content, masked=turn.masked) for turn in self.turns)
        return Chat(tuple(turns), "", self.scored_from)

    @property
    def has_calls(self) -> bool:
        """True if a turn calls tools."""
        return any(key in turn.message for turn in self.turns if turn.more for key in ("tool_calls", "function_call"))


def read_chat(messages: Any, tools: Any, column: str, row: Row, completion: Any = ()) -> Chat:
    """A conversation from a row's messages, or from a prompt and a completion in this form.

    Args:
        messages: A list of messages, or its JSON text.
        tools: A list of tool definitions or its JSON text; None or MISSING without.
        column: The column of the messages.
        row: The row.
        completion: Messages behind the others; the assistant is then scored in these alone.

    Raises:
        InputError: They have another form, or hold something that is no text.
    """
    messages, tools = _decoded(messages), None if tools is MISSING else _decoded(tools)
    if not isinstance(messages, list):
        raise row.must_have(f'"{column}", a list of objects with "role" and "content"')
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise row.error(": tools must be a list of objects, or its JSON text", tools)
    turns = tuple(_turn(message, number, row) for number, message in enumerate([*messages, *completion], start=1))
    return Chat(turns, _json(tools, row) if tools else "", len(messages) if completion else 0)


def _decoded(value: Any) -> Any:
    """A value that may be given as its JSON text, as CSV has to."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _turn(message: Any, number: int, row: Row) -> Turn:
    place = f", message {number}"
    keys = ("from", "value") if isinstance(message, dict) and "role" not in message else ("role", "content")
    role, content = (message.get(key) if isinstance(message, dict) else None for key in keys)
    more = {key: value for key, value in message.items() if key not in keys and value is not None} if role else {}
    if keys[0] == "from" and role == "function_call":
        content, more = None, more | {"tool_calls": [_call(content, place, row)]}
    if isinstance(content, list) and content:
        content = "".join(_part_text(part, f"{place}, part {k}", row) for k, part in enumerate(content, start=1))
    speaks_otherwise = role in ("assistant", *SHAREGPT_ROLES) and any(more.get(key) for key in _SPEECH)
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and speaks_otherwise)):
        mend = 'must be an object with "role" and "content", which is a text or a list of parts with a text each'
        raise row.error(f"{place} {mend}", message)
    calls = more.get("tool_calls", [])
    functions = [more["function_call"]] if "function_call" in more else []
    if not isinstance(calls, list) or not all(map(_is_call, [*calls, *functions])):
        raise row.error(f'{place} must have "tool_calls" that are a list of objects with a "function"', message)
    masked = _is_masked(more, place, row)
    more = {key: value for key, value in more.items() if key not in MASKS}
    turn = Turn(_role(role, keys[0] == "from", place, row), content, _json(more, row) if more else "", masked)
    check_text(content or "", row)
    return turn


def _is_masked(message: Mapping[str, Any], place: str, row: Row) -> bool:
    """True if a message is not to be learned."""
    marks = {key: message[key] for key in MASKS if key in message}
    for key in _PARTIAL_MASKS:
        if message.get(key):
            raise row.error(f'{place} masks parts of itself by "{key}"; only a whole message can be left out', message)
    for key, value in marks.items():
        if value not in (0, 1):
            mend = f'{place} has a "{key}" that is neither 0 nor 1, false nor true: a message is scored or not'
            raise row.error(mend, value)
    if len(set(marks.values())) > 1:
        raise row.error(f"{place} is both to be learned and not ({', '.join(marks)}); say one of them", message)
    return 0 in marks.values()


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("function", value), dict)


def _role(role: str, is_sharegpt: bool, place: str, row: Row) -> str:
    known = {name: name for name in ROLES} | (dict(SHAREGPT_ROLES) if is_sharegpt else {})
    if role not in known:
        raise row.error(f"{place} has an unknown role; {nearest(role, known)}", role)
    return known[role]


def _call(value: Any, place: str, row: Row) -> dict[str, Any]:
    """The tool call that is ShareGPT's `function_call`, a JSON object with name and arguments."""
    function = _decoded(value)
    if not isinstance(function, dict) or "name" not in function:
        raise row.error(f'{place} must have a JSON object with "name" and "arguments" as its value', value)
    return {"type": "function", "function": function}


def _part_text(part: Any, place: str, row: Row) -> str:
    """The text of a part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        raise row.error(f"{place} is no text; only parts of type text can be scored", part)
    if any(key in part for key in MASKS):
        raise row.error(f"{place} has a weight of its own; only a whole message can be left out", part)
    return text


def _json(value: Any, row: Row) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise row.error(f" holds what is no JSON ({error})") from None
    check_text(text, row)
    return text


def check_text(text: str, row: Row) -> None:
    """Raise InputError for a text with half of a surrogate pair, which no tokenizer reads."""
    if _SURROGATE.search(text):
        raise row.error(" holds half of a surrogate pair, which is no text")
