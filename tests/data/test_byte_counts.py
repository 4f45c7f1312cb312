"""Laws of bytes and documents of windows: every scored character counts once, whatever the tokenizer makes of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_documents import chat
from test_windows import (
    EXOTIC,
    FORMS,
    build_form,
    fragments,
    letter_entries,
    make_tokenizer,
    random_documents,
    talking,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dem_opt.data.byte_counts import scored_bytes
from dem_opt.data.chat_template import encode_chats
from dem_opt.data.documents import Pair
from dem_opt.data.packing import pack
from dem_opt.data.tokenize import Source, Tokens, encode_pairs, encode_texts

WORDS = ["the more the merrier", "she sells sea shells", "café naïve 日本語 the"]


def fast(backend: Tokenizer, unknown: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token=unknown)


def like_gpt2() -> PreTrainedTokenizerFast:
    """A space before the text, and offsets without white space."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(WORDS * 4, trainer)
    return fast(backend)


def like_llama() -> PreTrainedTokenizerFast:
    """A "▁" before the text and for every space; characters out of the vocabulary as bytes."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.ByteFallback()
    backend.train_from_iterator(
        WORDS[:2] * 4, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    return fast(backend, "<unk>")


def like_bert() -> PreTrainedTokenizerFast:
    """Lower case, without accents and control characters, unknown words; special tokens before and after."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], limit_alphabet=20, show_progress=False
    )
    backend.train_from_iterator(WORDS * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return fast(backend, "<unk>")


def like_t5() -> PreTrainedTokenizerFast:
    """Compatible forms of characters, white space stripped and collapsed, unigrams."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(WORDS * 4, trainer)
    return fast(backend, "<unk>")


MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": make_tokenizer,
    "bytes with BOS": lambda: make_tokenizer(merges=20, bos=True),
    "GPT-2": like_gpt2,
    "Llama": like_llama,
    "BERT": like_bert,
    "T5": like_t5,
    "ByT5, which has no offsets": ByT5Tokenizer,
}

TEXTS = [
    "",
    " ",
    "the shells",
    " the  more \n\n",
    "tést 日本語 \U0001f600x",
    "\uff37\uff29\uff24\uff25 e\u0301 \ufb01",
    EXOTIC,
    "<s>the</s> </s>",
]


def every_token_scored(tokens: Tokens) -> Tokens:
    return replace(tokens, scored_L=np.ones(len(tokens), dtype=bool))


def counted(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Bytes of every token of a text, the first one's too."""
    (tokens,) = encode_texts([text], tokenizer)
    return scored_bytes(every_token_scored(tokens), tokenizer).tolist()


@pytest.mark.filterwarnings("ignore:This sequence already has </s>")
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", MAKERS)
def test_bytes_of_a_texts_tokens_sum_to_those_of_the_text(kind: str, text: str) -> None:
    tokenizer = MAKERS[kind]()
    spelled = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    plain = text
    for content in spelled:
        plain = plain.replace(content, "")
    bytes_L = counted(tokenizer, text)
    has_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 0
    assert min(bytes_L, default=0) >= 0
    # White space about a special token may be part of its place, so it may count for none.
    slack = len(text.encode()) if "</s>" in text else 0
    assert 0 <= len(plain.encode()) * has_tokens - sum(bytes_L) <= slack * text.count(" ")


def test_bytes_by_hand() -> None:
    # One token a byte: a character counts at the token that completes it; EOS has no bytes.
    assert counted(make_tokenizer(), "aé日b") == [1, 0, 2, 0, 0, 3, 1, 0]
    assert counted(ByT5Tokenizer(), "aé日b")[:1] + counted(ByT5Tokenizer(), "aé日b")[-2:] == [1, 1, 0]
    # BOS, EOS, and the same written out, have none.
    assert counted(make_tokenizer(bos=True), "ab</s>") == [0, 1, 1, 0]
    # The space before the text has no bytes, each other one has.
    llama = like_llama()
    pieces = llama.convert_ids_to_tokens(llama(" qé")["input_ids"])
    assert list(zip(pieces, counted(llama, " qé"), strict=False)) == [
        *([("▁▁", 1)] if "▁▁" in pieces else [("▁", 0), ("▁", 1)]),
        *([("q", 1)] if "q" in pieces else [("<0x71>", 1)]),
        *([("é", 2)] if "é" in pieces else [("<0xC3>", 0), ("<0xA9>", 2)]),
    ]
    # An unknown word counts in full, with the space before it; so does an accent that is taken out.
    assert counted(like_bert(), "日 ☃☃")[1:-1] in ([3, 7], [3, 4, 3])
    assert sum(counted(like_bert(), "thé")) == 4


def test_a_window_counts_what_it_scores() -> None:
    # Windows of 4 tokens: [a é-1 é-2 b] [日-1 日-2 日-3 EOS]; the first token of each is not scored.
    tokenizer = make_tokenizer()
    windows = pack(["aéb日"], tokenizer, 4).with_bytes(tokenizer)
    assert windows.bytes_WT is not None and windows.bytes_WT.tolist() == [[0, 0, 2, 1], [0, 0, 3, 0]]
    assert windows.layout is not None and windows.layout.bytes_W == (3, 3)


@pytest.mark.filterwarnings("ignore:This sequence already has </s>")
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("prompt", ["", "日本 ", "why?</s>"])
@pytest.mark.parametrize("kind", MAKERS)
def test_of_a_pair_the_completion_counts(kind: str, prompt: str, paired: bool) -> None:
    tokenizer = MAKERS[kind]()
    if paired and not prompt:
        return  # refused
    (tokens,) = encode_pairs([Pair(prompt, "tést the")], tokenizer, paired)
    bytes_L = scored_bytes(tokens, tokenizer)
    assert not bytes_L[~tokens.scored_L].any()
    # Behind no other token the completion's first is not scored.
    unscored = 0 if tokens.source.start else scored_bytes(every_token_scored(tokens), tokenizer)[0]
    # A tokenizer that puts a space before every text may join the prompt's last with the completion.
    spanned = len(" ") if (kind, prompt) == ("T5", "日本 ") and not paired else 0
    assert bytes_L.sum() + unscored == len("tést the".encode()) + spanned


@pytest.mark.parametrize("form", FORMS)
def test_windows_of_every_format_count_the_text_that_they_score(tmp_path: Path, form: str) -> None:
    """With one token a byte, the bytes of a window are its scored tokens without EOS."""
    for corpus in build_form(tmp_path / "a.jsonl", form, letter_entries(form)):
        windows, layout = corpus.windows, corpus.windows.layout
        assert layout is not None
        text_WT = windows.scored_WT & (windows.ids_WT != talking().eos_token_id)
        assert layout.bytes_W == tuple(text_WT.sum(axis=1))
        assert [sum(documents.values()) for documents in layout.documents_W] == list(windows.tokens_W)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_know_their_document(form: str) -> None:
    documents = random_documents(form, seed=3)
    tokenizer = talking()
    windows = pack(documents, tokenizer, 48).windows
    assert windows.documents_WT is not None
    where = zip(windows.documents_WT, windows.positions_WT, strict=True)
    numbers = [int(number) for numbers_T, positions_T in where for number in numbers_T[positions_T == 0]]
    assert [number for number in numbers if number >= 0] == sorted(number for number in numbers if number >= 0)
    for number, (ids, scored) in zip(numbers, fragments(windows), strict=True):
        if number < 0:
            assert ids == [0] and scored == [False]
            continue
        document = documents[number]
        part = tokenizer.decode(ids, skip_special_tokens=True)
        if isinstance(document, str):
            assert part in document
        elif isinstance(document, Pair):
            assert part in document.prompt + document.completion
        else:
            assert document.turns[-1].content is not None and document.turns[-1].content[:3] in part


def test_a_conversation_that_is_encoded_turn_by_turn_is_one_document() -> None:
    # Earlier turns of the assistant are written in another way than the last, so each is scored in a text of its own.
    template = (
        "{% for turn in messages %}<{{ turn.role }}>"
        "{% if turn.role == 'user' or loop.last %}{{ turn.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    talk = chat("user: a", "assistant: é", "user: c", "assistant: dd")
    encoded = list(encode_chats([talk, talk], tokenizer))
    assert [tokens.document for tokens in encoded] == [0, 0, 1, 1]
    assert [int(scored_bytes(tokens, tokenizer).sum()) for tokens in encoded] == [2, 2] * 2


def test_a_cut_document_keeps_its_bytes() -> None:
    tokenizer = make_tokenizer()
    (tokens,) = encode_pairs([Pair("ab", "cdé")], tokenizer, paired=False)
    whole = scored_bytes(tokens, tokenizer)
    for start in range(4):
        part = tokens.cut(start, 3)
        assert (
            part.source == Source(text="cdé", start=2 - start, options={"add_special_tokens": False})
            and part.ids_L.tolist() == tokens.ids_L[start : start + 3].tolist()
        )
        assert scored_bytes(part, tokenizer).tolist() == whole[start : start + 3].tolist()
