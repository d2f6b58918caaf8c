"""One rollout replica that decodes: its requests, and the moments at which one of them ends.

All requests of a replica get as many tokens from a step as the table says for their number: a response needs as many
steps as that gives, rounded up, and between two ends every step is like the one before but for longer contexts. So
time goes from end to end in closed form, and 1,024 replicas take seconds.
"""

import heapq
from collections import deque
from dataclasses import dataclass
from math import ceil, sqrt

from tlt.simulation.step_table import StepTable

ROUNDING = 1e-6
"""Tokens by which a response may seem to lack, of sums in floating point."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to be generated, or the rest of one."""

    name: str
    num_prompt_tokens: int
    length: int
    """Response tokens in all."""
    num_unread: float = 0.0
    """Tokens that are read when it begins: of its prompt as far as no one read it here, and those generated so far."""
    num_done: float = 0.0
    """Response tokens that were generated elsewhere."""


class Replica:
    """Times are seconds from the beginning of the rollout."""

    def __init__(self, index: int, table: StepTable, requests: list[Request], *, begin_s: float = 0.0):
        self.index = index
        self.table = table
        self.waiting = deque(requests)
        self.running: list[tuple[float, int, Request]] = []
        """A heap of (position at which it ends, order, request)."""
        self.position = 0.0
        """Tokens that a request would have that runs from the beginning."""
        self.contexts_offset = 0.0
        """Context of all running requests, less `position` each."""
        self.num_steps = 0
        self.begin_s = self.end_s = begin_s
        """Of the stretch up to the next end."""
        self.stretch_steps = 0
        self.num_admitted = 0
        self.num_tokens = 0
        """Of responses that ended here, whole."""
        self.request_steps = 0
        """Steps, each counted for every request in it."""
        self.peak_context = 0.0
        self._admit()
        self._plan()

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def tokens_per_step(self) -> float:
        """Of each request, at present."""
        return self.table.tokens[self.num_running]

    @property
    def context(self) -> float:
        """Tokens of context of all running requests, when the stretch begins."""
        return self.contexts_offset + self.num_running * self.position

    def _admit(self) -> None:
        """Let waiting requests run while there is room; their prompts are read first."""
        to_read = 0.0
        while self.waiting and self.num_running < self.table.max_running:
            request = self.waiting.popleft()
            offset = self.position - request.num_done
            heapq.heappush(self.running, (offset + request.length, self.num_admitted, request))
            self.contexts_offset += request.num_prompt_tokens - offset
            self.num_admitted += 1
            to_read += request.num_unread
        if to_read > 0:
            self.begin_s += self.table.read.seconds(to_read)

    def _plan(self) -> None:
        """The stretch from now to the next end."""
        self.stretch_steps, self.end_s = 0, self.begin_s
        if self.running:
            missing = self.running[0][0] - self.position - ROUNDING
            self.stretch_steps = max(ceil(missing / self.tokens_per_step), 1)
            self.end_s = self.begin_s + self.stretch_s(self.stretch_steps)

    def stretch_s(self, steps: int) -> float:
        """Seconds of so many steps from the stretch's beginning: each step's contexts are longer than the last's."""
        count, table = self.num_running, self.table
        growth = count * self.tokens_per_step * steps * (steps - 1) / 2
        return steps * table.seconds[count] + table.context_s * (steps * self.context + growth)

    def steps_until(self, time_s: float) -> int:
        """Steps of the stretch that have ended or begun by then; at most all of it."""
        count, table = self.num_running, self.table
        a = table.context_s * count * self.tokens_per_step / 2
        b = table.seconds[count] + table.context_s * self.context - a
        left = time_s - self.begin_s
        if left <= 0:
            return 0
        steps = left / b if a == 0 else 2 * left / (b + sqrt(b * b + 4 * a * left))
        return min(ceil(steps - ROUNDING), self.stretch_steps)

    def _go(self, steps: int) -> None:
        """Do so many steps of the stretch."""
        self.begin_s += self.stretch_s(steps)
        self.num_steps += steps
        self.request_steps += steps * self.num_running
        self.position += steps * self.tokens_per_step
        self.peak_context = max(self.peak_context, self.context)

    def finish(self) -> list[Request]:
        """The stretch is over: requests that ended with it."""
        self._go(self.stretch_steps)
        done = []
        while self.running and self.running[0][0] <= self.position + ROUNDING:
            end, _, request = heapq.heappop(self.running)
            self.contexts_offset -= request.num_prompt_tokens - (end - request.length)
            self.num_tokens += request.length
            done.append(request)
        self._admit()
        self._plan()
        return done

    def done_tokens(self, end: float, request: Request) -> float:
        """Response tokens that a running request has, which ends at that position."""
        return request.length - (end - self.position)

    def give(self, names: set[str], *, steps: int) -> list[Request]:
        """After so many steps of the stretch, let go of some requests: what others are to go on with."""
        self._go(steps)
        given, kept = [], []
        for end, order, request in self.running:
            if request.name not in names:
                kept.append((end, order, request))
                continue
            done = self.done_tokens(end, request)
            self.contexts_offset -= request.num_prompt_tokens - (end - request.length)
            given.append(
                Request(
                    name=request.name, num_prompt_tokens=request.num_prompt_tokens, length=request.length,
                    num_unread=request.num_prompt_tokens + done, num_done=done,
                )
            )  # fmt: skip
        heapq.heapify(kept)
        self.running = kept
        self._admit()
        self._plan()
        return given

    def take(self, requests: list[Request], *, time_s: float) -> None:
        """This replica had nothing left, and goes on with these."""
        assert not self.running, "only who has nothing left takes"
        self.begin_s = time_s
        self.waiting.extend(requests)
        self._admit()
        self._plan()
