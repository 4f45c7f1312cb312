"""Reference of the study file: every key with its type, its default and its description, read from the sections."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dem_opt.config import StudyConfig
from dem_opt.config.forms import SHARED_FORMS, type_words
from dem_opt.config.section import Section, section_of

__all__ = ["SHARED_FORMS", "KeyReference", "study_file_reference"]


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
                type=type_words(field.annotation, field.metadata),
                default=_default(field),
                description=" ".join((field.description or "").split()),
            )
        else:
            by_name = get_origin(field.annotation) is dict
            yield from _keys(inner, f"{prefix}{name}.NAME." if by_name else f"{prefix}{name}.")


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
