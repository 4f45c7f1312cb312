"""Laws of scoring conversations over chat templates that write as published ones of open models do.

The templates are written anew.  Beside each stands, in plain Python, what the assistant says in it: the runs of scored
text of each document that a conversation becomes.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from itertools import groupby
from typing import Any

import pytest
import worlds
from test_windows import make_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from dem_opt.config import CHAT_DATE
from dem_opt.data.chat_template import encode_chats, rendered, writes_date
from dem_opt.data.messages import Chat, Turn
from dem_opt.errors import InputError

Message = Mapping[str, Any]
Said = Callable[[Sequence[Message]], list[list[str]]]


def thought(message: Message) -> tuple[str, str]:
    """The thought and the answer of a message."""
    before, mark, after = message["content"].rpartition("</think>")
    return (before.removeprefix("<think>").strip("\n") if mark else ""), after.lstrip("\n")


def together(said: Callable[[str], str]) -> Said:
    """All turns in one document, each as `said` writes its content."""
    return lambda messages: [[said(m["content"]) for m in messages if m["role"] == "assistant"]]


def apart(said: Callable[[Message], str]) -> Said:
    """Each turn in a document of its own."""
    return lambda messages: [[said(m)] for m in messages if m["role"] == "assistant"]


@dataclass(frozen=True)
class Template:
    """A chat template.

    Attributes:
        source: Its text.
        said: The scored runs of each document, by the conversation.
        special: Its special tokens.
        system: Whether it takes a system message.
        spaced: Whether it writes a space before the content, which a token of the turn may begin with.
    """

    source: str
    said: Said
    special: Sequence[str] = field(default_factory=tuple)
    system: bool = True
    spaced: bool = False


def qwen3_said(messages: Sequence[Message]) -> list[list[str]]:
    turns = [thought(m) for m in messages if m["role"] == "assistant"]
    return [[f"<think>\n{why}\n</think>\n\n{answer}<|im_end|>\n"] for why, answer in turns]


TEMPLATES: dict[str, Template] = {
    "ChatML": Template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        together("{}<|im_end|>\n".format),
        ("<|im_start|>", "<|im_end|>"),
    ),
    "Zephyr": Template(
        "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\n' + m.content + '</s>' }}\n"
        "{% elif m.role == 'system' %}\n{{ '<|system|>\n' + m.content + '</s>' }}\n"
        "{% elif m.role == 'assistant' %}\n{{ '<|assistant|>\n' + m.content + '</s>' }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        together("{}</s>\n".format),
        ("</s>",),
    ),
    "Llama 2": Template(
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set lead = messages[0].content %}"
        "{% else %}{% set rest = messages %}{% set lead = false %}{% endif %}{% for m in rest %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and lead != false %}{% set text = '<<SYS>>\n' + lead + '\n<</SYS>>\n\n' + m.content %}"
        "{% else %}{% set text = m.content %}{% endif %}"
        "{% if m.role == 'user' %}{{ '<s>' + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + text.strip() + ' ' + '</s>' }}{% endif %}{% endfor %}",
        together(lambda content: f" {content.strip()} </s>"),
        ("<s>", "</s>"),
    ),
    "Llama 3.1": Template(
        "{{- '<|begin_of_text|>' }}{%- if not date_string is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}"
        "{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set lead = messages[0]['content']|trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set lead = '' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + lead + "
        "'<|eot_id|>' }}"
        "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{- m.content | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        together(lambda content: f"{content.strip()}<|eot_id|>"),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "Mistral, the instructions before the last question": Template(
        "{%- if messages[0].role == 'system' %}{%- set lead = messages[0].content %}{%- set rest = messages[1:] %}"
        "{%- else %}{%- set rest = messages %}{%- endif %}"
        "{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}{{- '<s>' }}{%- for m in rest %}"
        "{%- if m.role == 'user' %}{%- if lead is defined and m == asked[-1] %}"
        "{{- '[INST] ' + lead + '\n\n' + m.content + '[/INST]' }}{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}"
        "{%- endif %}{%- elif m.role == 'assistant' %}{{- ' ' + m.content|trim + '</s>' }}{%- endif %}{%- endfor %}",
        lambda messages: (
            apart(lambda m: f" {m['content'].strip()}</s>")
            if messages[0]["role"] == "system"
            else together(lambda content: f" {content.strip()}</s>")
        )(messages),
        ("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    "Mistral, the instructions while the question is last": Template(
        "{%- if messages[0].role == 'system' %}{%- set lead = messages[0].content %}{%- set rest = messages[1:] %}"
        "{%- else %}{%- set rest = messages %}{%- endif %}{{- '<s>' }}{%- for m in rest %}"
        "{%- if m.role == 'user' %}{%- if loop.last and lead is defined %}"
        "{{- '[INST] ' + lead + '\n\n' + m.content + '[/INST]' }}{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}"
        "{%- endif %}{%- elif m.role == 'assistant' %}{{- ' ' + m.content|trim + '</s>' }}{%- endif %}{%- endfor %}",
        lambda messages: (
            apart(lambda m: f"{m['content'].strip()}</s>")
            if messages[0]["role"] == "system"
            else together(lambda content: f" {content.strip()}</s>")
        )(messages),
        ("<s>", "</s>", "[INST]", "[/INST]"),
        spaced=True,
    ),
    "Gemma": Template(
        "{{ '<bos>' }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        together(lambda content: f"{content.strip()}<end_of_turn>\n"),
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        system=False,
    ),
    "Qwen 3": Template(
        "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
        "{%- if m.role == 'assistant' %}{%- set content = m.content %}{%- set why = '' %}"
        "{%- if '</think>' in content %}"
        "{%- set why = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last and (loop.last or why) %}"
        "{{- '<|im_start|>assistant\n<think>\n' + why.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
        "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
        qwen3_said,
        ("<|im_start|>", "<|im_end|>"),
    ),
    "DeepSeek R1": Template(
        "{%- set ns = namespace(lead='') %}{%- for m in messages %}{%- if m.role == 'system' %}"
        "{%- set ns.lead = m.content %}{%- endif %}{%- endfor %}{{- '<|begin|>' + ns.lead }}{%- for m in messages %}"
        "{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}{%- endif %}"
        "{%- if m.role == 'assistant' %}{%- set content = m.content %}{%- if '</think>' in content %}"
        "{%- set content = content.split('</think>')[-1] %}{%- endif %}"
        "{{- '<|Assistant|>' + content + '<|end|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}",
        apart(lambda m: m["content"].split("</think>")[-1] + "<|end|>"),
        ("<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"),
    ),
    "Phi 3": Template(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        apart(lambda m: m["content"] + "<|end|>\n<|endoftext|>"),
        ("<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "Granite": Template(
        "{%- if messages[0].role != 'system' %}"
        "{{- '<|start_of_role|>system<|end_of_role|>Today is ' + strftime_now('%B %d, %Y') + "
        "'.<|end_of_text|>\n' }}{%- endif %}"
        "{%- for m in messages %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + "
        "'<|end_of_text|>\n' }}"
        "{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}"
        "{%- endif %}{%- endfor %}",
        together("{}<|end_of_text|>\n".format),
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    ),
    "Command R": Template(
        "{{ '<BOS_TOKEN>' }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|>' + "
        "{'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] + "
        "m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        together(lambda content: f"{content.strip()}<|END_OF_TURN_TOKEN|>"),
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    "gpt-oss": Template(
        "{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
        "{%- for m in messages %}"
        "{%- if m.role in ('developer', 'system') %}"
        "{{- '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}"
        "{%- elif m.role == 'assistant' %}{%- if loop.last %}"
        "{%- if m.thinking %}{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
        "{%- endif %}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
        "{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif %}"
        "{%- else %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}",
        apart(lambda m: f"<|channel|>final<|message|>{m['content']}<|return|>"),
        ("<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>"),
    ),
    "earlier thoughts left out, with marks": Template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ (m.content if loop.last else m.content.split('</think>')[-1]) + '<|im_end|>' }}"
        "{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        lambda messages: [
            [
                (m["content"] if m is messages[-1] else m["content"].split("</think>")[-1]) + "<|im_end|>"
                for m in messages
                if m["role"] == "assistant"
            ]
        ],
        ("<|im_start|>", "<|im_end|>"),
    ),
}

CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one turn": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "because of the list"}],
    "three turns": [
        {"role": "user", "content": "count <b>"},
        {"role": "assistant", "content": "<b>print value</b>"},
        {"role": "user", "content": "oh"},
        {"role": "assistant", "content": "while alpha\n\nbeta"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "count"},
    ],
    "instructions": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "because"},
        {"role": "user", "content": "oh"},
        {"role": "assistant", "content": "print value"},
    ],
    "thoughts": [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "<think>\nin the list\n</think>\n\nbecause"},
        {"role": "user", "content": "oh"},
        {"role": "assistant", "content": "<think>\nvalue of\n</think>\n\nprint value"},
    ],
}

CASES = [
    (name, conversation)
    for name, template in TEMPLATES.items()
    for conversation in CONVERSATIONS
    if template.system or conversation != "instructions"
]


def speaking(template: Template, kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, or of words and the template's special tokens."""
    tokenizer = make_tokenizer() if kind == "characters" else worlds.tokenizer()
    if kind == "special tokens":
        tokenizer.add_special_tokens({"additional_special_tokens": list(template.special)})
    tokenizer.chat_template = template.source
    return tokenizer


