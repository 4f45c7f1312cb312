"""How far long work is, told from where it is done to whoever watches, past all that lies between."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Watch = Callable[[str, int, int, str], None]
"""Takes work's name, how much of it is done, how much there is, and the unit: "bytes", say."""

_watching: ContextVar[Watch | None] = ContextVar("watching", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Within, in this thread, `watch` is told of all work that is gauged."""
    token = _watching.set(watch)
    try:
        yield
    finally:
        _watching.reset(token)


@contextmanager
def gauge(work: str, total: int, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """Yields what is called with each amount that is done."""
    watch, done = _watching.get(), 0

    def add(amount: int) -> None:
        nonlocal done
        done += amount
        if watch is not None:
            watch(work, done, total, unit)

    add(0)
    yield add
