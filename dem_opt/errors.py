"""The errors of the project: mistakes that a user can mend, and work that failed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from reprlib import Repr


class InputError(ValueError):
    """A mistake of the user, in one line: where, which field, which value, and how to mend it.

    Parts that do not apply are None.  `value` is shown as written (`repr`), shortened to 80 characters.  Characters
    that would break the line, or steer a terminal, are escaped.

    Args:
        where: File or folder, or the name of a server or node.
        field: Field of the study file, or option of the command line.
        value: Its value.
        mend: The fault, and what to do.
    """

    def __init__(self, where: Path | str | None, field: str | None, value: object, mend: str) -> None:
        self.where, self.field, self.value, self.mend = where, field, value, mend
        super().__init__(where, field, value, mend)

    def __str__(self) -> str:
        shown = None if self.value is None else _shown(self.value)
        subject = " = ".join(part for part in (self.field, shown) if part is not None)
        text = ": ".join(part for part in (str(self.where or ""), subject, self.mend) if part)
        return shorten(_printable(text), 2000)


@contextmanager
def located(where: Path | str | None) -> Iterator[None]:
    """Gives its place to an InputError that names none."""
    try:
        yield
    except InputError as error:
        if error.where is not None:
            raise
        raise InputError(where, error.field, error.value, error.mend) from None


class EvaluationError(RuntimeError):
    """A composite could not be scored (a non-finite loss, say); the study goes on without it."""


class TrainingError(RuntimeError):
    """A model could not be trained (a loss that diverges, say); the command's other trainings go on."""


class OutageError(RuntimeError):
    """A service was away for too long.  Nothing is lost; the study continues with the next run."""


_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 200


def _shown(value: object) -> str:
    """A value as written, of bounded length and depth: a few aliases in YAML can stand for more than memory holds."""
    try:
        return shorten(_REPR.repr(value))
    except ValueError:
        return "a number of too many digits"


def _printable(text: str) -> str:
    """`text` with control characters and half surrogate pairs escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def shorten(text: str, length: int = 80) -> str:
    """`text`, cut in the middle to at most `length` characters."""
    if len(text) <= length:
        return text
    half = (length - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def nearest(word: str, known: Iterable[str]) -> str:
    """A question naming the known word nearest to `word`, or the known words where none is near."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
