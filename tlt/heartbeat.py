"""Ranks tell each other that they live, so that a run ends with a reason where it would wait for ever.

A thread of each rank writes a beat to the job's store and looks at three things: whether the next rank's beats go on
(it may be killed, stopped, or its machine gone), whether the own main thread moves (or is in a collective, a lock or a
spin that never ends), and whether any rank has failed. If one is wrong for the whole deadline, or a rank has failed,
it says which rank was in which phase, writes the stacks of all threads and ends the process. Time is counted in looks,
not by a clock: a job that is paused as a whole goes on when it is continued.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Protocol, Self

logger = logging.getLogger(__name__)

LOOKS_PER_DEADLINE = 20
MAX_LOOK_S = 5.0
SILENCE_SHARE = 0.5
"""Of the deadline, after which a silent rank is given up: before those that wait for it count as standing still."""
EXPIRED = 70
"""Exit status of a rank whose deadline expired (EX_SOFTWARE of sysexits.h)."""
PREFIX = "heartbeat"
FAILED = f"{PREFIX}/failed"
LEFT = "left"


class Store(Protocol):
    """Part of torch.distributed's stores; each object has a connection of its own."""

    def clone(self) -> "Store":
        """Another connection."""

    def set_timeout(self, timeout: timedelta) -> None:
        """Of every wait."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Read a value; waits until it is there."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write if the value is as expected (or absent, for ""); returns what is there then."""


class Heartbeat:
    """Of one rank. `where()` says in which phase its main thread is; stacks are appended to `stacks`. As a context it
    ends with what the run does: closed where that ends well, and told where it raises."""

    def __init__(
        self, store: Store, *, rank: int, world_size: int, deadline_s: float, where: Callable[[], str], stacks: Path
    ):
        self.store = store.clone()  # the main thread may be inside a call of its own
        self.store.set_timeout(timedelta(seconds=deadline_s))
        self.rank = rank
        self.next_rank = (rank + 1) % world_size
        self.deadline_s = deadline_s
        self.look_s = min(deadline_s / LOOKS_PER_DEADLINE, MAX_LOOK_S)
        self.where = where
        self.stacks = stacks
        self.main_thread = threading.main_thread()
        self.closing = threading.Event()
        self.num_beats = 0
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self._beat, self._watch)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception):
            self.failed(error)

    def start(self) -> None:
        """From here on the deadline holds."""
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        for thread in self.threads:
            thread.start()

    def failed(self, error: BaseException) -> None:
        """This rank's main thread ends by an error: say so in one line, and have all other ranks end too. The process
        has the deadline to end by itself."""
        self.closing.set()
        faulthandler.dump_traceback_later(self.deadline_s, exit=True)
        notes = ", ".join(getattr(error, "__notes__", [])) or self.where()
        own = f"rank {self.rank} failed in {notes}: {type(error).__name__}: {error}"
        logger.critical("%s", own)
        try:
            first = self.store.compare_set(FAILED, "", own).decode()
        except RuntimeError as unreachable:  # torch's store errors; `error` is what the caller raises
            logger.critical("rank %d: the job's store is gone: %s", self.rank, unreachable)
            return
        if first != own:
            logger.critical("rank %d: before that, %s", self.rank, first)

    def close(self) -> None:
        """The run has ended well on this rank."""
        self.closing.set()
        for thread in self.threads:
            thread.join(timeout=self.deadline_s)
        self.store.set(self._key(self.rank), LEFT)

    def _key(self, rank: int) -> str:
        return f"{PREFIX}/{rank}"

    def _beat(self) -> None:
        position: tuple = ()
        heard = ""
        num_still = num_silent = 0
        while not self.closing.wait(self.look_s):
            try:
                self.store.set(self._key(self.rank), f"{self.num_beats} {self.where()}")
                if self.store.check([FAILED]):
                    self._expire(self.store.get(FAILED).decode())
                is_there = self.store.check([self._key(self.next_rank)])
                now_heard = self.store.get(self._key(self.next_rank)).decode() if is_there else ""
            except RuntimeError as error:  # torch's store errors; if they go on, the other thread expires
                logger.warning("rank %d: the job's store did not answer: %s", self.rank, error)
                continue
            num_silent = num_silent + 1 if now_heard == heard and heard != LEFT else 0
            heard = now_heard
            if num_silent * self.look_s >= SILENCE_SHARE * self.deadline_s:
                phase, seconds = heard.partition(" ")[2] or "no phase yet", SILENCE_SHARE * self.deadline_s
                self._expire(f"rank {self.next_rank} was not heard of for {seconds:g} s; last in {phase}")
            now = self._position()
            num_still = num_still + 1 if now == position else 0
            position = now
            if num_still * self.look_s >= self.deadline_s:
                self._expire(f"rank {self.rank} stood still for {self.deadline_s:g} s in {self.where()}")
            self.num_beats += 1

    def _watch(self) -> None:
        """The other thread may be held by a store whose machine is gone."""
        seen, num_still = -1, 0
        while not self.closing.wait(self.look_s):
            num_still = num_still + 1 if self.num_beats == seen else 0
            seen = self.num_beats
            if num_still * self.look_s >= 2 * self.deadline_s:
                self._expire(f"the job's store did not answer for {2 * self.deadline_s:g} s")

    def _position(self) -> tuple:
        """Where the main thread stands; another one whenever it has done anything."""
        frame, stack = sys._current_frames().get(self.main_thread.ident), []
        while frame is not None:
            stack.append((id(frame.f_code), frame.f_lasti))
            frame = frame.f_back
        return (*stack, _num_waits(self.main_thread.native_id))

    def _expire(self, reason: str) -> None:
        if self.closing.is_set():
            return
        text = f"rank {self.rank} in {self.where()} ends the run: {reason}"
        logger.critical("%s; stacks of all threads are in %s", text, self.stacks)
        with self.stacks.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
        # The others are told in a thread: the store may be what is gone.
        teller = threading.Thread(target=self.store.compare_set, args=(FAILED, "", reason), daemon=True)
        teller.start()
        teller.join(timeout=self.look_s)
        if self.rank == 0:  # the store may be in this process: the others look once more before it is gone
            time.sleep(2 * self.look_s)
        sys.stderr.flush()
        os._exit(EXPIRED)  # the main thread is inside a call that does not return


def _num_waits(thread: int) -> int:
    """How often a thread of this process has gone to sleep: a loop that waits over and over stands at one place."""
    for line in Path(f"/proc/self/task/{thread}/status").read_text().splitlines():
        if line.startswith("voluntary_ctxt_switches"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/task/{thread}/status names no context switches")
