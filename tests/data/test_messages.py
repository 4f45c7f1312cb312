"""Laws of conversations: nothing that a template reads is lost, and each way of writing the same is the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import worlds
from recorded import RecordedProgress
from test_documents import CHATS, PAIRS, refusal, write_lines

from dem_opt.config import DataFile, EvaluationSection, GeneralSection
from dem_opt.data.chat_template import encode_chats, rendered
from dem_opt.data.documents import read_documents
from dem_opt.data.messages import Chat, Turn
from dem_opt.data.packing import pack
from dem_opt.data.windows import build_corpora
from dem_opt.errors import InputError
from dem_opt.progress import reporting

HEAD = "{% if tools %}<tools>{{ tools|tojson }}</tools>{% endif %}{% for m in messages %}<{{ m.role }}>"
TAIL = "</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"

CALLING: dict[str, str] = {
    "JSON": HEAD + "{% if m.content %}{{ m.content }}{% endif %}{% for t in m.tool_calls or [] %}"
    '<call>{"name": "{{ t.function.name }}", "arguments": {{ t.function.arguments|tojson }}}</call>{% endfor %}' + TAIL,
    "sum of texts": HEAD + "{{ m['content'] or '' }}{% for t in m.tool_calls or [] %}"
    "{{ '<call>{\"name\": \"' + t.function.name + '\", \"arguments\": ' + t.function.arguments + '}</call>' }}"
    "{% endfor %}" + TAIL,
    "printed": HEAD + "{{ '' + m.content }}{% for t in m.tool_calls or [] %}"
    '<call>{"name": "{{ t.function.name }}", "arguments": {{ t.function.arguments }}}</call>{% endfor %}' + TAIL,
    "either": HEAD + "{{ m.content }}{% for t in m.tool_calls or [] %}{% set a = t.function.arguments %}"
    '<call>{"name": "{{ t.function.name }}", "arguments": {{ a if a is string else a|tojson }}}</call>{% endfor %}'
    + TAIL,
    "items": HEAD + "{{ m.content }}{% for t in m.tool_calls or [] %}"
    '<call>{"name": "{{ t.function.name }}", "arguments": {{ "{" }}{% for k, v in t.function.arguments|items %}'
    '"{{ k }}": {{ v|tojson }}{% if not loop.last %}, {% endif %}{% endfor %}{{ "}" }}}</call>{% endfor %}' + TAIL,
}
"""Templates by the way in which they write a call's arguments; all write the same."""

ASKS_FOR_NULL = (
    "\n{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}<assistant>"
    "{% for t in m['tool_calls'] %}{{ '<call>' + t['type'] + ' ' + t['function']['name'] + ' ' "
    "+ t['function']['arguments'] + '</call>' }}{% endfor %}</s>"
    "{% elif m['role'] == 'assistant' %}{{ '<assistant>' + m['content'] + '</s>' }}"
    "{% else %}{{ '<' + m['role'] + '>' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A template that writes the calls of messages whose content is null, and refuses a message without one."""

ARGUMENTS = {"city": "M\u00fcnchen", "days": 2}


def calling(arguments: Any, **content: Any) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "What now?"},
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 42."},
    ]


def read(folder: Path, *rows: Mapping[str, Any], form: str = "messages", **columns: str) -> list[Any]:
    path = write_lines(folder / "a.jsonl", [dict(row) for row in rows])
    return read_documents(DataFile.model_validate({"path": path, "format": form, **columns}))


def talking(template: str) -> Any:
    tokenizer = worlds.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def said(chat: Chat, template: str) -> str:
    tokenizer = talking(template)
    return "".join(
        tokenizer.decode(tokens.ids_L[tokens.scored_L].tolist()) for tokens in encode_chats([chat], tokenizer)
    )


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}], ids=["missing", "null", "empty"])
@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS, ensure_ascii=False)], ids=["object", "text"])
@pytest.mark.parametrize("name", CALLING)
def test_tool_calls_are_scored_however_they_are_written(
    tmp_path: Path, name: str, arguments: Any, content: dict[str, Any]
) -> None:
    (chat,) = read(tmp_path, {"messages": calling(arguments, **content)})
    call = '<call>{"name": "weather", "arguments": {"city": "M\u00fcnchen", "days": 2}}</call>'
    assert said(chat, CALLING[name]) == f"{call}</s>It is 42.</s>"


