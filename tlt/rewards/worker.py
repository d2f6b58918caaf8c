"""Inside a scoring process: what a scorer prints goes nowhere, its memory is limited, it returns a number."""

import math
import os
import resource
import signal
from collections.abc import Callable

OUT_OF_MEMORY = 71
"""Exit status of a process that reached its limit: it may be full of what earlier scorings left."""


def enter(memory_mib: int) -> None:
    """At the beginning of the process: it was forked from the zygote and ends with it, as that does with the rank.

    A child of the rank itself (processes.py) is its own zygote: it imports the libraries now, before a response's time
    limit begins.
    """
    from tlt.rewards import zygote  # in the process that this one was forked from; a rank must not import it

    zygote.end_with_parent()
    if zygote.PID not in (os.getpid(), os.getppid()):  # the zygote ended before
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # where pebble has set a handler; SIGKILL ends it
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    limit = memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def guarded(scorer: Callable[[dict, str], float], answer: dict, response: str) -> float:
    """The score. Raises ValueError for one that is not a finite number, and whatever the scorer raises."""
    try:
        value = scorer(answer, response)
        number = float(value) if isinstance(value, int | float) else math.nan
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    if not math.isfinite(number):
        raise ValueError(f"the scorer returned {value!r:.100}, which is no finite number")
    return number
