"""Code and prose out of the standard library's own source: documents of text that this machine has."""

import ast
import inspect
import random
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from pydoc_data.topics import topics

_REPETITIVE = {"distutils", "encodings", "idlelib", "lib2to3", "turtledemo"}
SKIPPED_MODULES = _REPETITIVE | {"antigravity", "pydoc_data", "this"}
"""Modules that say nothing of their own, or the same thing many times over."""

PARTS = 20
"""One module gives at most this part of a split's code and prose, so that no large package fills it."""

SHORTEST = 80
"""Characters of the shortest function or docstring that counts as a document."""


def split_modules(shares: Sequence[float], rng: random.Random) -> list[list[str]]:
    """The standard library's top-level modules and packages with source, each whole in one of the shares."""
    modules = [name for name in sorted(sys.stdlib_module_names - SKIPPED_MODULES) if source_files(name)]
    rng.shuffle(modules)
    ends = [round(len(modules) * end) for end in accumulate(shares)]
    return [modules[start:end] for start, end in pairwise([0, *ends])]


def source_files(module: str) -> list[Path]:
    """The Python files of a top-level module or package of the standard library, tests left out."""
    library = Path(sysconfig.get_path("stdlib"))
    if (library / f"{module}.py").is_file():
        return [library / f"{module}.py"]
    files = sorted((library / module).rglob("*.py"))
    return [file for file in files if not {"test", "tests"} & set(file.relative_to(library).parts)]


def library_documents(modules: Iterable[str], characters: int, prose_characters: int) -> tuple[list[str], list[str]]:
    """Code and prose of modules, at most so many characters of each, a PARTS-th of it from one module."""
    code: list[str] = []
    prose: list[str] = []
    for module in modules:
        more_code, more_prose = module_documents(module, characters // PARTS, prose_characters // PARTS)
        code += more_code
        prose += more_prose
        if sum(map(len, code)) >= characters and sum(map(len, prose)) >= prose_characters:
            break
    return within(code, characters), within(prose, prose_characters)


def module_documents(module: str, characters: int, prose_characters: int) -> tuple[list[str], list[str]]:
    """The first functions and docstrings of a module, at most so many characters of each."""
    code: list[str] = []
    prose: list[str] = []
    for file in source_files(module):
        tree = ast.parse(file.read_bytes())
        prose += [text for text in take_docstrings(tree) if len(text) >= SHORTEST]
        code += within(definitions(tree), characters)
        if sum(map(len, code)) >= characters // 2 and sum(map(len, prose)) >= prose_characters // 2:
            break
    return within(code, characters), within(prose, prose_characters)


def take_docstrings(tree: ast.Module) -> list[str]:
    """Remove every docstring from the tree and return them."""
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None:
                docstrings.append(docstring)
                node.body = node.body[1:] or [ast.Pass()]
    return docstrings


def definitions(tree: ast.Module) -> Iterator[str]:
    """The functions and methods of a module, written out anew, hence without comments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.unparse(node)
            if len(text) >= SHORTEST:
                yield text


def topic_documents() -> list[str]:
    """Python's help topics, a document a section of about 2,000 characters."""
    documents = []
    for name in sorted(topics):
        section = ""
        for paragraph in inspect.cleandoc(topics[name]).split("\n\n"):
            section = f"{section}\n\n{paragraph}".strip("\n")
            if len(section) >= 2000:
                documents.append(section)
                section = ""
    return documents


def within(documents: Iterable[str], characters: int) -> list[str]:
    """The first documents that together have at most so many characters."""
    chosen: list[str] = []
    for document in documents:
        characters -= len(document)
        if characters < 0:
            break
        chosen.append(document)
    return chosen
