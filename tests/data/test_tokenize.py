"""Laws of encoding: which tokens a document is, and that only completions and the assistant's words are scored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import worlds
from test_documents import EXOTIC, chat
from test_windows import TOKENIZERS, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dem_opt.data.chat_template import encode_chats, rendered
from dem_opt.data.documents import Pair
from dem_opt.data.messages import Chat
from dem_opt.data.tokenize import Tokens, encode_pairs, load_tokenizer, tokenizer_digest
from dem_opt.errors import InputError

PLAIN = (
    "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}"
    "{% if turn.role == 'assistant' %}<eos>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template without marks: an assistant's turn adds its words, EOS and a line feed to the generation prompt."""

MARKED = (
    "{% for turn in messages %}<|{{ turn.role }}|>"
    "{% if turn.role == 'assistant' %}{% generation %}{{ turn.content }}<eos>\n{% endgeneration %}"
    "{% else %}{{ turn.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The same with marks around what is scored."""

REFUSING = "{{ raise_exception('roles must alternate') }}"

CHATS = [
    chat("system: be brief", "user: why?", "assistant: because of the list", "user: oh", "assistant: print value"),
    chat("user: a", "tool: 5", "assistant: b"),
    chat(
        "user: tes\u0301t \u05e9\u05dc\u05d5\u05dd",
        "assistant: tes\u0301t \u05e9\u05dc\u05d5\u05dd \x00",
        "user: no answer",
    ),
]

PAIRS = [Pair("why?", "because"), Pair("", "unprompted"), Pair(EXOTIC, EXOTIC), Pair("a", " b"), Pair("a</s>", "b</s>")]


def talking(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = worlds.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def scored(tokens: Tokens) -> list[int]:
    return tokens.ids_L[tokens.scored_L].tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_causal_pair_is_the_prompt_and_the_completion_which_is_scored(kind: str, pair: Pair) -> None:
    tokenizer = TOKENIZERS[kind]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    source = tokenizer.backend_tokenizer.encode(pair.prompt).ids
    source = source[:-1] if end and source[-1:] == end else source
    target = tokenizer.backend_tokenizer.encode(pair.completion, add_special_tokens=False).ids
    target = target if target[-1:] == end else target + end
    (tokens,) = encode_pairs([pair], tokenizer, paired=False)
    assert tokens.ids_L.tolist() == source + target
    assert tokens.scored_L.tolist() == [False] * len(source) + [bool(source)] + [True] * (len(target) - 1)


def spaced(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text, in the ways in which published ones do."""
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    if kind == "byte-level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return tokenizer
    alphabet = ["\u2581", *"abcdefghijklmnopqrstuvwxyz:?0", "\u2581b", "\u2581be", "be", "\u2581a", "\u2581w"]
    merges = [("\u2581", "b"), ("\u2581b", "e"), ("b", "e"), ("\u2581", "a"), ("\u2581", "w")]
    vocabulary = {token: place for place, token in enumerate(["<s>", "</s>", "<unk>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    if kind == "prepended":  # Llama 2
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        backend.normalizer = normalizers.Sequence(steps)
    else:  # Mistral and newer files of Llama 2: "first", T5's kind: "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["prepended", "first", "always", "byte-level"])
@pytest.mark.parametrize("pair", [Pair("why?", "because"), Pair("why? ", "because"), Pair("a", " b"), Pair("", "be a")])
def test_a_completion_gets_no_space_of_its_own(kind: str, pair: Pair) -> None:
    """The ids are those of prompt and completion as one text, as training libraries encode them."""
    tokenizer = spaced(kind)
    (tokens,) = encode_pairs([pair], tokenizer, paired=False)
    whole = tokenizer(pair.prompt + pair.completion)["input_ids"]
    assert tokens.ids_L.tolist() == [*whole, tokenizer.eos_token_id]
    first = len(tokens) - len(scored(tokens))
    assert tokens.scored_L.tolist() == [place >= first for place in range(len(tokens))]
    prompt = tokenizer(pair.prompt)["input_ids"]
    assert whole[:first] == prompt[:first] or first == 1
    if not pair.prompt.endswith(" "):
        assert first == max(len(prompt), 1)
        text = tokenizer.decode(whole[first:]).strip() if pair.prompt else pair.completion
        assert text == pair.completion.strip()


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.prompt])
@pytest.mark.parametrize("ends", [True, False])
def test_an_encoder_decoders_target_is_scored_whole(ends: bool, pair: Pair) -> None:
    tokenizer = make_tokenizer()
    if ends:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    source = tokenizer.backend_tokenizer.encode(pair.prompt).ids
    target = tokenizer.backend_tokenizer.encode(pair.completion).ids
    target = target if target[-1] == 1 else [*target, 1]
    (tokens,) = encode_pairs([pair], tokenizer, paired=True)
    assert tokens.ids_L.tolist() == source + target
    assert tokens.scored_L.tolist() == [False] * len(source) + [True] * len(target)


def test_an_encoder_decoders_prompt_needs_a_token() -> None:
    with pytest.raises(InputError, match="prompt = '': has no tokens"):
        list(encode_pairs([Pair("", "a")], TOKENIZERS["eos"], paired=True))


def test_pairs_of_several_batches_keep_their_order() -> None:
    pairs = [Pair(letter * 40_000, letter.upper() * 10) for letter in "abcde"]
    together = [tokens.ids_L.tolist() for tokens in encode_pairs(pairs, TOKENIZERS["eos"], paired=False)]
    alone = [next(encode_pairs([pair], TOKENIZERS["eos"], paired=False)).ids_L.tolist() for pair in pairs]
    assert together == alone


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("conversation", CHATS)
def test_a_chat_is_the_rendered_template_and_the_assistants_words_are_scored(template: str, conversation: Chat) -> None:
    tokenizer = talking(template)
    (tokens,) = encode_chats([conversation], tokenizer)
    text = "".join(
        f"<|{turn.role}|>{turn.content}" + ("<eos>\n" if turn.role == "assistant" else "\n")
        for turn in conversation.turns
    )
    assert rendered(conversation, tokenizer) == text
    assert tokens.ids_L.tolist() == tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    said = [f"{turn.content}<eos>\n" for turn in conversation.turns if turn.role == "assistant"]
    assert tokenizer.decode(scored(tokens)) == "".join(said)


def test_marks_are_exact_where_a_turn_ends_in_unscored_text() -> None:
    tokenizer = talking(MARKED.replace("\n{% endgeneration %}", "{% endgeneration %}\n"))
    (tokens,) = encode_chats(CHATS[:1], tokenizer)
    assert tokenizer.decode(scored(tokens)) == "because of the list<eos>print value<eos>"


def test_a_marked_conversation_may_begin_with_the_assistant() -> None:
    conversation = chat("assistant: hello", "user: a")
    (tokens,) = encode_chats([conversation], talking(MARKED))
    assert worlds.tokenizer().decode(scored(tokens)) == "hello<eos>\n"
    with pytest.raises(InputError, match="begins with the assistant"):
        list(encode_chats([conversation], talking(PLAIN)))


@pytest.mark.parametrize(
    ("template", "mend"),
    [
        (None, "the tokenizer has no chat template"),
        ("{{ messages|length }}", "does not write the assistant's words"),
        (REFUSING, r"refuses a conversation \(roles must alternate\)"),
        ("{{ messages[0].content.nothing.more }}", "refuses a conversation"),
        ("{% if %}", "refuses a conversation"),
    ],
)
def test_a_template_that_can_not_serve_is_told(template: str | None, mend: str) -> None:
    with pytest.raises(InputError, match=mend) as caught:
        list(encode_chats(CHATS[:1], talking(template)))
    assert caught.value.field in ("chat_template", "messages") and "\n" not in str(caught.value)


def test_tokenizer_digests_tell_tokenizers_apart_and_survive_use_and_disk(tmp_path: Path) -> None:
    digests = {kind: tokenizer_digest(tokenizer) for kind, tokenizer in TOKENIZERS.items()}
    assert digests["eos"] != digests["merges"] != digests["bos and eos"]
    tokenizer = make_tokenizer()
    tokenizer("abcdef", truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == digests["eos"]
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(load_tokenizer(tmp_path)) == digests["eos"]


def test_a_chat_template_counts_for_conversations_alone(tmp_path: Path) -> None:
    templates = [talking(template) for template in (None, PLAIN, MARKED)]
    assert len({tokenizer_digest(tokenizer) for tokenizer in templates}) == 1
    assert len({tokenizer_digest(tokenizer, chat=True) for tokenizer in templates}) == 3
    templates[1].save_pretrained(tmp_path)
    assert tokenizer_digest(load_tokenizer(tmp_path), chat=True) == tokenizer_digest(templates[1], chat=True)


def without(key: str) -> Callable[[Any], Any]:
    return lambda content: {name: value for name, value in content.items() if name != key}


CORRUPTIONS: dict[str, Callable[[Any], Any]] = {
    "empty": lambda content: {},
    "list": lambda content: [],
    "null": lambda content: None,
    "text": lambda content: "tokenizer",
    "no model": without("model"),
    "no added tokens": without("added_tokens"),
    "model is a number": lambda content: content | {"model": 1},
    "unknown model": lambda content: content | {"model": {"type": "Nothing"}},
    "no vocabulary": lambda content: content | {"model": {"type": "BPE"}},
    "vocabulary of texts": lambda content: content | {"model": content["model"] | {"vocab": {"a": "b"}}},
    "merges beyond the vocabulary": lambda content: content | {"model": content["model"] | {"merges": [["xyz", "q"]]}},
    "added tokens are numbers": lambda content: content | {"added_tokens": [1]},
    "unknown decoder": lambda content: content | {"decoder": {"type": "Nothing"}},
    "unknown pre-tokenizer": lambda content: content | {"pre_tokenizer": {"type": "Split"}},
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupt_tokenizer_is_told(tmp_path: Path, corruption: str) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(CORRUPTIONS[corruption](json.loads(path.read_text()))))
    with pytest.raises(InputError, match="its tokenizer can't be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model": 1}', "\ud800"])
def test_an_unreadable_tokenizer_is_told(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(InputError, match="tokenizer can't be read"):
        load_tokenizer(tmp_path)


def test_other_errors_of_loading_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise RuntimeError("our own mistake")

    monkeypatch.setattr("dem_opt.data.tokenize.AutoTokenizer.from_pretrained", failing)
    with pytest.raises(RuntimeError, match="our own"):
        load_tokenizer(tmp_path)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        load_tokenizer(tmp_path / "nowhere")


def sentencepiece_folder(folder):
    """A folder whose tokenizer is a SentencePiece model alone; and that model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = folder / "texts.txt"
    folder.mkdir()
    texts.write_text("\n".join(worlds.documents(0)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(folder / "tokenizer"), vocab_size=120, model_type="bpe", minloglevel=2
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return folder, sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path):
    folder, model = sentencepiece_folder(tmp_path / "old")
    tokenizer = load_tokenizer(folder)
    assert tokenizer("alpha beta count")["input_ids"] == model.encode("alpha beta count")
    assert tokenizer_digest(tokenizer) == tokenizer_digest(load_tokenizer(folder))


def test_a_sentencepiece_model_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    folder, _ = sentencepiece_folder(tmp_path / "old")
    (folder / "tokenizer.model").write_bytes(b"damaged")
    monkeypatch.setattr("dem_opt.data.tokenize.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'dem-opt\[sentencepiece\]'"):
        load_tokenizer(folder)


def test_a_damaged_sentencepiece_model_is_refused(tmp_path):
    folder, _ = sentencepiece_folder(tmp_path / "old")
    (folder / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(InputError, match="tokenizer can't be read"):
        load_tokenizer(folder)
