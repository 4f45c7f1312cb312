"""Ctrl-C and SIGTERM: the first signal lets the work at hand finish, the second stops at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def finishing(announce: Callable[[], None]) -> Iterator[Event]:
    """Turn the first Ctrl-C or SIGTERM into an event; the next one raises KeyboardInterrupt.

    The block looks at the event, ends its work in good order, and raises KeyboardInterrupt itself.  Python lets only
    its main thread receive signals: in another thread the event is never set.

    Args:
        announce: Called when the event is set.
    """
    stop = Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def receive(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        announce()

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
