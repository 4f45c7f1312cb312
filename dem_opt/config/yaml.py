"""YAML, strictly: no key twice, no aliases that grow without end, and one line for whatever is wrong."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from dem_opt.errors import InputError, shorten

_MOST_KEYS = 10_000
"""Keys of one mapping, where `<<` merges others into it."""

_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Errors of PyYAML for text that is no YAML, and for tags and numbers without a value."""


def read_yaml(path: Path) -> dict[str, Any]:
    """A study file's mapping.

    Raises InputError for a file that is missing, unreadable or no YAML, and for a key that is given twice.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise InputError(path, None, None, "no such study file") from None
    except OSError as error:
        raise InputError(path, None, None, f"the study file can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(path, None, None, "the study file must be UTF-8 text") from None
    except _YAML_ERRORS as error:
        raise InputError(path, None, None, f"not valid YAML: {shorten(' '.join(str(error).split()), 300)}") from None
    if not isinstance(data, dict):
        raise InputError(path, None, data, "a study file is a mapping that begins with `name:`")
    return data


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 that refuses repeated keys and reads 3e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges `<<: *alias`, up to a size that no study has: aliases of aliases grow exponentially."""
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            raise yaml.constructor.ConstructorError(None, None, "`<<` merges too many keys", node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
