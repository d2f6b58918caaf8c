"""Imported by the process that scoring processes are forked from: libraries once, and the end of the rank its own.

A scoring process that hung is replaced within milliseconds and shares the libraries' memory with the others; each
importing for itself took seconds, which the time limit of its first response counted.
"""

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
"""Of prctl(2): a signal for when the parent is gone."""
PID = os.getpid()


def end_with_parent() -> None:
    """However that ends. Of the calling process; what was forked from it needs a call of its own."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


# Before the imports, which take seconds. A cluster signals all processes of a job; its ranks finish what they are at
# before they stop, and need scores. What is forked from here ignores these signals too.
end_with_parent()
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)

import math_verify  # noqa: E402, F401
import reasoning_gym  # noqa: E402, F401