@pytest.mark.parametrize("content", [{}, {"content": None}], ids=["missing", "null"])
@pytest.mark.parametrize("arguments", [ARGUMENTS, json.dumps(ARGUMENTS, ensure_ascii=False)], ids=["object", "text"])
def test_a_template_that_asks_for_null_gets_it(tmp_path: Path, arguments: Any, content: dict[str, Any]) -> None:
    (chat,) = read(tmp_path, {"messages": calling(arguments, **content)})
    call = '<call>function weather {"city": "M\u00fcnchen", "days": 2}</call></s>'
    assert said(chat, ASKS_FOR_NULL) == f"{call}It is 42.</s>"
    whole = f"\n<user>What now?</s><assistant>{call}<tool>42</s><assistant>It is 42.</s>"
    assert rendered(chat, talking(ASKS_FOR_NULL)) == whole


def test_calls_beside_a_content_need_null_where_the_template_asks_for_it(tmp_path: Path) -> None:
    (chat,) = read(tmp_path, {"messages": calling(ARGUMENTS, content="I look.")})
    with pytest.raises(InputError, match=r"leaves out the tool calls of message 2; .* null"):
        said(chat, ASKS_FOR_NULL)


@pytest.mark.parametrize("name", [name for name in CALLING if name != "items"])
def test_arguments_that_are_no_object_are_written_as_they_are(tmp_path: Path, name: str) -> None:
    (chat,) = read(tmp_path, {"messages": calling("not {JSON", content="")})
    assert "not {JSON" in said(chat, CALLING[name])


def test_a_template_that_leaves_out_a_call_is_refused(tmp_path: Path) -> None:
    (chat,) = read(tmp_path, {"messages": calling(ARGUMENTS, content="I look.")})
    first = CALLING["JSON"].replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    assert "I look." in said(chat, first)
    more = json.loads(chat.turns[1].more)
    two = Chat((chat.turns[0], Turn("assistant", "", json.dumps({"tool_calls": more["tool_calls"] * 2}))))
    for template, document in ((HEAD + "{{ m.content }}" + TAIL, chat), (first, two)):
        with pytest.raises(InputError, match="leaves out the tool calls of message 2"):
            said(document, template)


@pytest.mark.parametrize("arguments", [ARGUMENTS, "{}", "no JSON"])
def test_a_template_may_write_of_a_call_the_arguments_alone(tmp_path: Path, arguments: Any) -> None:
    (chat,) = read(tmp_path, {"messages": calling(arguments, content="")})
    template = (
        HEAD
        + "{{ m.content }}{% for t in m.tool_calls or [] %}{{ '(' + t.function.arguments + ')' }}{% endfor %}"
        + TAIL
    )
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    assert said(chat, template) == f"({written})</s>It is 42.</s>"
    with pytest.raises(InputError, match="leaves out the tool calls"):
        said(chat, HEAD + "{{ m.content }}{% for t in m.tool_calls or [] %}{{ t.function.name }}{% endfor %}" + TAIL)


def test_every_key_of_a_message_and_the_tools_reach_the_template(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b", "reasoning_content": "c", "own": {"key": [1, None]}},
    ]
    template = HEAD + "{{ m.name }}{{ m.reasoning_content }}{{ m.own|tojson if m.own }}{{ m.content }}" + TAIL
    written = f'<tools>{json.dumps(tools)}</tools><user>Anna</s><assistant>c{{"key": [1, null]}}b</s>'
    for form in (tools, json.dumps(tools)):
        (chat,) = read(tmp_path, {"messages": messages, "tools": form})
        assert rendered(chat, talking(template)) == written
        (chat,) = read(tmp_path, {"messages": messages, "functions": form}, tools="functions")
        assert rendered(chat, talking(template)) == written
    (chat,) = read(tmp_path, {"messages": messages, "tools": tools})
    named = talking(template)
    named.chat_template = {"default": "no tools", "tool_use": template}
    assert rendered(chat, named) == written


def test_the_developer_is_who_the_template_knows(tmp_path: Path) -> None:
    (chat,) = read(
        tmp_path, {"messages": [{"role": "developer", "content": "a"}, {"role": "assistant", "content": "b"}]}
    )
    template = HEAD + "{{ m.content }}" + TAIL
    assert rendered(chat, talking(template)) == "<system>a</s><assistant>b</s>"
    assert rendered(chat, talking("{# developer #}" + template)) == "<developer>a</s><assistant>b</s>"


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "one two"}],
        [{"type": "input_text", "text": "one"}, {"type": "output_text", "text": " two", "annotations": []}],
        ["one ", {"text": "two"}],
    ],
)
def test_content_in_parts_is_its_text(tmp_path: Path, parts: list[Any]) -> None:
    (chat,) = read(tmp_path, {"messages": [{"role": "assistant", "content": parts}]})
    assert chat == Chat((Turn("assistant", "one two"),))


