"""Ctrl-C and SIGTERM: the first lets what is at work finish, the second stops at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def finishing(tell: Callable[[], None]) -> Iterator[Event]:
    """Within, the first Ctrl-C or SIGTERM sets the event and calls `tell`; the next one raises KeyboardInterrupt.

    Whoever is within looks at the event, ends what can be ended in good order, and raises KeyboardInterrupt itself.
    Python lets only its main thread receive signals: in another one the event is never set.
    """
    asked = Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def receive(_number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        tell()

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Within, SIGTERM raises KeyboardInterrupt as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
