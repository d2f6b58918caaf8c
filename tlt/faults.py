"""Lets things go wrong on request: what a crash, a full disk or a stopped process does is tested, not guessed.

A fault strikes once, where a phase of the trace begins or at a point inside one. Off means that the trace is the
ordinary one: no other code knows of faults.
"""

import errno
import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tlt.config.requirement import is_count
from tlt.trace import Trace

logger = logging.getLogger(__name__)

POINTS = (
    "rollout", "reward", "rollout_exchange", "old_logprobs", "ref_logprobs", "update", "optimizer_step",
    "weight_sync", "evaluation", "save", "save_commit", "spot_training", "drafter_step", "spot_publish",
)  # fmt: skip
"""Spans of the trace, and points inside them: before an optimizer step, between a checkpoint's shards and its
completion, after a step of the drafter."""
KINDS = ("exception", "sigkill", "sigstop", "out-of-memory", "disk-full", "hang", "slow")
SLOW_S = 2.0
"""Seconds that a `slow` fault takes; `hang` takes for ever."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong, once on each of its ranks."""

    kind: str
    point: str
    iteration: int
    ranks: tuple[int, ...]

    def strike(self) -> None:
        """Do it. Raises what the kind says, or does not return, or is slow."""
        where = f"injected fault at {self.point}, iteration {self.iteration}"
        logger.warning("%s: %s", where, self.kind)
        if self.kind == "exception":
            raise RuntimeError(where)
        if self.kind == "out-of-memory":
            raise MemoryError(where)
        if self.kind == "disk-full":
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({where})")
        if self.kind in ("sigkill", "sigstop"):
            os.kill(os.getpid(), signal.Signals[self.kind.upper()])
        while self.kind == "hang":
            time.sleep(3600)
        if self.kind == "slow":
            time.sleep(SLOW_S)


def parse_faults(specs: Sequence[str], *, world_size: int) -> tuple[Fault, ...]:
    """Each `<kind>@<point>/<iteration>[/<rank>]`; without a rank on all. Raises ValueError naming the flag."""
    return tuple(_parse(spec, world_size) for spec in specs)


def _parse(spec: str, world_size: int) -> Fault:
    kind, at, place = spec.partition("@")
    point, *numbers = place.split("/")
    is_whole = bool(at) and len(numbers) in (1, 2) and all(map(is_count, numbers))
    if not is_whole or kind not in KINDS or point not in POINTS:
        raise ValueError(
            f"--fault must be <kind>@<point>/<iteration>[/<rank>], kind one of {', '.join(KINDS)}, point one of "
            f"{', '.join(POINTS)}; got {spec!r}"
        )
    iteration, ranks = int(numbers[0]), tuple(map(int, numbers[1:])) or tuple(range(world_size))
    if max(ranks) >= world_size:
        raise ValueError(f"--fault {spec}: there is no rank {ranks[0]}, ranks are 0 to {world_size - 1}")
    return Fault(kind=kind, point=point, iteration=iteration, ranks=ranks)


class FaultyTrace(Trace):
    """A trace that strikes where spans begin and at points."""

    def __init__(self, folder: Path, rank: int, faults: Sequence[Fault]):
        super().__init__(folder, rank)
        self.faults = [fault for fault in faults if rank in fault.ranks]

    @contextmanager
    def span(self, name: str, **attributes: float | str) -> Iterator[None]:
        with super().span(name, **attributes):
            self.point(name)
            yield

    def point(self, name: str) -> None:
        """Strike where a fault is due here."""
        for fault in [one for one in self.faults if (one.point, one.iteration) == (name, self.iteration)]:
            self.faults.remove(fault)
            fault.strike()
