"""Ctrl-C and SIGTERM: the first signal lets the work at hand finish, the second stops at the next safe moment."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Requests to stop a piece of work, which looks at them between its steps."""

    def __init__(self) -> None:
        self.requests = 0

    def is_set(self) -> bool:
        """True once a stop was requested."""
        return self.requests > 0

    def check(self) -> None:
        """Raise KeyboardInterrupt if a stop at once was requested."""
        if self.requests > 1:
            raise KeyboardInterrupt


@contextmanager
def finishing(announce: Callable[[], None]) -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into requests to stop.

    The block looks at them: after the first it ends its work in good order and raises KeyboardInterrupt itself, after
    the second it does so at the next `check`.  An exception at any other moment could leave a transaction open, and
    with it the database locked for all threads.  The third signal raises all the same: a block that is stuck ends.
    Python lets only its main thread receive signals: in another thread nothing is requested.

    Args:
        announce: Called at the first request.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def receive(_number: int, _frame: FrameType | None) -> None:
        stop.requests += 1
        if stop.requests == 1:
            announce()
        elif stop.requests > 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does, while the context is open."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