def test_sharegpt_is_the_same_conversation(tmp_path: Path) -> None:
    call = {"name": "weather", "arguments": ARGUMENTS}
    spoken = [
        ("system", "a"),
        ("human", "b"),
        ("function_call", json.dumps(call)),
        ("observation", "42"),
        ("gpt", "c"),
    ]
    conversation = [{"from": name, "value": value} for name, value in spoken]
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "c"},
    ]
    (expected,) = read(tmp_path, {"messages": messages})
    assert read(tmp_path, {"conversations": conversation}) == [expected]
    assert read(tmp_path, {"talk": conversation}, messages="talk") == [expected]


MARKED = HEAD + (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEMPLATES = {
    "spans": HEAD + "{{ m.content }}" + TAIL,
    "marks": MARKED,
    "two marks": MARKED.replace(
        "{{ m.content }}</s>{% endg", "{{ m.content }}{% endgeneration %}{% generation %}</s>{% endg"
    ),
    "earlier turns rewritten": HEAD + "{{ m.content if loop.last else m.content|upper }}" + TAIL,
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("key", "no", "yes"),
    [("weight", 0, 1), ("weight", 0.0, None), ("train", False, True), ("training", False, None), ("loss", False, True)],
)
def test_a_masked_message_is_read_and_not_scored(tmp_path: Path, name: str, key: str, no: Any, yes: Any) -> None:
    plain = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "wrong"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "right"},
    ]
    masks = {1: {key: no}, 2: {key: no}, 3: {key: yes}}
    (chat,) = read(tmp_path, {"messages": [m | masks.get(k, {}) for k, m in enumerate(plain)]})
    (whole,) = read(tmp_path, {"messages": plain})
    template = TEMPLATES[name]
    assert said(chat, template) == "right</s>" and rendered(chat, talking(template)) == rendered(
        whole, talking(template)
    )
    assert [turn.masked for turn in chat.turns] == [False, True, True, False]
    assert "wrong" in said(whole, template)


def test_masks_are_counted_and_a_conversation_of_them_alone_is_passed_over(tmp_path: Path) -> None:
    def talk(*weights: int) -> Mapping[str, Any]:
        return {"conversations": [{"from": "gpt", "value": "a", "weight": weight} for weight in weights]}

    progress = RecordedProgress()
    with reporting(progress):
        (chat,) = read(tmp_path, talk(0, 0), talk(0, 1))
    assert [turn.masked for turn in chat.turns] == [True, False]
    assert [note for note in progress.notes if "1 of 2 messages" in note]
    with pytest.raises(InputError, match="no text to score"):
        read(tmp_path, talk(0))


def test_conversations_that_differ_in_their_masks_are_two(tmp_path: Path) -> None:
    last = {"role": "assistant", "content": "b"}
    rows = [{"messages": [{"role": "assistant", "content": "a", "weight": weight}, last]} for weight in (1, 0, 1)]
    chats = read(tmp_path, *rows)
    assert len({*chats}) == len({chat.bare for chat in chats}) == 2


