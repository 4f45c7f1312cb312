"""A section of a study file: its base class, and the types that fields of several sections have."""

from collections.abc import Mapping
from datetime import date
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
)

PATTERNS: Mapping[str, str] = {
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$": "a name: letters, digits, `_`, `.` and `-`, at most 64, beginning with a "
    "letter or digit",
    r"^[\w.-]+(/[\w.-]+)?$": "an id of the Hugging Face Hub, `owner/name`",
    r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$": "an importable function, `package.module:name`",
    r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(@([1-9][0-9]*|best))?$": "a name, or a step's, as in `code@20`: "
    "letters, digits, `_`, `.` and `-`, at most 64, beginning with a letter or digit",
}
"""Patterns of texts of a fixed form, and the form in words."""

NAME_PATTERN, HUB_ID_PATTERN, FUNCTION_PATTERN, FINE_TUNE_NAME_PATTERN = PATTERNS

Name = Annotated[str, Field(pattern=NAME_PATTERN)]
FineTuneName = Annotated[str, Field(pattern=FINE_TUNE_NAME_PATTERN)]
Positive = Annotated[int, Field(gt=0)]
PositiveReal = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
StudyPath = Annotated[Path, Field(strict=False)]
Date = Annotated[date, Field(strict=False)]
Column = Annotated[str, Field(min_length=1)]
Range = Annotated[tuple[NotNegative, NotNegative], Field(strict=False)]
Shares = dict[Name, NotNegative]


def default_note(text: str) -> Any:
    """A field's default in words, for defaults that other fields decide."""
    return Field(json_schema_extra={"default_note": text})


class Section(BaseModel):
    """A part of the study file: frozen, strict about types, refusing unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def section_of(annotation: Any) -> type[Section] | None:
    """The first section class inside an annotation (`Section`, `dict[Name, Section]`, `Section | None`), if any."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def resolve_path(value: Path | str | None, info: ValidationInfo) -> Path | None:
    """A path of the study file; relative paths start at the file's folder, those that begin with `~/` at home."""
    if value is None or not isinstance(value, str | Path):
        return value
    folder: Path = (info.context or {}).get("folder", Path())
    return folder / (expanduser(value) if str(value).startswith("~/") else value)
