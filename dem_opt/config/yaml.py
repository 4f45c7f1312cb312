"""YAML, strictly: no key twice, no aliases that grow without end, and one line for whatever is wrong."""

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dem_opt.errors import InputError, shorten

_MOST_KEYS = 10_000
"""Keys of one mapping, where `<<` merges others into it."""

_VALUE_ERRORS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""Errors of PyYAML for tags, dates and numbers without a value."""

_FAULTS: tuple[tuple[str, str], ...] = (
    ("\\t", "tabs do not indent in YAML; use spaces"),
    ("mapping values are not allowed", "a second `:` in one line; quote the value, or begin a new line"),
    ("expected a single document", "the file holds several documents; leave out the line `---`"),
    ("found undefined alias", "no `&` names this `*`; quote a value that begins with `*`"),
    ("expected alphabetic or numeric", "quote a value that begins with `*`, `&` or `%`"),
    ("chomping or indentation", "`|` and `>` begin a text of several lines; quote the value"),
    ("for merging", "`<<` merges mappings only"),
    ("base64", "this is read as bytes, and is none; quote the value"),
    ("incompatible YAML", "leave out the line `%YAML`"),
    ("found duplicate anchor", "two `&` have the same name"),
    ("could not determine a constructor", "this tag (`!`) is not understood; quote a value that begins with `!`"),
    ("unhashable key", "a key must be a plain word"),
    ("end of stream", "the quotation mark or bracket that opens here is never closed"),
    ("expected ',' or", "a bracket that opens here is not closed, or a comma is missing"),
    (
        "expected <block end>",
        "this line stands in another column than the entries before it, or is a list and a mapping",
    ),
    ("could not find expected ':'", "this line is no `key: value`"),
    ("unacceptable character", "this character cannot stand in YAML; delete it"),
    ("special characters are not allowed", "this character cannot stand in YAML; delete it"),
    ("unknown escape character", "this backslash is no escape; use single quotes around the value"),
    ("cannot start any token", "quote a value that begins with this character"),
)
"""Parts of PyYAML's messages, and the fault as the writer of a file sees it; the first that fits."""

_OPENING = ("end of stream", "expected ',' or", "could not find expected ':'")
"""Faults that PyYAML finds some lines below their place: at the end of what has begun there."""


def read_yaml(path: Path) -> dict[str, Any]:
    """A study file's mapping.

    Raises InputError for a file that is missing, unreadable or no YAML, and for a key that is given twice.
    """
    try:
        _refuse_other_than_file(path)
        data = _parse(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(path, None, None, "no such study file") from None
    except OSError as error:
        raise InputError(path, None, None, f"the study file can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(path, None, None, "the study file must be UTF-8 text") from None
    if not isinstance(data, dict):
        raise InputError(path, None, data, "a study file is a mapping that begins with `name:`")
    return data


def _refuse_other_than_file(path: Path) -> None:
    """Raise InputError for a folder, and for what may have no end: a pipe, a socket or a device."""
    if path.is_dir():
        inside = path / "study.yaml"
        named = f": {inside}" if inside.is_file() else ""
        raise InputError(path, None, None, f"is a folder; name the study file in it{named}")
    if path.exists() and not path.is_file():
        raise InputError(
            path, None, None, "is no file, but a pipe or device; write the study to a file, which is read again"
        )


def _parse(path: Path, text: str) -> object:
    """The content of YAML; InputError with the line where it is none."""
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _refuse_repeated_keys(path, root)
        return loader.construct_document(root)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        _refuse(path, error)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise InputError(path, f"line {line}", None, f"not valid YAML: {_fault(error.reason)}") from None
    except RecursionError:
        raise InputError(path, None, None, "not valid YAML: its brackets or lines are nested too deeply") from None
    except yaml.YAMLError as error:
        raise InputError(path, None, None, f"not valid YAML: {_fault(str(error))}") from None


def _refuse(path: Path, error: yaml.MarkedYAMLError) -> NoReturn:
    """Raise InputError with the line of a fault; of a bracket or quotation mark, the line in which it opens."""
    problem = f"{error.context or ''} {error.problem or ''}"
    opens = error.context_mark if any(part in problem for part in _OPENING) else None
    mark = opens or error.problem_mark or error.context_mark
    place = None if mark is None else f"line {mark.line + 1}, column {mark.column + 1}"
    raise InputError(path, place, None, f"not valid YAML: {_fault(problem)}") from None


def _fault(problem: str) -> str:
    """A message of PyYAML in words about the file."""
    words = next((words for part, words in _FAULTS if part in problem), None)
    return words or shorten(" ".join(problem.split()), 200)


def _refuse_repeated_keys(path: Path, root: yaml.Node) -> None:
    """Raise InputError for a key that a mapping has twice, named from the root of the file; aliases are seen once."""
    waiting: list[tuple[tuple[str, ...], yaml.Node]] = [((), root)]
    visited = set()
    while waiting:
        place, node = waiting.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [((*place, str(number)), child) for number, child in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[tuple[str, str], int] = {}
            for key, child in node.value:
                if isinstance(key, yaml.ScalarNode):
                    field, line = ".".join((*place, key.value)), key.start_mark.line + 1
                    if (key.tag, key.value) in lines:
                        mend = f"stands twice, in line {lines[key.tag, key.value]} and in line {line}; leave one out"
                        raise InputError(path, field, None, mend)
                    lines[key.tag, key.value] = line
                    waiting.append(((*place, key.value), child))


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 that reads 3e-4 as a number, and says where a value is none."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value; errors of Python's own types get the line."""
        try:
            return super().construct_object(node, deep=deep)
        except _VALUE_ERRORS:
            mend = "this is read as a date, a number or bytes, and is none; quote the value"
            raise yaml.constructor.ConstructorError(None, None, mend, node.start_mark) from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges `<<: *alias`, up to a size that no study has: aliases of aliases grow exponentially."""
        super().flatten_mapping(node)
        if len(node.value) > _MOST_KEYS:
            raise yaml.constructor.ConstructorError(None, None, "`<<` merges too many keys", node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
