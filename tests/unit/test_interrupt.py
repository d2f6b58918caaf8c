"""A signal is remembered, and not acted on where the policy is ahead of the last complete iteration."""

import os
import signal

import pytest

from tlt.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_asks_to_stop_but_not_while_held(number):
    previous = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        interrupt = Interrupt()
        interrupt.install()
        assert not interrupt.is_requested()
        os.kill(os.getpid(), number)
        assert interrupt.requested
        assert interrupt.is_requested()
        with interrupt.held():
            assert not interrupt.is_requested()
        assert interrupt.is_requested()
        assert signal.getsignal(number) is signal.SIG_DFL, "a second signal ends the process"
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
