"""Laws of signals: the first lets what is at work finish, the second does not, and nothing of it stays behind."""

import os
import signal
import threading

import pytest

from dem_opt.signals import SIGNALS, finishing, sigterm_as_ctrl_c


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("again", SIGNALS)
def test_the_first_signal_asks_the_second_stops_between_steps_and_the_third_anywhere(number: int, again: int) -> None:
    before, calls = [signal.getsignal(signum) for signum in SIGNALS], []
    with pytest.raises(KeyboardInterrupt), finishing(lambda: calls.append("asked")) as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        stop.check()
        assert stop.is_set() and calls == ["asked"]
        os.kill(os.getpid(), again)
        with pytest.raises(KeyboardInterrupt):
            stop.check()
        calls.append("after the second")
        os.kill(os.getpid(), number)
    assert calls == ["asked", "after the second"]
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_sigterm_is_ctrl_c_within_and_what_it_was_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_thread_that_gets_no_signals_is_never_asked() -> None:
    states: list[bool] = []

    def work() -> None:
        with finishing(lambda: None) as stopping:
            states.append(stopping.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert states == [False]
