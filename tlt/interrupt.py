"""SIGINT, SIGTERM and SIGUSR1 ask the run to save and stop; ranks agree on it where they meet anyway.

SIGUSR1 is what examples/slurm/train.sbatch sends: torchrun ends its ranks 30 s after a SIGTERM of its own.
"""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - an event, not an error
    """A signal asked the run to stop; raised on every rank at the same point of the loop."""


class Interrupt:
    """Remembers that a signal arrived. A second one of the same kind acts as if this class were not there."""

    def __init__(self):
        self.requested = False
        self.is_held = False

    def install(self) -> None:
        """Catch the signals to this process from here on."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
        logger.warning("%s: stopping; the last complete iteration will be saved", signal.Signals(number).name)

    def is_requested(self) -> bool:
        """Whether a rollout should be left now."""
        return self.requested and not self.is_held

    @contextmanager
    def held(self) -> Iterator[None]:
        """Finish what is inside before stopping: the policy is ahead of the last complete iteration here, so leaving
        would save weights of one iteration under the number of another."""
        self.is_held = True
        try:
            yield
        finally:
            self.is_held = False