@pytest.mark.parametrize(
    "keys",
    [
        {"weight": 0.5},
        {"weight": "0"},
        {"weight": -1},
        {"train": []},
        {"weight": 0, "train": True},
        {"training_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
        {"content": [{"type": "text", "text": "a", "weight": 0}]},
    ],
)
def test_a_mask_that_is_neither_yes_nor_no_is_refused(tmp_path: Path, keys: Mapping[str, Any]) -> None:
    with pytest.raises(InputError, match="line 1, message 1"):
        read(tmp_path, {"messages": [{"role": "assistant", "content": "a", **keys}]})


def test_a_prompt_and_a_completion_may_be_messages(tmp_path: Path) -> None:
    user, first, second = ({"role": role, "content": role} for role in ("user", "assistant", "assistant"))
    rows = [{"prompt": [user, first, user], "completion": [second], "tools": []}]
    (chat,) = read(tmp_path, *rows, form="prompt_completion")
    assert chat == Chat(tuple(Turn(m["role"], m["content"]) for m in (user, first, user, second)), "", 3)
    with pytest.raises(InputError, match="prompts that are texts and prompts that are messages"):
        read(tmp_path, *rows, {"prompt": "a", "completion": "b"}, form="prompt_completion")


def test_a_tables_objects_lose_the_keys_of_other_rows(tmp_path: Path) -> None:
    """Different arguments of calls, as each would be read from lines."""
    datasets.disable_progress_bars()
    rows = [{"messages": calling(arguments, content="")} for arguments in ({"city": "a"}, {"days": 2}, {})]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    lines = read(tmp_path, *rows)
    saved = read_documents(DataFile(path=tmp_path / "saved", format="messages"))
    template = CALLING["JSON"]
    assert [said(chat, template) for chat in saved[:2]] == [said(chat, template) for chat in lines[:2]]


def corpora(
    folder: Path, rows: list[Mapping[str, Any]], template: str, held_out: list[Mapping[str, Any]] | None = None
) -> Any:
    files = {"validation": rows, "held_out": held_out or []}
    data = {
        name: {"path": write_lines(folder / f"{name}.jsonl", [dict(row) for row in entries]), "format": "messages"}
        for name, entries in files.items()
        if entries
    }
    evaluation = EvaluationSection(window=64, windows=3, held_out=3)
    return build_corpora("web", GeneralSection.model_validate(data), evaluation, talking(template))


@pytest.mark.parametrize("divided", [True, False])
def test_conversations_that_differ_in_what_the_template_reads_alone_are_several(tmp_path: Path, divided: bool) -> None:
    """Real calls and garbage have other windows; an id that no template reads is no difference."""
    real = [{"messages": calling({"city": f"{number} Rome"}, content="")} for number in range(40)]
    garbage = [{"messages": calling({"city": "zzz"}, content="", id=number)} for number in range(40)]
    held_out = None if divided else real[20:] + garbage
    search, other = corpora(tmp_path, real if divided else real[:20], CALLING["JSON"], held_out)
    assert search.key != other.key
    with pytest.raises(InputError, match="one document" if divided else "each document stands in"):
        corpora(tmp_path, garbage, CALLING["JSON"], None if divided else garbage[3:])
    changed = [{"messages": calling({"city": f"{number} Roma"}, content="")} for number in range(40)]
    assert corpora(tmp_path, changed, CALLING["JSON"])[0].key != corpora(tmp_path, real, CALLING["JSON"])[0].key


def test_training_learns_calls(tmp_path: Path) -> None:
    windows = [
        pack(read(tmp_path, {"messages": calling({"city": city}, content=None)}), talking(CALLING["JSON"]), 64).windows
        for city in ("Rome", "zzzz")
    ]
    assert windows[0].digest != windows[1].digest


BAD: list[tuple[list[Any], str]] = [
    ([{"role": "assistant", "content": None}], 'message 1 must be an object with "role" and "content"'),
    ([{"role": "assistant", "content": None, "tool_calls": []}], "message 1 must be an object"),
    ([{"role": "user", "content": None, "tool_calls": [{}]}], "message 1 must be an object"),
    ([{"role": "assistant", "tool_calls": {"name": "a"}}], 'message 1 must have "tool_calls" that are a list'),
    ([{"role": "assistant", "tool_calls": ["a"]}], 'message 1 must have "tool_calls" that are a list'),
    ([{"role": "assistant", "content": {"text": "a"}}], "message 1 must be an object"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
     "line 1, message 2, part 1 is no text"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": 5}]}],
     "message 1, part 2 is no text"),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}, 5]}], "message 1, part 2 is no text"),
    ([{"from": "function_call", "value": "no JSON"}], "message 1 must have a JSON object"),
    ([{"from": "human", "content": "a"}], "message 1 must be an object"),
    ([{"role": "assistant", "content": "a", "name": "\ud800"}], "line 1 holds half of a surrogate pair"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "mend"), BAD)
def test_bad_messages_are_told_with_their_place(tmp_path: Path, messages: list[Any], mend: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    assert mend in refusal(DataFile.model_validate({"path": path, **CHATS}))


@pytest.mark.parametrize("tools", ["a", {"name": "a"}, ["a"], 5])
def test_bad_tools_are_told(tmp_path: Path, tools: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "a"}], "tools": tools}])
    assert "line 1: tools must be a list of objects" in refusal(DataFile.model_validate({"path": path, **CHATS}))


def test_a_prompt_of_messages_needs_a_completion_of_messages(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}])
    assert "strings, or lists of messages" in refusal(DataFile.model_validate({"path": path, **PAIRS}))
