"""JSON files that are read back, each as a stranger's: checked against a schema, whatever bytes it has.

A file may be missing, a folder, empty, not UTF-8, nested a thousand deep, or hold values of other types and numbers
that no float holds.  What can be measured again is read by `find_json`; `read_json` says what is wrong of all else.
"""

import functools
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from dem_opt.errors import InputError, shorten

Schema = TypeVar("Schema")


def parse_json(content: str | bytes, schema: type[Schema]) -> Schema:
    """Parse JSON of a schema: a dataclass, or a type such as `dict[str, int]`; numbers and texts are not converted.

    Raises:
        ValueError: It is anything else; one clause says where and why.
    """
    try:
        parsed: Schema = _adapter(schema).validate_json(content, strict=True)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        fault = f"{place}: {first['msg']}" if place else str(first["msg"])
        raise ValueError(shorten(" ".join(fault.split()), 200)) from None
    return parsed


def find_json(file: Path, schema: type[Schema]) -> Schema | None:
    """Read a JSON file; None where it is missing, unreadable or of another schema."""
    try:
        return parse_json(regular_bytes(file), schema)
    except (OSError, ValueError):
        return None


def read_json(file: Path, schema: type[Schema], field: str | None, mend: str = "copy or save it again") -> Schema:
    """Read a JSON file that has to be there.

    Args:
        file: The file.
        schema: What it holds.
        field: Field of the study file that named it, for messages.
        mend: What to do about one that is damaged.

    Raises:
        InputError: The file can't be read, or is of another schema.
    """
    try:
        return parse_json(regular_bytes(file), schema)
    except OSError as error:
        raise InputError(file, field, None, f"can't be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(file, field, None, f"not a JSON object as it should be ({error}): {mend}") from None


def regular_bytes(file: Path) -> bytes:
    """The bytes of a regular file; OSError for anything else, such as a pipe, whose opening would wait for ever."""
    if file.exists() and not file.is_file():
        raise OSError(0, "it is no file")
    return file.read_bytes()


@functools.cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)
