"""A signal is remembered, and not acted on where the policy is ahead of the last complete iteration."""

import os
import signal

from tlt.interrupt import Interrupt


def test_a_signal_asks_to_stop_but_not_while_held():
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        interrupt = Interrupt()
        interrupt.install()
        assert not interrupt.is_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
        assert interrupt.is_requested()
        with interrupt.held():
            assert not interrupt.is_requested()
        assert interrupt.is_requested()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "a second signal ends the process"
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
