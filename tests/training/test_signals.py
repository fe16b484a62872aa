import os
import signal
import threading

import pytest

from qlora_trainer.training.signals import stop_on_signals


def test_the_first_signal_is_a_request_and_the_second_leaves_at_once() -> None:
    said: list[str] = []
    before = signal.getsignal(signal.SIGINT)

    def asked_twice() -> None:
        with stop_on_signals(said.append) as stop:
            assert not stop
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal_name == "SIGTERM"
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        asked_twice()
    assert len(said) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    handlers: list[object] = []

    def work() -> None:
        with stop_on_signals(print) as stop:
            handlers.extend([signal.getsignal(signal.SIGTERM), bool(stop)])

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [before, False]