def chat_of(messages: Sequence[Message], scored_from: int = 0) -> Chat:
    return Chat(tuple(Turn(m["role"], m["content"]) for m in messages), "", scored_from)


@pytest.mark.parametrize("kind", ["characters", "special tokens"])
@pytest.mark.parametrize(("name", "conversation"), CASES)
def test_what_is_scored_is_what_the_assistant_says(name: str, conversation: str, kind: str) -> None:
    """Runs of scored tokens are the content and the end of each turn, in the rendering that transformers makes."""
    template, messages = TEMPLATES[name], CONVERSATIONS[conversation]
    tokenizer = speaking(template, kind)
    documents = list(encode_chats([chat_of(messages)], tokenizer))
    runs, texts = [], []
    for tokens in documents:
        marked = zip(tokens.ids_L.tolist(), tokens.scored_L.tolist(), strict=True)
        groups = [(scored, [token for token, _ in group]) for scored, group in groupby(marked, lambda pair: pair[1])]
        runs.append([tokenizer.decode(ids) for scored, ids in groups if scored])
        texts.append(tokenizer.decode(tokens.ids_L.tolist()))
    said = template.said(messages)
    if template.spaced:
        runs, said = ([[run.lstrip(" ") for run in document] for document in side] for side in (runs, said))
    assert runs == said
    places = [place for place, m in enumerate(messages) if m["role"] == "assistant"]
    shown = [messages[: place + 1] for place in places] if len(documents) == len(places) else [messages]
    source = re.sub(r"strftime_now\('(.*?)'\)", lambda m: f"'{CHAT_DATE.strftime(m[1])}'", template.source)
    whole = [tokenizer.apply_chat_template(list(m), chat_template=source, tokenize=False) for m in shown]
    assert texts == whole


