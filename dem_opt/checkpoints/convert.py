"""Convert weights to safetensors in the user's cache: pickled, GGUF, FP8 with scales, float64, and 16-bit on demand.

A conversion is made once for the same files.  Everything that reads checkpoints sees the converted folder.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import transformers

from dem_opt.atomic import publish_folder, staged_folder
from dem_opt.checkpoints import gguf_file, pickled, rounding, widening
from dem_opt.checkpoints.files import INDEX, PICKLED, WEIGHTS, file_stamps
from dem_opt.checkpoints.user_cache import cache_folder
from dem_opt.errors import InputError
from dem_opt.json_files import find_json
from dem_opt.permissions import make_private_folder

RECORD = "converted.json"
"""File of a converted folder that says what was converted."""

VERSION = 2
"""Version of the conversions: one whose result changes must not be found under the old one's name."""

_PICKLES = (*PICKLED, "*.bin.index.json")
_WEIGHTS = (*_PICKLES, "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class _Conversion:
    """A form of weights that is converted.

    Attributes:
        form: The form, in words.
        sources: The files to convert.
        copied: The files to copy.
        write: Writes the safetensors files into a folder; returns the file's name by tensor.
        size: Bytes that it writes, at most; 0 where they are not known.
        variant: What else decides the result: the version of the library that reads the form, or the dtype asked for.
    """

    form: str
    sources: Sequence[Path]
    copied: Sequence[Path]
    write: Callable[[Path], dict[str, str]]
    size: int = 0
    variant: str = ""


def converted(place: Path, field: str, allow_pickled: bool = False) -> Path:
    """The folder itself, or where its weights have another form, a copy with safetensors in the cache.

    Args:
        place: A checkpoint's or an adapter's folder, or a GGUF file.
        field: Field of the study file that named it, for messages.
        allow_pickled: Pickled weights may be read, of which only tensors are unpickled.

    Raises:
        InputError: The weights are damaged or can't be converted, or the cache can't be written or is full.
    """
    conversion = _conversion(place, field, allow_pickled)
    return place if conversion is None else _in_cache(conversion, place, field)


def widened(folder: Path, field: str) -> Path:
    """The folder itself, or where it has 16-bit weights, a copy with float32 in the cache.

    Raises:
        InputError: The weights are damaged, or the cache can't be written or is full.
    """
    if not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        return folder
    plan = widening.plan(folder, field)
    if plan is None:
        return folder
    conversion = _Conversion(plan.form, plan.files, _others(folder, _WEIGHTS), plan.write, plan.size, "float32")
    return _in_cache(conversion, folder, field)


def _in_cache(conversion: _Conversion, place: Path, field: str) -> Path:
    """The converted folder, made where the cache lacks it; InputError where it can't be written or is full."""
    key = repr((VERSION, conversion.variant, file_stamps((*conversion.sources, *conversion.copied))))
    out = cache_folder() / "converted" / sha256(key.encode()).hexdigest()[:32]
    try:
        make_private_folder(cache_folder())
        if not out.is_dir():
            with staged_folder(out, wait=True) as partial:
                if not out.is_dir():  # another process may have made it meanwhile
                    _refuse_full(out, partial, field, conversion)
                    _write(conversion, place, partial)
                    publish_folder(partial, out)
    except OSError as error:
        raise InputError(out, field, None, f"{conversion.form} can't be converted there ({error.strerror})") from None
    return out


def conversion_of(folder: Path) -> str | None:
    """Say how the weights of a folder in the cache were converted; None for other folders, and for widened weights."""
    record = _record(folder)
    if record is None:
        return None
    if record["form"] == widening.Widening.form:  # which the study file asked for
        return conversion_of(Path(record["place"]))
    return f"{record['form']} of {record['place']} converted to {folder}"


def source_of(folder: Path) -> Path:
    """The folder or file that a folder in the cache was made of; other folders are their own."""
    record = _record(folder)
    return folder if record is None else source_of(Path(record["place"]))


def _record(folder: Path) -> dict[str, str] | None:
    """The record of a folder in the cache."""
    record = find_json(folder / RECORD, dict[str, str]) or {}
    return record if {"form", "place"} <= record.keys() else None


def _conversion(place: Path, field: str, allow_pickled: bool) -> _Conversion | None:
    """The conversion that a folder or file needs, if any."""
    if files := gguf_file.files_of(place, field):
        config = gguf_file.read(files, field)
        variant = f"transformers {transformers.__version__}"
        return _Conversion("quantized weights (GGUF)", files, (), config, variant=variant)
    if not place.is_dir():
        return None
    if pickles := pickled.files_of(place) if allow_pickled else []:
        others = _others(place, _PICKLES)
        return _Conversion("pickled weights", pickles, others, lambda out: pickled.write_tensors(pickles, out, field))
    if not (place / WEIGHTS).is_file() and not (place / INDEX).is_file():
        return None
    rounded = rounding.plan(place, field)
    if rounded is None:
        return None
    return _Conversion(rounded.form, rounded.files, _others(place, _WEIGHTS), rounded.write, rounded.size)


def _write(conversion: _Conversion, place: Path, out: Path) -> None:
    """Write the weights, their index, a record, and copies of the folder's other files."""
    for file in conversion.copied:
        shutil.copyfile(file, out / file.name)
    weight_map = conversion.write(out)
    if weight_map:
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    record = {"form": conversion.form, "place": str(place)}
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _others(folder: Path, weights: Sequence[str]) -> list[Path]:
    """The files of a folder but for these weights."""
    return [file for file in sorted(folder.iterdir()) if file.is_file() and not any(map(file.match, weights))]


def _refuse_full(out: Path, partial: Path, field: str, conversion: _Conversion) -> None:
    """Raise InputError where the cache's disk has no room for the converted weights."""
    free = shutil.disk_usage(partial).free
    if free < conversion.size:
        mend = f"{conversion.form} need {conversion.size / 1e9:.1f} GB when converted, {free / 1e9:.1f} GB are free"
        raise InputError(out, field, None, f"{mend}: set XDG_CACHE_HOME to a folder on another disk")
