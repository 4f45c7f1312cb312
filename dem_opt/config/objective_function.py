"""A custom objective: an importable function of a composite's scores."""

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import import_module
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Self

from dem_opt.errors import EvaluationError, InputError, shorten
from dem_opt.permissions import world_writable
from dem_opt.types import Score

FIELD = "objective.function"
"""The study file's field, which messages name."""


@dataclass(frozen=True)
class ObjectiveFunction:
    """The function that the study file's `objective.function` names.

    It receives the scores of one split, a mapping from distribution or general corpus to `Score` (`nll` in nats per
    token, `perplexity`, `bits_per_byte`, `tokens`), and returns the number to minimize, in `objective.unit`.

    Attributes:
        name: Qualified name, "package.module:function".
        digest: SHA-256 of the function's source.
    """

    name: str
    digest: str

    @classmethod
    def load(cls, name: str) -> Self:
        """Import a function by its qualified name; InputError where there is none."""
        return cls(name, _digest(name))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the function that `str` of it described, without importing it."""
        name, _, digest = text.partition(" ")
        return cls(name, digest)

    def __str__(self) -> str:
        return f"{self.name} {self.digest}"

    def __call__(self, scores: Mapping[str, Score]) -> float:
        """Return the objective of these scores.

        Raises:
            InputError: The function cannot be imported, has changed since this object was made, raised an error, or
                returned something else than a number.
            EvaluationError: The number is not finite.
        """
        function = _import(self.name)
        if _digest(self.name) != self.digest:
            raise InputError(None, FIELD, self.name, "has changed since the study was run; run it again")
        try:
            value = function(scores)
        except Exception as error:  # the function is the user's: whatever it raises is reported as theirs
            reason = shorten(f"{type(error).__name__}: {error}", 200)
            raise InputError(None, FIELD, self.name, f"raised {reason}") from error
        if isinstance(value, bool) or not isinstance(value, Real):
            raise InputError(None, FIELD, self.name, f"must return a number, not {type(value).__name__}")
        if not isfinite(value):
            raise EvaluationError(f"{FIELD} = {self.name} returned {float(value)}")
        return float(value)


def import_from(folder: Path) -> None:
    """Let modules of a folder be imported, after those of all other places.

    Raises:
        InputError: Every user of this machine can change the folder or a module in it.
    """
    for place in (folder, *sorted(folder.glob("*.py"))):
        if culprit := world_writable(place):
            mend = f"every user of this machine can change it, and its code runs as you: chmod o-w {culprit}"
            raise InputError(culprit, FIELD, None, mend)
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@cache
def _import(name: str) -> Callable[[Mapping[str, Score]], object]:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(import_module(module_name), function_name)
    except Exception as error:  # importing runs the user's module, which may raise anything
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        raise InputError(None, FIELD, name, f"cannot be imported ({reason})") from error
    if not callable(function):
        raise InputError(None, FIELD, name, "is not callable")
    return function  # type: ignore[no-any-return]


@cache
def _digest(name: str) -> str:
    """Return the SHA-256 of an imported function's source; of its name where Python has no source of it."""
    function = _import(name)
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        source = repr(getattr(function, "__qualname__", type(function).__qualname__))
    return sha256(source.encode()).hexdigest()
