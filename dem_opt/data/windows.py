"""Documents -> fixed, hashed windows of token ids, split into search and held-out."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from dem_opt.config import DataFile, DistributionSection, EvaluationSection, GeneralSection
from dem_opt.data.chat_template import ChatTemplate, rendered
from dem_opt.data.documents import Document, document_identity, read_documents
from dem_opt.data.harness import Role
from dem_opt.data.messages import Chat
from dem_opt.data.packing import pack
from dem_opt.data.tokenize import tokenizer_digest
from dem_opt.errors import InputError, located
from dem_opt.types import HELD_OUT, SEARCH, Corpus, Windows

SURPLUS = 8
"""Windows are drawn from at most this many times their number, so that a large file takes no longer."""


def build_corpora(
    name: str,
    data: DistributionSection | GeneralSection,
    evaluation: EvaluationSection,
    tokenizer: PreTrainedTokenizerBase,
    paired: bool = False,
) -> tuple[Corpus, Corpus]:
    """The search and the held-out corpus of a distribution or a general corpus, which share no document.

    Documents are taken once and ordered by a seeded hash of their text, so neither the name nor the order of
    distributions or lines matters.  With a held_out file each split has its own file, and what stands in the
    validation file too is left out of held-out.  Without one, the validation documents are divided, by
    characters, in the proportion windows : held_out.  Each split's windows are drawn from the windows that
    `pack` makes of its documents (of texts, from those without padding); the order of the draw is their fixed
    order.  A corpus's key hashes windows and tokenizer, and with conversations the chat template.

    `paired`: for an encoder-decoder, whose documents must be pairs.

    Raises InputError for unreadable files, for a single document to be divided, and for too little text.
    """
    (search, _), (held_out, _) = corpora_with_documents(name, data, evaluation, tokenizer, paired)
    return search, held_out


def corpora_with_documents(
    name: str,
    data: DistributionSection | GeneralSection,
    evaluation: EvaluationSection,
    tokenizer: PreTrainedTokenizerBase,
    paired: bool = False,
) -> tuple[tuple[Corpus, list[Document]], tuple[Corpus, list[Document]]]:
    """The corpora of `build_corpora`, each with all documents of its split, of which it may have but a part."""
    section = "general" if isinstance(data, GeneralSection) else "distributions"
    files = {SEARCH: data.validation, HELD_OUT: data.held_out or data.validation}
    for split, file in files.items():
        if paired and file.format != "prompt_completion":
            field = f"{section}.{name}.{split if data.held_out and split == HELD_OUT else 'validation'}.format"
            raise InputError(str(file), field, file.format, "an encoder-decoder needs pairs: format prompt_completion")
    builder = _Builder(evaluation, tokenizer, paired)
    search, held_out = builder.split(f"{section}.{name}", data)
    return (
        (builder.corpus(name, SEARCH, search, "windows", files[SEARCH]), search),
        (builder.corpus(name, HELD_OUT, held_out, "held_out", files[HELD_OUT]), held_out),
    )


@dataclass(frozen=True)
class _Builder:
    """Settings that the corpora of a study share."""

    evaluation: EvaluationSection
    tokenizer: PreTrainedTokenizerBase
    paired: bool

    def split(self, section: str, data: DistributionSection | GeneralSection) -> tuple[list[Document], list[Document]]:
        """Search and held-out documents, distinct, in seeded order."""
        documents = self.ordered(data.validation, f"{section}.validation")
        if data.held_out is None:
            return self.divide(list(documents.values()), str(data.validation), f"{section}.validation")
        held_out = self.ordered(data.held_out, f"{section}.held_out", "held_out")
        unseen = [document for key, document in held_out.items() if key not in documents]
        if not unseen:
            mend = f"each document stands in {data.validation} too; give some that search does not see"
            raise InputError(str(data.held_out), f"{section}.held_out", None, mend)
        return list(documents.values()), unseen

    def ordered(self, file: DataFile, field: str, role: Role = "validation") -> dict[Hashable, Document]:
        """Distinct documents by what tells them apart, in the order of a seeded hash of their text."""
        documents = read_documents(file, field, role)
        if self.paired and any(isinstance(document, Chat) for document in documents):
            raise InputError(str(file), field, None, "an encoder-decoder needs pairs of texts, not of messages")
        with located(str(file)):
            distinct = {self.key(document): document for document in documents}
        return dict(sorted(distinct.items(), key=self.order))

    def key(self, document: Document) -> Hashable:
        """Key that tells a document apart from others.

        Of a conversation, the roles and contents, and what the chat template makes of it where that is something else
        because of further keys, such as tool calls; an id that the template does not read makes no other document.
        """
        if not isinstance(document, Chat) or document.bare == document:
            return document
        template = ChatTemplate(self.tokenizer, self.evaluation.date)
        texts = template.texts(document)
        try:
            reads_more = template.texts(document.bare) != texts
        except InputError:  # the template needs the further keys
            reads_more = True
        return (document.bare, texts) if reads_more else document.bare

    def order(self, item: tuple[Hashable, Document]) -> tuple[bytes, str]:
        """A seeded hash; documents that share it, whose roles and contents are the same, by their key."""
        key, document = item
        return sha256(f"{self.evaluation.seed}\n{document_identity(document)}".encode()).digest(), str(key)

    def divide(self, documents: list[Document], path: str, field: str) -> tuple[list[Document], list[Document]]:
        """Cut so that the first part's share of characters is nearest to that of windows; both hold a document."""
        if len(documents) < 2:
            mend = "one document can't be divided into search and held-out; add documents or a held_out file"
            raise InputError(path, field, None, mend)
        share = self.evaluation.windows / (self.evaluation.windows + self.evaluation.held_out)
        with located(path):
            ends = np.cumsum([len(rendered(document, self.tokenizer, self.evaluation.date)) for document in documents])
        cut = int(np.abs(ends[:-1] - share * ends[-1]).argmin()) + 1
        return documents[:cut], documents[cut:]

    def corpus(
        self,
        name: str,
        split: str,
        documents: Sequence[Document],
        field: Literal["windows", "held_out"],
        file: DataFile,
    ) -> Corpus:
        """As many windows as `field` of the evaluation asks for, drawn from those of the documents."""
        wanted: int = getattr(self.evaluation, field)
        with located(str(file)):
            packing = pack(
                documents,
                self.tokenizer,
                self.evaluation.window,
                self.paired,
                self.evaluation.date,
                most=SURPLUS * wanted,
            )
        available = len(packing.windows)
        if available < wanted:
            mend = (
                f"the split has text for {available} windows of {self.evaluation.window} tokens; "
                "ask for fewer, shorten evaluation.window or add text"
            )
            raise InputError(str(file), f"evaluation.{field}", wanted, mend)
        drawn = np.random.default_rng(self.evaluation.seed).permutation(available)[:wanted]
        windows = packing.take(drawn).with_bytes(self.tokenizer)
        made_by = tokenizer_digest(self.tokenizer, chat=any(isinstance(document, Chat) for document in documents))
        return Corpus(
            distribution=name,
            split=split,
            key=sha256(f"{windows.digest} {made_by}".encode()).hexdigest(),
            windows=windows,
        )


def refuse_ids_beyond(windows: Windows, rows: int, folder: Path, texts: str) -> None:
    """Raise InputError where a text has a token for which the model has no row.

    Args:
        windows: The tokens.
        rows: Rows of the model's embedding.
        folder: The model's folder.
        texts: The data, for the message.
    """
    highest = int(windows.ids_WT.max(initial=-1))
    if highest >= rows:
        mend = (
            f"its tokenizer gives a text of {texts} the added token {highest}, but its embedding has {rows:,} rows: "
            "resize the embedding, or leave out the token"
        )
        raise InputError(folder, None, None, mend)
