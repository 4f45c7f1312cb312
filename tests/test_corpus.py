import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dem_opt.config import DataFile, Distribution, EvaluationSection
from dem_opt.corpus import HELD_OUT, SEARCH, build_corpora, pack
from dem_opt.errors import InputError
from dem_opt.records import Corpus, Windows
from dem_opt.tokens import load_tokenizer, tokenizer_digest

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
    windows = pack(documents, tokenizer, window)
    assert windows.ids_WT.tolist() == ids
    assert windows.positions_WT.tolist() == positions
    assert (windows.scored_WT == (windows.positions_WT > 0)).all()


def test_pack_by_hand() -> None:
    # "abc" "d" "efghi", each with EOS (id 1), in windows of 4: [abc$] [d$ef] [ghi$]; the third document is
    # cut after "ef" and goes on from position 0.
    windows = pack(["abc", "d", "efghi"], TOKENIZERS["eos"], 4)
    a, b, c, d, e, f, g, h, i = TOKENIZERS["eos"].convert_tokens_to_ids(list("abcdefghi"))
    assert windows.ids_WT.tolist() == [[a, b, c, 1], [d, 1, e, f], [g, h, i, 1]]
    assert windows.positions_WT.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert windows.tokens_W == (3, 2, 3)


def test_text_of_several_batches_keeps_its_order() -> None:
    documents = [letter * 50_000 for letter in "abcde"]
    stream = [token for text in documents for token in encode(TOKENIZERS["eos"], text)]
    assert pack(documents, TOKENIZERS["eos"], 1000).ids_WT.flatten()[: len(stream)].tolist() == stream


def test_the_last_window_is_padded_with_unscored_tokens() -> None:
    windows = pack(["abcd"], TOKENIZERS["eos"], 3)
    assert windows.ids_WT[1].tolist()[2:] == [0]
    assert windows.positions_WT.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert windows.tokens_W == (2, 1)


def test_windows_that_score_nothing_are_left_out() -> None:
    assert len(pack(["a", "b", "c"], TOKENIZERS["neither"], 2)) == 0
    assert pack(["a", "b", "cd"], TOKENIZERS["neither"], 2).tokens_W == (1,)


def test_a_document_that_ends_with_eos_gets_no_second() -> None:
    plain, marked = (pack([text], TOKENIZERS["eos"], 4) for text in ("abc", "abc</s>"))
    assert plain.digest == marked.digest


def test_the_digest_changes_with_any_token() -> None:
    windows = pack(["abcdefgh"], TOKENIZERS["eos"], 3)
    for place in np.ndindex(windows.ids_WT.shape):
        ids_WT = windows.ids_WT.copy()
        ids_WT[place] += 1
        assert Windows(ids_WT, windows.positions_WT, windows.scored_WT).digest != windows.digest


def build(
    tmp_path: Path,
    documents: list[str],
    others: list[str] | None = None,
    name: str = "code",
    tokenizer: PreTrainedTokenizerFast = TOKENIZERS["eos"],
    **evaluation: Any,
) -> tuple[Corpus, Corpus]:
    """Corpora of a validation file and, where there are others, a held-out file."""
    distribution = Distribution(
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
    ("asked", "field", "file"),
    [
        ({"windows": 500}, "evaluation.windows = 500", "val.jsonl"),
        ({"held_out": 500}, "evaluation.held_out = 500", "held.jsonl"),
    ],
)
def test_too_little_text_is_told(tmp_path: Path, asked: dict[str, int], field: str, file: str) -> None:
    # 26 documents of 6 tokens (5 letters, EOS) are 156 tokens: 19 windows of 8.
    five = [letter * 5 for letter in LETTERS]
    with pytest.raises(InputError, match="text for 19 windows of 8 tokens; ask for fewer") as caught:
        build(tmp_path, five[:26], five[26:], **asked)
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
