"""The values that a key of the study file takes, in words: for its reference, and for messages about other values."""

import re
import types
from datetime import date
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from dem_opt.config.section import PATTERNS, Name, Section, StudyPath
from dem_opt.config.sources import BaseSource, DataFile, ModelSource

SHARED_FORMS: dict[type[Section], str] = {DataFile: "DATA", ModelSource: "MODEL", BaseSource: "BASE"}
"""Forms that several keys take, listed once at the end of the reference under these words."""

_SCALARS: dict[Any, str] = {
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    date: "date",
    Any: "any value",
}
_BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}
_SIGNS = {">": "greater than", "≥": "of at least", "<": "below", "≤": "of at most"}
_NOUNS = re.compile(r"(?:^|(?<= or ))(integer|number|mapping|list|name|path|date)\b")


def type_words(annotation: Any, metadata: list[Any]) -> str:
    """The values of an annotation in a few words and signs, as in "`auto` or integer > 0"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _annotated(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(member, []) for member in arguments if member is not type(None))
    if origin is dict:
        return f"mapping of names to {_plural(type_words(arguments[1], []))}" if arguments[1] is not Any else "mapping"
    if origin is list:
        return f"list of {_plural(type_words(arguments[0], []))}"
    if origin is tuple:
        return f"[{', '.join(type_words(member, []) for member in arguments)}]"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return SHARED_FORMS.get(annotation, "mapping")
    if annotation not in _SCALARS:
        return "path"
    return _SCALARS[annotation] + _bounds(metadata)


def requirement(annotation: Any, metadata: list[Any]) -> str:
    """The values of an annotation as the end of a sentence, as in "must be `auto` or an integer greater than 0"."""
    annotation, metadata = unwrap(annotation, metadata)
    if pattern := next((item.pattern for item in metadata if getattr(item, "pattern", None)), None):
        return f"must be {PATTERNS[pattern]}"
    if isinstance(annotation, type) and issubclass(annotation, Section) and annotation not in SHARED_FORMS:
        return f"must be a mapping with keys of its own: {', '.join(annotation.model_fields)}"
    words = type_words(annotation, metadata)
    for form, long in (("DATA", "a data file's path or mapping"), ("MODEL", "a folder's path, or a mapping")):
        words = words.replace(form, long)
    for sign, long in _SIGNS.items():
        words = words.replace(f" {sign} ", f" {long} ")
    words = _NOUNS.sub(lambda match: f"{'an' if match[1] == 'integer' else 'a'} {match[1]}", words)
    is_filled = any(isinstance(item, MinLen) for item in metadata)
    return f"must be {words}" + (", and not empty" if is_filled else "")


def unwrap(annotation: Any, metadata: list[Any]) -> tuple[Any, list[Any]]:
    """An annotation without `Annotated` and `| None` around it, and what these say of it."""
    members = [member for member in get_args(annotation) if member is not type(None)]
    if get_origin(annotation) in (Union, types.UnionType) and len(members) == 1:
        return unwrap(members[0], metadata)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return unwrap(inner, [*metadata, *_flat(more)])
    return annotation, metadata


def _annotated(annotation: Any) -> str:
    """The values of an Annotated, whose field constraints narrow them."""
    if annotation in (Name, StudyPath):
        return "name" if annotation is Name else "path"
    inner, *metadata = get_args(annotation)
    return type_words(inner, _flat(metadata))


def _flat(metadata: list[Any]) -> list[Any]:
    """Constraints, those of a `Field` one by one."""
    return [entry for item in metadata for entry in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _bounds(metadata: list[Any]) -> str:
    """Lower and upper bounds, as in " ≥ 0 and ≤ 5"."""
    bounds = [
        f"{sign} {getattr(item, attribute)}"
        for item in metadata
        for bound, (attribute, sign) in _BOUNDS.items()
        if isinstance(item, bound)
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _plural(words: str) -> str:
    first, *rest = words.split(" ")
    return " ".join([f"{first}s" if first in ("integer", "number", "name", "mapping", "path") else first, *rest])
