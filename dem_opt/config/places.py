"""Places in a study file: the key that a finding of pydantic is about, the value there, and what it should be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from dem_opt.config.forms import requirement, unwrap
from dem_opt.config.section import Section

_KEY = "[key]"
"""pydantic's last part of a location that is about a mapping's key."""


@dataclass(frozen=True)
class Place:
    """A place in a study file.

    Attributes:
        parts: Keys and positions in lists that lead there from the root of the file.
        annotation: The type of the value there; None where no key has this name.
        metadata: Constraints of the value.
        known_keys: Keys of the innermost section.
        is_key: The place is a key of a section, not an entry of a list or mapping.
        is_name: The finding is about a name that the user chose, not about the value under it.
    """

    parts: tuple[int | str, ...]
    annotation: Any
    metadata: list[Any]
    known_keys: tuple[str, ...]
    is_key: bool
    is_name: bool = False

    @property
    def field(self) -> str:
        """The place as messages name it, dotted from the root of the file."""
        return ".".join(map(str, self.parts))

    @property
    def requirement(self) -> str:
        """The form that a value has here, as the end of a sentence."""
        return requirement(self.annotation, self.metadata)

    @property
    def choices(self) -> list[str]:
        """The words that the value may be, where it is one of a few."""
        inner, _ = unwrap(self.annotation, [])
        members = [inner] if get_origin(inner) is Literal else get_args(inner)
        return [word for member in members if get_origin(member) is Literal for word in get_args(member)]

    def value(self, data: object, otherwise: object) -> object:
        """The value at the place as the file has it; `otherwise` where a shorter form was written."""
        for part in self.parts:
            entries = dict(enumerate(data)) if isinstance(data, list) else data
            if not isinstance(entries, Mapping) or part not in entries:
                return otherwise
            data = entries[part]
        return data


def find_place(root: type[Section], location: Sequence[int | str]) -> Place:
    """The place of a pydantic location.

    It ends before the first part that is no key or position of the file: pydantic appends the member of a union that it
    tried, such as "literal['auto']", and what it found inside of that.
    """
    parts: list[int | str] = []
    annotation: Any = root
    metadata: list[Any] = []
    known = tuple(root.model_fields)
    is_key, is_name = True, False
    for number, part in enumerate(location):
        inner, _ = unwrap(annotation, [])
        origin, arguments = get_origin(inner), get_args(inner)
        if isinstance(inner, type) and issubclass(inner, Section):
            known, is_key = tuple(inner.model_fields), True
            field = inner.model_fields.get(str(part))
            parts.append(part)
            if field is None:
                return Place(tuple(parts), None, [], known, is_key)
            annotation, metadata = field.annotation, field.metadata
            continue
        if origin is dict:
            is_name = location[number + 1 : number + 2] == (_KEY,)
            annotation = arguments[0] if is_name else arguments[1]
        elif origin is list:
            annotation = arguments[0]
        elif origin is tuple and isinstance(part, int) and part < len(arguments):
            annotation = arguments[part]
        else:
            break
        metadata, is_key = [], False
        parts.append(part)
    return Place(tuple(parts), annotation, metadata, known, is_key, is_name)
