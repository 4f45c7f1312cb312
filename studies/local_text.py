"""Real text that a Debian machine with this project's packages has: manual pages, Perl modules, headers, changelogs.

A file gives one document, its beginning.  Files belong to sources (a package, a module with its
submodules, a folder of headers), and a source is whole in one split.  The choice depends on the files alone, which the
record beside the data lists by hash.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

from dem_opt.atomic import write_text
from dem_opt.errors import InputError

SHORTEST = 400
"""Characters of a document at least: shorter files name another file, or nothing."""

WANTED = {"train": 900_000, "val": 60_000, "held_out": 120_000}
FEWER = {"train": 560_000, "val": 60_000, "held_out": 100_000}
GENERAL = {"val": 60_000, "held_out": 120_000}
RECORD = "sources.json"

Sources = dict[str, list[str]]
"""Documents by source."""


@dataclass(frozen=True)
class Kind:
    """A kind of text.

    Attributes:
        licence: Licence of the texts, which stay on this machine.
        mend: How to get it where it is missing.
        wanted: Characters of each split: in the training data more than 200,000 tokens of SmolLM2.
        of_source: Characters that a source gives at most, so that no large package fills a split.
        excerpt: Characters of a document at most: many short documents say more than a few long ones.
    """

    licence: str
    mend: str
    wanted: Mapping[str, int]
    of_source: int = 60_000
    excerpt: int = 8_000


KINDS = {
    "german": Kind("GPL and others, by package", "German manual pages (Debian: manpages-de)", FEWER, 150_000, 16_000),
    "perl": Kind("GPL or Artistic", "Perl's modules (Debian: perl-modules)", WANTED),
    "headers": Kind("BSD-3-Clause and Apache-2.0", "the C++ headers of torch and pyarrow", WANTED),
    "changelogs": Kind("by package", "changelogs below /usr/share/doc (Debian; slim images leave them out)", WANTED),
    "english": Kind("PSF-2.0", "Python's help topics (Debian: libpython3-stdlib)", GENERAL),
}


def make_data(folder: Path, root: Path = Path("/")) -> dict[str, dict[str, object]]:
    """Write `NAME.SPLIT.jsonl` for each kind unless the folder is complete; return the record by file.

    Args:
        folder: Folder of the data files.
        root: Root of the file system that has the Debian packages.

    Raises:
        InputError: A kind of text is missing on this machine, or there is too little of it.
    """
    if (folder / RECORD).is_file():
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    record = {}
    kinds = texts(root)
    splits = {name: divided(name, sources) for name, sources in kinds.items()}
    for name, sources in kinds.items():
        for split, chosen in splits[name].items():
            documents = [document for source in chosen for document in sources[source]]
            lines = "".join(json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
            write_text(folder / f"{name}.{split}.jsonl", lines)
            record[f"{name}.{split}.jsonl"] = {
                "sha256": sha256(lines.encode()).hexdigest(),
                "documents": len(documents),
                "characters": sum(map(len, documents)),
                "licence": KINDS[name].licence,
                "sources": chosen,
            }
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    return record


def texts(root: Path) -> dict[str, Sources]:
    """The documents of each kind by source, each text once."""
    seen: set[str] = set()
    readers = {
        "german": german(root),
        "perl": perl(root),
        "headers": headers(),
        "changelogs": changelogs(root),
        "english": sorted(topics.items()),
    }
    return {name: limited(pairs, KINDS[name], seen) for name, pairs in readers.items()}


def divided(name: str, sources: Sources) -> dict[str, list[str]]:
    """The sources of each split: each goes where most characters are missing, in the order of their names' hashes.

    Raises:
        InputError: The sources have too few characters for one of the splits.
    """
    kind = KINDS[name]
    missing = dict(kind.wanted)
    splits: dict[str, list[str]] = {split: [] for split in missing}
    for source in sorted(sources, key=lambda source: sha256(source.encode()).digest()):
        split = max(missing, key=lambda split: missing[split])
        if missing[split] <= 0:
            break
        splits[split].append(source)
        missing[split] -= sum(map(len, sources[source]))
    if max(missing.values()) > 0:
        amount = sum(len(document) for documents in sources.values() for document in documents)
        wanted = sum(kind.wanted.values())
        mend = f"too little text, {amount:,} of about {wanted:,} characters: this machine needs {kind.mend}"
        raise InputError(None, name, None, mend)
    return splits


def limited(pairs: Iterable[tuple[str, str]], kind: Kind, seen: set[str]) -> Sources:
    """Excerpts by source; texts that were seen, short ones, and what is too much of a source are left out."""
    sources: Sources = {}
    left: dict[str, int] = {}
    for source, text in pairs:
        document = excerpt(text, kind.excerpt)
        remaining = left.setdefault(source, kind.of_source)
        if len(document) >= SHORTEST and document not in seen and remaining >= len(document):
            seen.add(document)
            sources.setdefault(source, []).append(document)
            left[source] = remaining - len(document)
    return sources


def excerpt(text: str, length: int) -> str:
    """The beginning of a text, up to the end of a line."""
    text = text.strip()
    return text if len(text) <= length else text[:length].rpartition("\n")[0]


def german(root: Path) -> Iterator[tuple[str, str]]:
    """German manual pages by the Debian package that installed them, without the comments of their source."""
    packages = {
        line: listing.name.partition(":")[0].removesuffix(".list")
        for listing in sorted((root / "var/lib/dpkg/info").glob("*.list"))
        for line in listing.read_text(encoding="utf-8").splitlines()
        if line.startswith("/usr/share/man/de/")
    }
    for page in sorted((root / "usr/share/man/de").glob("man*/*.gz")):
        if not page.is_symlink():
            lines = unpacked(page).splitlines()
            text = "\n".join(line for line in lines if not line.startswith(('.\\"', "'\\\"")))
            yield packages.get(f"/{page.relative_to(root)}", page.name), text


def perl(root: Path) -> Iterator[tuple[str, str]]:
    """Perl modules by the first part of their names; tables of Unicode are left out."""
    libraries = [*sorted((root / "usr/share/perl").glob("*")), root / "usr/share/perl5"]
    for library in libraries:
        for file in sorted(library.rglob("*.pm")) if not library.is_symlink() else ():
            place = file.relative_to(library)
            if place.parts[0] != "unicore":
                yield place.parts[0].removesuffix(".pm"), file.read_text(encoding="utf-8", errors="replace")


def headers() -> Iterator[tuple[str, str]]:
    """C++ headers of torch and pyarrow by their folder, without the generated ones of each operator."""
    for package in ("torch", "pyarrow"):
        spec = find_spec(package)
        for parent in spec.submodule_search_locations or () if spec else ():
            include = Path(parent, "include")
            for file in sorted(include.rglob("*.h")):
                place = file.relative_to(include)
                if place.parts[:2] != ("ATen", "ops"):
                    text = file.read_text(encoding="utf-8", errors="replace")
                    yield "/".join(place.parts[:-1][:2]), without_licence(text)


def without_licence(text: str) -> str:
    """A header from its first line that is no comment on."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith("#")), 0)
    return "\n".join(lines[start:])


def changelogs(root: Path) -> Iterator[tuple[str, str]]:
    """Debian's changelogs by source package, each once: its binary packages repeat it."""
    seen = set()
    for file in sorted((root / "usr/share/doc").glob("*/changelog.Debian.gz")):
        text = unpacked(file)
        source = text.partition(" ")[0]
        if source not in seen:
            seen.add(source)
            yield source, text


def unpacked(file: Path) -> str:
    """The text of a gzip file; bytes that are no UTF-8 are replaced."""
    return gzip.decompress(file.read_bytes()).decode("utf-8", errors="replace")
