"""The inner products of a study's distribution vectors as its output folder keeps them; loads no torch."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import FiniteFloat

from dem_opt.atomic import write_text
from dem_opt.json_files import find_json
from dem_opt.storage.identity import StudyIdentity
from dem_opt.types import VectorGeometry

FILE = "vectors.json"
"""The file in a study's output folder."""


def keep(vectors: VectorGeometry, base: str, fine_tunes: Mapping[str, str], folder: Path) -> None:
    """Write inner products by content, whole or not at all; a folder that can't be written stays without them."""
    contents = [fine_tunes[name] for name in vectors.names]
    text = json.dumps({"base": base, "contents": contents, "inner": vectors.inner, "rounding": vectors.rounding})
    with suppress(OSError):
        write_text(folder / FILE, text)


def recall_vectors(base: str, fine_tunes: Mapping[str, str], folder: Path) -> VectorGeometry | None:
    """The vectors of these contents, under their present names; None where they were not measured.

    Names and order may have changed since, so rows are found by content.
    """
    stored = find_json(folder / FILE, _Stored)
    if stored is None or {len(stored.contents)} != {len(stored.inner), *map(len, stored.inner)}:
        return None
    row = {content: index for index, content in enumerate(stored.contents)}
    if stored.base != base or not row.keys() >= set(fine_tunes.values()):
        return None
    order = [row[content] for content in fine_tunes.values()]
    rounding = stored.rounding if row.keys() == set(fine_tunes.values()) else None
    return VectorGeometry(tuple(fine_tunes), tuple(tuple(stored.inner[i][j] for j in order) for i in order), rounding)


def study_vectors(identity: StudyIdentity, folder: Path) -> VectorGeometry | None:
    """The vectors of a study; what rounding to the nearest value does only where its composites are rounded so."""
    vectors = recall_vectors(identity.base, identity.fine_tunes, folder)
    return vectors if vectors is None or identity.rounding == "nearest" else replace(vectors, rounding=None)


@dataclass(frozen=True)
class _Stored:
    """The file: hashes of the base's and the fine-tunes' contents, the inner products in their order, the rounding."""

    base: str
    contents: list[str]
    inner: list[list[FiniteFloat]]
    rounding: FiniteFloat | None = None
