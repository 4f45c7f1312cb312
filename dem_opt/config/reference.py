"""Reference of the study file: every key with its type, its default and its description, read from the sections."""

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dem_opt.config import StudyConfig
from dem_opt.config.sections import DataFile, ModelSource, Name, Section, StudyPath, section_of

SHARED_FORMS: dict[type[Section], str] = {DataFile: "DATA", ModelSource: "MODEL"}
"""Forms that several keys take, listed once at the end under these words."""

_SCALARS: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "any value"}
_BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}


@dataclass(frozen=True, kw_only=True)
class KeyReference:
    """A key of the study file.

    Attributes:
        key: Dotted from the root of the file; capitals stand for names of the user's choice, or for a shared form.
        type: Values that it takes, in words.
        default: As one would write it in the file; "required" where there is none, "" where it is off or empty.
        description: In plain English, with units.
    """

    key: str
    type: str
    default: str
    description: str


def study_file_reference() -> Iterator[KeyReference]:
    """Every key of the study file in its order, then those of the shared forms `DATA.*` and `MODEL.*`."""
    yield from _keys(StudyConfig, "")
    for form, word in SHARED_FORMS.items():
        yield from _keys(form, f"{word}.")


def _keys(section: type[Section], prefix: str) -> Iterator[KeyReference]:
    """The keys of a section, those of the sections within it in their place."""
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None or inner in SHARED_FORMS:
            yield KeyReference(
                key=f"{prefix}{name}",
                type=_type(field.annotation, field.metadata),
                default=_default(field),
                description=" ".join((field.description or "").split()),
            )
        else:
            by_name = get_origin(field.annotation) is dict
            yield from _keys(inner, f"{prefix}{name}.NAME." if by_name else f"{prefix}{name}.")


def _type(annotation: Any, metadata: list[Any]) -> str:
    """The values of an annotation in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _annotated(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(member, []) for member in arguments if member is not type(None))
    if origin is dict:
        return f"mapping of names to {_plural(_type(arguments[1], []))}" if arguments[1] is not Any else "mapping"
    if origin is list:
        return f"list of {_plural(_type(arguments[0], []))}"
    if origin is tuple:
        return f"[{', '.join(_type(member, []) for member in arguments)}]"
    if annotation in SHARED_FORMS:
        return SHARED_FORMS[annotation]
    if annotation not in _SCALARS:
        return "path"
    return _SCALARS[annotation] + _bounds(metadata)


def _annotated(annotation: Any) -> str:
    """The values of an Annotated, whose field constraints narrow them."""
    if annotation in (Name, StudyPath):
        return "name" if annotation is Name else "path"
    inner, *metadata = get_args(annotation)
    constraints = [entry for item in metadata for entry in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return _type(inner, constraints)


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
    return " ".join([f"{first}s" if first in ("integer", "number", "name", "mapping") else first, *rest])


def _default(field: FieldInfo) -> str:
    """The default as one would write it."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "default_note" in extra:
        return str(extra["default_note"])
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined or value is None or value in ({}, []):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
