"""Overlap of a study's corpora with its training data and between its splits (`dem-opt check --overlap`)."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dem_opt.atomic import write_text
from dem_opt.config import DataFile, StudyConfig
from dem_opt.data.documents import Document, plain_text, stream_documents
from dem_opt.data.overlap import NGRAM, Index, Matches, Overlap, OverlapRow, batch_of, batches
from dem_opt.data.tokenize import encode_plain, load_tokenizer, without_pad_beyond
from dem_opt.data.windows import corpora_with_documents
from dem_opt.errors import located, shorten
from dem_opt.json_files import find_json
from dem_opt.planning.inputs import check_headers
from dem_opt.progress import Phase, current_progress
from dem_opt.storage.identity import StudyIdentity
from dem_opt.types import SEARCH

FILE = "overlap.json"
"""Name of the file in the study's output."""

_PIECE = 2**20
"""Characters of a training text that are encoded at once: the tokens of a book of gigabytes fit into no memory."""

_EXAMPLE = 80
"""Characters of an example."""


@dataclass(frozen=True)
class _Group:
    """One split of a corpus, and the places of its documents in the index."""

    name: str
    split: str
    key: str
    places: slice


def measure_overlap(config: StudyConfig, where: Path) -> Overlap:
    """Look all documents of all splits up in each training file and in each other, and keep the result.

    The training data are read once and streamed; see `data.overlap.Index` for the memory that the corpora take.
    Documents are compared as tokens of the base's tokenizer, of pairs both parts, of conversations their contents.

    Raises:
        InputError: A run would refuse the study's checkpoints or data.
    """
    headers = check_headers(config, where)
    vocabulary = headers.architecture.parameters[headers.architecture.embedding][0]
    tokenizer = without_pad_beyond(load_tokenizer(headers.headers["base"].folder), vocabulary)
    with located(where):
        groups, index = _indexed(config, tokenizer, headers.architecture.paired)
    rows: list[OverlapRow] = []
    training: dict[str, int] = {}
    for name, distribution in config.distributions.items():
        if distribution.train is not None:
            matches = index.look_up(batches(_training_documents(name, distribution.train, tokenizer)))
            training[name] = matches.tokens
            rows += _rows(index, matches, (name, "train"), groups, tokenizer)
    for number, source in enumerate(groups):
        matches = index.look_up(batches(index.documents[source.places]))
        rows += _rows(index, matches, (source.name, source.split), groups[number + 1 :], tokenizer)
    overlap = Overlap(
        measured=date.today().isoformat(),
        rows=tuple(rows),
        training=training,
        without_training=tuple(
            name for name, distribution in config.distributions.items() if distribution.train is None
        ),
        corpora=_keys(groups),
    )
    file = config.output / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(asdict(overlap)) + "\n")
    return overlap


def stored_overlap(config: StudyConfig, identity: StudyIdentity) -> Overlap | None:
    """The overlap measured of this study's corpora; None where none was, or of other data."""
    overlap = find_json(config.output / FILE, Overlap)
    corpora = {split: dict(by_name) for split, by_name in identity.corpora.items()}
    return overlap if overlap is not None and overlap.corpora == corpora else None


def overlap_warnings(overlap: Overlap, config: StudyConfig) -> list[str]:
    """Warn of each large overlap, and of training data that are not known; name the fields and what to do."""
    lines = [_warning(row, config) for row in overlap.rows if row.is_large]
    if overlap.without_training:
        fields = ", ".join(f"distributions.{name}.train" for name in overlap.without_training)
        lines.append(f"{fields}: not given, so that overlap with these fine-tunes' training data is not known")
    return lines


def _warning(row: OverlapRow, config: StudyConfig) -> str:
    field, source = _field(row.corpus, row.split, config), _field(row.source, row.part, config)
    mend = "give each corpus its own documents"
    if row.part == "train":
        mend = "take them out of the training data, or give other documents"
    elif row.corpus == row.source:
        mend = "give held-out documents of another origin"
    return (
        f"{field}: {row.share:.1%} of its {NGRAM}-grams stand in {source} too, and {row.near_duplicates:,} of its "
        f"{row.documents:,} documents nearly whole, such as {row.example!r}; unless that is a template, {mend}"
    )


def _field(name: str, part: str, config: StudyConfig) -> str:
    """The study file's field of a part of a corpus."""
    section = "distributions" if name in config.distributions else "general"
    if part == "train":
        return f"{section}.{name}.train"
    has_file = part == SEARCH or config.corpora[name].held_out is None
    return f"{section}.{name}.{'validation' if has_file else 'held_out'}"


def _indexed(config: StudyConfig, tokenizer: PreTrainedTokenizerBase, paired: bool) -> tuple[list[_Group], Index]:
    """Each split of each corpus, search splits first, and the index of all their documents that have tokens."""
    built = [
        part
        for name, data in config.corpora.items()
        for part in corpora_with_documents(name, data, config.evaluation, tokenizer, paired)
    ]
    groups: list[_Group] = []
    indexed: list[NDArray[np.int64]] = []
    for corpus, documents in sorted(built, key=lambda part: part[0].split != SEARCH):
        first = len(indexed)
        indexed += [np.array(ids) for ids in encode_plain(map(plain_text, documents), tokenizer) if ids]
        groups.append(_Group(corpus.distribution, corpus.split, corpus.key, slice(first, len(indexed))))
    return groups, Index(batch_of(indexed))


def _keys(groups: Sequence[_Group]) -> dict[str, dict[str, str]]:
    keys: dict[str, dict[str, str]] = {}
    for group in groups:
        keys.setdefault(group.split, {})[group.name] = group.key
    return keys


def _training_documents(name: str, data: DataFile, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The tokens of training data, of a long text piece by piece, with progress in documents."""
    with current_progress().phase(f"reading the training data of {name}", None, "documents") as phase:
        documents = stream_documents(data, f"distributions.{name}.train")
        yield from encode_plain(_pieces(_counted(documents, phase)), tokenizer)


def _counted(documents: Iterable[Document], phase: Phase) -> Iterator[Document]:
    for document in documents:
        phase.advance()
        yield document


def _pieces(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        text = plain_text(document)
        yield from (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def _rows(
    index: Index,
    matches: Matches,
    source: tuple[str, str],
    groups: Sequence[_Group],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[OverlapRow]:
    """The part of each group's documents that a source, of a name and a part, has."""
    shares_E, sizes_E = index.shares(matches), index.sizes()
    for group in groups:
        shares, sizes = shares_E[group.places], sizes_E[group.places]
        tokens = index.longest_match(matches, group.places.start + int(shares.argmax()))
        yield OverlapRow(
            source=source[0],
            part=source[1],
            corpus=group.name,
            split=group.split,
            documents=len(shares),
            sharing=int((shares > 0).sum()),
            share=float((shares * sizes).sum() / sizes.sum()),
            near_duplicates=int(matches.near_E[group.places].sum()),
            example=_printable(str(tokenizer.decode(tokens.tolist()))) if len(tokens) else "",
        )


def _printable(text: str) -> str:
    """A text in one short line, without characters that steer a terminal."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text)
    return shorten(" ".join(kept.split()), _EXAMPLE)