@pytest.mark.parametrize("name", [name for name, template in TEMPLATES.items() if not template.system])
def test_a_role_that_a_template_refuses_is_told(name: str) -> None:
    with pytest.raises(InputError, match="System role not supported") as caught:
        list(encode_chats([chat_of(CONVERSATIONS["instructions"])], speaking(TEMPLATES[name], "characters")))
    assert caught.value.field == "messages"


@pytest.mark.parametrize(("name", "conversation"), CASES)
def test_of_a_prompt_and_a_completion_of_messages_the_completion_is_scored(name: str, conversation: str) -> None:
    """The last turn is scored as it is where all are."""
    messages, tokenizer = CONVERSATIONS[conversation], speaking(TEMPLATES[name], "characters")
    *_, whole = encode_chats([chat_of(messages)], tokenizer)
    (tokens,) = encode_chats([chat_of(messages, scored_from=len(messages) - 1)], tokenizer)
    if name != "earlier thoughts left out, with marks":  # whose line feed lies behind the marks
        assert tokens.ids_L.tolist() == whole.ids_L.tolist()
    *_, last = TEMPLATES[name].said(messages)
    assert tokenizer.decode(tokens.ids_L[tokens.scored_L].tolist()).strip() == last[-1].strip()


@pytest.mark.parametrize("content", ["count value", " count", "\n\ncount  ", "a \n", " "])
@pytest.mark.parametrize("end", ["<eos>", "<eos>\n", " ", ""])
@pytest.mark.parametrize("trims", [False, True], ids=["offsets", "trimmed offsets"])
def test_marks_lose_no_white_space(content: str, end: str, trims: bool) -> None:
    """Also with tokenizers that assign no token to it, as those of GPT-2 and Llama 3."""
    tokenizer = worlds.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
        f"{{% generation %}}{{{{ m.content + {end!r} }}}}{{% endgeneration %}}"
        "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
    )
    messages = [*CONVERSATIONS["one turn"][:1], {"role": "assistant", "content": content}] * 2
    (tokens,) = encode_chats([chat_of(messages)], tokenizer)
    marked = zip(tokens.ids_L.tolist(), tokens.scored_L.tolist(), strict=True)
    runs = [tokenizer.decode([token for token, _ in run]) for scored, run in groupby(marked, lambda p: p[1]) if scored]
    assert runs == [content + end] * 2
    if not trims:
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert tokens.scored_L.tolist() == [bool(marked) for marked in made["assistant_masks"]]


