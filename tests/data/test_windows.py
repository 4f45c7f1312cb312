import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_documents import WRITERS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dem_opt.config import DataFile, DistributionSection, EvaluationSection, GeneralSection
from dem_opt.data.chat_template import encode_chats
from dem_opt.data.documents import Document, Pair
from dem_opt.data.messages import Chat, Turn
from dem_opt.data.packing import pack
from dem_opt.data.tokenize import encode_pairs
from dem_opt.data.windows import build_corpora, refuse_ids_beyond
from dem_opt.errors import InputError
from dem_opt.evaluation.nll import prepare, score
from dem_opt.types import HELD_OUT, SEARCH, Corpus, Windows

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
EXOTIC = "\u2028\x85\x00 \U0001f469\u200d\U0001f52c \u202etes\u0301t\ufeff \U0010ffff\r\n\t"


def make_tokenizer(merges: int = 0, bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE; without merges each ASCII character is one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=258 + merges,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(["the more the merrier, the others and the rest"] * 4, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        model_max_length=8,
    )


TOKENIZERS = {
    "eos": make_tokenizer(),
    "merges": make_tokenizer(merges=20),
    "bos and eos": make_tokenizer(bos=True),
    "neither": make_tokenizer(eos=False),
}


def encode(tokenizer: PreTrainedTokenizerFast, document: str) -> list[int]:
    ids: list[int] = tokenizer.backend_tokenizer.encode(document).ids
    return ids + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def letters(windows: Windows) -> set[str]:
    """The letters in windows: each document of the corpora below is one letter, repeated."""
    return set(TOKENIZERS["eos"].decode(windows.ids_WT.flatten().tolist(), skip_special_tokens=True))


@pytest.mark.parametrize("window", [2, 3, 7, 64, 1000])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pack_lays_documents_end_to_end(kind: str, window: int) -> None:
    tokenizer = TOKENIZERS[kind]
    documents = ["the first, longer than a window of seven", "two", EXOTIC, "the others"] * 5
    stream = [(token, place > 0) for text in documents for place, token in enumerate(encode(tokenizer, text))]
    stream += [(0, False)] * (-len(stream) % window)
    ids, positions = [], []
    for first in range(0, len(stream), window):
        position, restarting = -1, []
        for _, goes_on in stream[first : first + window]:
            position = position + 1 if goes_on else 0
            restarting.append(position)
        if any(restarting):
            ids.append([token for token, _ in stream[first : first + window]])
            positions.append(restarting)
    windows = pack(documents, tokenizer, window).windows
    assert windows.ids_WT.tolist() == ids
    assert windows.positions_WT.tolist() == positions
    assert (windows.scored_WT == (windows.positions_WT > 0)).all()


def test_pack_by_hand() -> None:
    # "abc" "d" "efghi", each with EOS (id 1), in windows of 4: [abc$] [d$ef] [ghi$]; the third document is
    # cut after "ef" and goes on from position 0.
    windows = pack(["abc", "d", "efghi"], TOKENIZERS["eos"], 4).windows
    a, b, c, d, e, f, g, h, i = TOKENIZERS["eos"].convert_tokens_to_ids(list("abcdefghi"))
    assert windows.ids_WT.tolist() == [[a, b, c, 1], [d, 1, e, f], [g, h, i, 1]]
    assert windows.positions_WT.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert windows.tokens_W == (3, 2, 3)


def test_text_of_several_batches_keeps_its_order() -> None:
    documents = [letter * 50_000 for letter in "abcde"]
    stream = [token for text in documents for token in encode(TOKENIZERS["eos"], text)]
    assert pack(documents, TOKENIZERS["eos"], 1000).windows.ids_WT.flatten()[: len(stream)].tolist() == stream


def test_the_last_window_is_padded_with_unscored_tokens() -> None:
    windows = pack(["abcd"], TOKENIZERS["eos"], 3).windows
    assert windows.ids_WT[1].tolist()[2:] == [0]
    assert windows.positions_WT.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert windows.tokens_W == (2, 1)


def test_windows_that_score_nothing_are_left_out() -> None:
    assert len(pack(["a", "b", "c"], TOKENIZERS["neither"], 2).windows) == 0
    assert pack(["a", "b", "cd"], TOKENIZERS["neither"], 2).windows.tokens_W == (1,)


def test_a_document_that_ends_with_eos_gets_no_second() -> None:
    plain, marked = (pack([text], TOKENIZERS["eos"], 4).windows for text in ("abc", "abc</s>"))
    assert plain.digest == marked.digest


def test_the_digest_changes_with_any_token() -> None:
    windows = pack(["abcdefgh"], TOKENIZERS["eos"], 3).windows
    for place in np.ndindex(windows.ids_WT.shape):
        ids_WT = windows.ids_WT.copy()
        ids_WT[place] += 1
        assert Windows(ids_WT, windows.positions_WT, windows.scored_WT).digest != windows.digest


PAIR, CHAT = {"format": "prompt_completion"}, {"format": "messages"}
FORMS: dict[str, dict[str, str]] = {"text": {}, "pairs": PAIR, "chats": CHAT}

TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}</{{ turn.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def talking() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def letter_entries(form: str, letters: str = LETTERS) -> list[dict[str, Any]]:
    """Lines of a format: in each document of pairs or chats, a completion of one letter, 5 to 44 times."""
    words = {letter: letter * (5 + 7 * index % 40) for index, letter in enumerate(letters)}
    if form == "text":
        return [{"text": word} for word in words.values()]
    if form == "pairs":
        return [{"prompt": f"{number}?", "completion": word} for number, word in enumerate(words.values())]
    turns = [[("user", f"{number}?"), ("assistant", word)] for number, word in enumerate(words.values())]
    return [{"messages": [{"role": role, "content": content} for role, content in each]} for each in turns]


def build_form(
    path: Path, form: str, entries: list[dict[str, Any]], paired: bool = False, **evaluation: Any
) -> tuple[Corpus, Corpus]:
    """Corpora of one data file of a format, of the kind that the path's name says."""
    WRITERS[path.suffix[1:]](path, entries)
    data = GeneralSection(validation=DataFile.model_validate({"path": path, **FORMS[form]}))
    settings: dict[str, Any] = {"window": 64, "windows": 6, "held_out": 3} | evaluation
    return build_corpora("web", data, EvaluationSection(**settings), talking(), paired)


def scored_letters(corpus: Corpus) -> set[str]:
    text = TOKENIZERS["eos"].decode(corpus.windows.ids_WT[corpus.windows.scored_WT].tolist(), skip_special_tokens=True)
    return set(text.replace("</assistant>", ""))


def fragments(windows: Windows) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids and scores of each document, or part of one, in windows; padding is documents of one token."""
    for ids_T, positions_T, scored_T in zip(windows.ids_WT, windows.positions_WT, windows.scored_WT, strict=True):
        starts = [*np.flatnonzero(positions_T == 0), len(ids_T)]
        for start, end in pairwise(starts):
            yield ids_T[start:end].tolist(), scored_T[start:end].tolist()


def random_documents(form: str, seed: int, count: int = 40) -> list[Document]:
    """Documents of a format with lengths from none to more than a window of 48 tokens."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return "".join(rng.choices("abc d.\n", k=rng.randint(0, most)))

    if form == "text":
        return [words(90) for _ in range(count)]
    if form == "pairs":
        return [Pair(words(60), words(40) + "!") for _ in range(count)]
    turns = [[Turn("user", words(20)), Turn("assistant", words(20) + "!")] * rng.randint(1, 2) for _ in range(count)]
    return [Chat(tuple(each)) for each in turns]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    ("pair", "ids", "scored"),
    [
        # Windows of 6; $ is EOS.  Whole, then the prompt loses its beginning, then the completion its end.
        (Pair("ab", "cd"), "abcd$", "001 11".replace(" ", "")),
        (Pair("abcdef", "gh"), "defgh$", "000111"),
        (Pair("abcdef", "ghij"), "fghij$", "011111"),
        (Pair("abcdef", "ghijklm"), "fghijk", "011111"),
        (Pair("a", "ghijklm"), "aghijk", "011111"),
    ],
)
def test_long_pairs_by_hand(pair: Pair, ids: str, scored: str, paired: bool) -> None:
    tokenizer = TOKENIZERS["eos"]
    windows = pack([pair], tokenizer, 6, paired).windows
    expected = tokenizer.convert_tokens_to_ids(["</s>" if token == "$" else token for token in ids])
    assert windows.ids_WT.tolist() == [expected + [0] * (6 - len(ids))]
    assert windows.scored_WT[0, : len(scored)].tolist() == [mark == "1" for mark in scored]
    assert windows.tokens_W == (scored.count("1"),)


def test_an_unprompted_completion_is_cut_at_its_end_and_its_first_token_is_not_scored() -> None:
    windows = pack([Pair("", "abcdefgh")], TOKENIZERS["eos"], 4).windows
    assert TOKENIZERS["eos"].decode(windows.ids_WT[0]) == "abcd"
    assert windows.scored_WT.tolist() == [[False, True, True, True]]


def test_pairs_that_score_nothing_take_no_room() -> None:
    windows = pack([Pair("ab", "c"), Pair("", "d"), Pair("ef", "g")], TOKENIZERS["neither"], 6).windows
    assert TOKENIZERS["neither"].decode(windows.ids_WT[0]) == "abcefg"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", ["pairs", "chats"])
def test_pairs_and_chats_never_straddle_windows(form: str, seed: int) -> None:
    """Each is one fragment, in order: itself where it fits into a window, else a part of a window's length."""
    tokenizer, documents = talking(), random_documents(form, seed)
    encode = {
        "pairs": lambda: encode_pairs(documents, tokenizer, False),
        "chats": lambda: encode_chats(documents, tokenizer),
    }
    packed = [fragment for fragment in fragments(pack(documents, tokenizer, 48).windows) if any(fragment[1])]
    expected = [tokens for tokens in encode[form]() if tokens.scored_L.any()]
    assert len(packed) == len(expected)
    for (ids, scored), tokens in zip(packed, expected, strict=True):
        if len(tokens) <= 48:
            assert (ids, scored) == (tokens.ids_L.tolist(), tokens.scored_L.tolist())
        else:
            assert len(ids) == 48 and not scored[0]
            text, part = (tokenizer.decode(each) for each in (tokens.ids_L, ids))
            assert part in text


@pytest.mark.parametrize("form", FORMS)
def test_packed_windows_score_what_separate_documents_do(form: str) -> None:
    """Nats of each window: the model's own loss x scored tokens, summed over its documents fed by themselves."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    windows = pack(random_documents(form, seed=7), talking(), 48).windows
    nats = 0.0
    for ids, scored in fragments(windows):
        if any(scored):
            ids_BT = torch.tensor([ids])
            labels_BT = ids_BT.masked_fill(~torch.tensor([scored]), -100)
            with torch.inference_mode():
                nats += model(ids_BT, labels=labels_BT).loss.item() * sum(scored)
    for reading in ("packed", "separate"):
        measured, _ = score(model, prepare(windows, torch.device("cpu")), 96, reading)
        assert sum(measured.nats_W) == pytest.approx(nats, rel=1e-5)
        assert measured.tokens == sum(sum(scored) for _, scored in fragments(windows))


@pytest.mark.parametrize("form", FORMS)
def test_the_kind_of_file_and_the_order_of_lines_change_no_corpus(tmp_path: Path, form: str) -> None:
    entries = letter_entries(form)
    keys = [corpus.key for corpus in build_form(tmp_path / "a.jsonl", form, entries)]
    assert keys == [corpus.key for corpus in build_form(tmp_path / "b.parquet", form, entries[::-1])]
    assert keys == [corpus.key for corpus in build_form(tmp_path / "c.jsonl", form, entries[7:] + entries)]
    assert keys != [corpus.key for corpus in build_form(tmp_path / "d.jsonl", form, entries[::2])]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS)
def test_splits_of_every_format_share_no_document_and_no_window(tmp_path: Path, form: str, seed: int) -> None:
    corpora = build_form(tmp_path / "a.jsonl", form, letter_entries(form), seed=seed)
    search, held_out = map(scored_letters, corpora)
    assert search and held_out and not search & held_out and search | held_out <= set(LETTERS)
    for corpus, count in zip(corpora, (6, 3), strict=True):
        assert len({window.tobytes() for window in corpus.windows.ids_WT}) == len(corpus.windows) == count


@pytest.mark.parametrize("form", FORMS)
def test_the_draw_of_every_format_is_seeded(tmp_path: Path, form: str) -> None:
    drawn = [build_form(tmp_path / "a.jsonl", form, letter_entries(form), seed=seed)[0].key for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("form", FORMS)
def test_too_few_documents_of_every_format_are_told(tmp_path: Path, form: str) -> None:
    with pytest.raises(InputError, match=r"evaluation.windows = 99: the split has text for \d+ windows of 64 tokens"):
        build_form(tmp_path / "a.jsonl", form, letter_entries(form), windows=99)
    with pytest.raises(InputError, match=r"general.web.validation: one document can't be divided"):
        build_form(tmp_path / "a.jsonl", form, letter_entries(form, "a"))


@pytest.mark.parametrize("form", FORMS)
def test_a_chat_template_changes_the_key_of_conversations_alone(tmp_path: Path, form: str) -> None:
    path = WRITERS["jsonl"](tmp_path / "a.jsonl", letter_entries(form))
    data = GeneralSection(validation=DataFile.model_validate({"path": path, **FORMS[form]}))
    keys = []
    for template in (TEMPLATE, "{# the same #}" + TEMPLATE):
        tokenizer = talking()
        tokenizer.chat_template = template
        made = build_corpora("web", data, EvaluationSection(window=64, windows=6, held_out=3), tokenizer)
        keys.append([corpus.key for corpus in made])
    assert (keys[0] == keys[1]) is (form != "chats")


@pytest.mark.parametrize("divided", [True, False])
def test_a_conversation_that_can_not_be_encoded_is_told_with_its_file(tmp_path: Path, divided: bool) -> None:
    path = WRITERS["jsonl"](tmp_path / "a.jsonl", letter_entries("chats"))
    file = DataFile(path=path, format="messages")
    other = DataFile(path=write(tmp_path / "b.jsonl", DOCUMENTS))
    tokenizer = talking()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    data = GeneralSection(validation=file, held_out=None if divided else other)
    with pytest.raises(
        InputError, match=r"a.jsonl: messages = \['user', .*: the chat template refuses a conv.* \(no\)"
    ):
        build_corpora("web", data, EvaluationSection(window=64, windows=6, held_out=3), tokenizer)


@pytest.mark.parametrize("form", FORMS)
def test_an_encoder_decoder_takes_pairs_alone(tmp_path: Path, form: str) -> None:
    entries = letter_entries(form)
    if form == "pairs":
        causal, paired = (build_form(tmp_path / "a.jsonl", form, entries, paired=paired)[0] for paired in (False, True))
        assert causal.key == paired.key, "this tokenizer encodes prompts and completions alike for both"
    else:
        with pytest.raises(InputError, match=r"general.web.validation.format = '\w+': an encoder-decoder needs pairs"):
            build_form(tmp_path / "a.jsonl", form, entries, paired=True)


def build(
    tmp_path: Path,
    documents: list[str],
    others: list[str] | None = None,
    name: str = "code",
    tokenizer: PreTrainedTokenizerFast = TOKENIZERS["eos"],
    **evaluation: Any,
) -> tuple[Corpus, Corpus]:
    """Corpora of a validation file and, where there are others, a held-out file."""
    distribution = DistributionSection(
        checkpoint=tmp_path,
        validation=DataFile(path=write(tmp_path / "val.jsonl", documents)),
        held_out=None if others is None else DataFile(path=write(tmp_path / "held.jsonl", others)),
    )
    settings: dict[str, Any] = {"window": 8, "windows": 12, "held_out": 6} | evaluation
    return build_corpora(name, distribution, EvaluationSection(**settings), tokenizer)


DOCUMENTS = [letter * (5 + 7 * index % 40) for index, letter in enumerate(LETTERS)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("counts", [(12, 6), (1, 30), (30, 1)])
def test_no_document_is_in_both_splits(tmp_path: Path, seed: int, counts: tuple[int, int]) -> None:
    search, held_out = build(tmp_path, DOCUMENTS * 2, seed=seed, windows=counts[0], held_out=counts[1])
    assert (search.split, held_out.split) == (SEARCH, HELD_OUT)
    assert (len(search.windows), len(held_out.windows)) == counts
    assert letters(search.windows) and letters(held_out.windows)
    assert not letters(search.windows) & letters(held_out.windows)
    for corpus in (search, held_out):
        assert corpus.windows.ids_WT.shape[1] == 8
        assert (corpus.windows.ids_WT > 0).all(), "only full windows are drawn"


def test_documents_are_taken_once(tmp_path: Path) -> None:
    once, thrice = build(tmp_path, DOCUMENTS), build(tmp_path, DOCUMENTS * 3)
    assert [corpus.key for corpus in once] == [corpus.key for corpus in thrice]


def test_a_held_out_file_loses_what_search_sees(tmp_path: Path) -> None:
    search, held_out = build(tmp_path, DOCUMENTS[:26], DOCUMENTS[13:])
    assert letters(search.windows) <= set(LETTERS[:26])
    assert letters(held_out.windows) <= set(LETTERS[26:])


def test_keys_do_not_depend_on_names_or_orders(tmp_path: Path) -> None:
    keys = [corpus.key for corpus in build(tmp_path, DOCUMENTS)]
    assert keys == [corpus.key for corpus in build(tmp_path, DOCUMENTS[::-1], name="other")]
    assert keys[0] != keys[1]


def test_permuting_the_distributions_changes_no_window(tmp_path: Path) -> None:
    data = {"code": DOCUMENTS, "math": [document[:7] + "." for document in DOCUMENTS], "web": DOCUMENTS[::2]}

    def digests(names: list[str]) -> dict[tuple[str, str], str]:
        corpora = [corpus for name in names for corpus in build(tmp_path, data[name], name=name)]
        return {(corpus.distribution, corpus.split): corpus.windows.digest for corpus in corpora}

    assert digests(["code", "math", "web"]) == digests(["web", "code", "math"])


def test_the_order_is_seeded(tmp_path: Path) -> None:
    # Documents of 7 letters and EOS fill a window of 8 each, and all 52 are drawn.
    evenly: dict[str, Any] = {"windows": 26, "held_out": 26}
    documents = [letter * 7 for letter in LETTERS]
    first, again, other = (build(tmp_path, documents, seed=seed, **evenly) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.key == b.key
        assert letters(a.windows) != letters(c.windows)


def test_the_draw_is_seeded(tmp_path: Path) -> None:
    # One document is cut into a window of each letter, so only the draw can order them.
    document = "".join(letter * 8 for letter in LETTERS)
    drawn = []
    for seed in (1, 1, 2):
        search, _ = build(tmp_path, [document], ["." * 80], seed=seed)
        drawn.append(search.windows.ids_WT[:, 0].tolist())
        assert len(set(drawn[-1])) == 12
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_key_is_of_windows_and_tokenizer(tmp_path: Path) -> None:
    # Without spaces or merging pairs in the text, both tokenizers give the same ids.
    plain, merging = (build(tmp_path, DOCUMENTS, tokenizer=TOKENIZERS[kind]) for kind in ("eos", "merges"))
    for a, b in zip(plain, merging, strict=True):
        assert a.windows.digest == b.windows.digest and a.key != b.key


@pytest.mark.parametrize(
    ("sizes", "field", "file"),
    [
        ({"windows": 500}, "evaluation.windows = 500", "val.jsonl"),
        ({"held_out": 500}, "evaluation.held_out = 500", "held.jsonl"),
    ],
)
def test_too_little_text_is_told(tmp_path: Path, sizes: dict[str, int], field: str, file: str) -> None:
    # 26 documents of 6 tokens (5 letters, EOS) are 156 tokens: 19 windows of 8.
    five = [letter * 5 for letter in LETTERS]
    with pytest.raises(InputError, match="text for 19 windows of 8 tokens; ask for fewer") as caught:
        build(tmp_path, five[:26], five[26:], **sizes)
    assert str(caught.value).startswith(f"{tmp_path / file}: {field}: ")


@pytest.mark.parametrize(
    ("documents", "held_out", "mend"),
    [
        (["a" * 900] * 3, None, "one document can't be divided"),
        (DOCUMENTS, DOCUMENTS[:9], "each document stands in"),
    ],
)
def test_splits_that_cannot_be_made_are_told(
    tmp_path: Path, documents: list[str], held_out: list[str] | None, mend: str
) -> None:
    with pytest.raises(InputError, match=mend):
        build(tmp_path, documents, held_out)


def test_a_token_beyond_the_models_rows_is_refused(tmp_path):
    windows = Windows(np.array([[1, 7, 3]]), np.array([[0, 1, 2]]), np.ones((1, 3), dtype=bool))
    refuse_ids_beyond(windows, 8, tmp_path, "math, search")
    with pytest.raises(InputError, match=r"math, search .* token 7, but its embedding has 7 rows"):
        refuse_ids_beyond(windows, 7, tmp_path, "math, search")