def test_reasoning_in_a_key_of_its_own_is_scored_where_its_turn_is_last() -> None:
    messages = [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "because", "reasoning_content": "in the list"},
        {"role": "user", "content": "oh"},
        {"role": "assistant", "content": "print", "reasoning_content": "value of"},
    ]
    turns = tuple(
        Turn(m["role"], m["content"], json.dumps({"reasoning_content": m["reasoning_content"]}) if len(m) > 2 else "")
        for m in messages
    )
    tokenizer = speaking(TEMPLATES["gpt-oss"], "special tokens")
    said = [tokenizer.decode(t.ids_L[t.scored_L].tolist()) for t in encode_chats([Chat(turns)], tokenizer)]
    analysis = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"
    assert said == [analysis.format("in the list", "because"), analysis.format("value of", "print")]


@pytest.mark.parametrize("today", [date(2025, 1, 1), date(2024, 2, 29), date(1999, 12, 31)])
@pytest.mark.parametrize(
    "format", ["%d %b %Y", "%B %d, %Y", "%Y-%m-%d", "%-d/%-m/%y", "%A, %H:%M", "%j %% %U", "no date"]
)
def test_a_templates_date_is_the_studys(format: str, today: date) -> None:
    """As `strftime` writes it, wherever the template asks, in marks and macros too."""
    tokenizer = worlds.tokenizer()
    tokenizer.chat_template = (
        "{%- macro now() -%}{{ strftime_now(format) }}{%- endmacro -%}"
        f"{{%- set format = {format!r} -%}}{{% for m in messages %}}{{{{ strftime_now(format) }}}}"
        "{% if strftime_now is defined %}{{ m.content }}{% endif %}{% endfor %}"
    )
    chat, written = chat_of(CONVERSATIONS["one turn"]), today.strftime(format)
    assert rendered(chat, tokenizer, today) == f"{written}why?{written}because of the list"
    assert writes_date(tokenizer) and tokenizer.chat_template.startswith("{%- macro now() -%}")
    tokenizer.chat_template = None
    assert not writes_date(tokenizer)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 // 0 }}",
        "{{ messages[9].content }}",
        "{{ range(10**9) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'file' %}",
        "{{ raise_exception('no') }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ messages | no_such_filter }}",
        "{{ 'x' + 1 }}",
        "{{ {}['x'].y }}",
    ],
)
def test_a_template_that_fails_is_told_in_one_line(source: str) -> None:
    tokenizer = worlds.tokenizer()
    tokenizer.chat_template = source
    conversation = Chat((Turn("user", "a"), Turn("assistant", "b")))
    with pytest.raises(InputError) as refusal:
        list(encode_chats([conversation], tokenizer))
    assert len(str(refusal.value).splitlines()) == 1
