"""Unfinished responses move from a crowded replica to one that is done, where both then end sooner.

A response is a function of its seed and its tokens' positions, so it can be gone on with anywhere: the other replica
reads prompt and tokens so far again, which is what a move costs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tlt.rollout.handover import HandoverBoard
from tlt.rollout.outlook import Outlook, growth_rate
from tlt.spec.cost_model import Curve
from tlt.types import Rollout

LOOK_STEPS = 8
"""Engine steps between two looks at what other replicas ask for."""
LOOK_S = 0.01
"""Seconds between two looks of a replica that asks."""
MIN_GAIN_FRAC = 0.1
"""Share of the giver's remaining time that a move must save: lengths are guessed."""


class Requests(Protocol):
    """Responses of the present rollout that an engine holds; the same on all ranks of its replica."""

    def lengths(self) -> Mapping[str, int]:
        """Response tokens of each unfinished one, by name."""

    def num_known_tokens(self, name: str) -> int:
        """Prompt and response tokens of an unfinished one, which another engine would have to read."""

    def are_decoding(self) -> bool:
        """Whether the next engine step reads no prompt."""

    def parts(self, names: Sequence[str]) -> dict[str, Rollout]:
        """What there is of unfinished ones."""

    def drop(self, names: Sequence[str]) -> None:
        """Others go on with these."""

    def add(self, name: str, begun: Rollout | None = None) -> None:
        """Go on with one, or begin it."""


class NoConsolidation:
    """Each replica ends what it began."""

    num_adopted = 0

    def begin(self) -> None:
        """Nothing to prepare."""

    def before_step(self, requests: Requests) -> None:
        """Nothing to note."""

    def after_step(self, requests: Requests, *, num_running: int, seconds: float, agree: Callable[[Any], Any]) -> None:
        """Nothing is given."""

    def adopts(
        self, requests: Requests, *, should_stop: Callable[[], bool], agree: Callable[[Any], Any]
    ) -> bool:  # fmt: skip
        """Nothing is taken."""
        return False

    def end(self) -> None:
        """No one waits."""


@dataclass(frozen=True, kw_only=True)
class Pending:
    """An unfinished response."""

    name: str
    num_tokens: int
    """Of prompt and response."""
    num_steps: float
    """Engine steps that it is expected to need."""


class Consolidation:
    """Of one rank; only the first of its replica looks at the board, and all do what it decides.

    `agree` makes the first rank's value that of all ranks of the replica, as they call it together.
    """

    def __init__(self, board: HandoverBoard, outlook: Outlook, *, is_replica_leader: bool):
        self.board = board
        self.outlook = outlook
        self.is_replica_leader = is_replica_leader
        self.steps = Curve()
        """Seconds of an engine step that only decodes, by requests in it."""
        self.num_adopted = 0
        """Responses that others began, in this rollout."""
        self._num_steps = 0
        self._was_decoding = False
        self._before: Mapping[str, int] = {}
        self._tokens_per_step = 1.0

    def begin(self) -> None:
        """A rollout of the world begins."""
        self.board.begin()
        self.num_adopted = self._num_steps = 0
        self._before = {}

    def before_step(self, requests: Requests) -> None:
        """An engine step begins."""
        self._was_decoding = requests.are_decoding()

    def after_step(self, requests: Requests, *, num_running: int, seconds: float, agree: Callable[[Any], Any]) -> None:
        """Every few engine steps: give to whom asks what pays. All ranks of the replica call after the same steps."""
        if self._was_decoding and num_running > 0:
            self.steps.observe(num_running, seconds)
        self._num_steps += 1
        if self._num_steps % LOOK_STEPS:
            return
        given = agree(self._answer(requests) if self.is_replica_leader else None)
        if given:
            requests.drop(given)

    def _answer(self, requests: Requests) -> list[str]:
        """Look at all new asks; names of the responses that were given away."""
        present = requests.lengths()
        rate = growth_rate(self._before, present, LOOK_STEPS)
        self._tokens_per_step = rate if rate > 0 else self._tokens_per_step
        self._before = present
        left = dict(present)
        for ask in self.board.unseen():
            names = self.choose(left, requests)
            if names and self.board.own(ask):
                self.board.give(ask, requests.parts(names))
                left = {name: length for name, length in left.items() if name not in names}
            self.board.saw(ask)
        return [name for name in present if name not in left]

    def choose(self, lengths: Mapping[str, int], requests: Requests) -> list[str]:
        """Names of those of the unfinished responses that should move to an idle replica; never all."""
        pending = [
            Pending(
                name=name, num_tokens=requests.num_known_tokens(name),
                num_steps=self.outlook.expected_more(name, length) / self._tokens_per_step,
            )
            for name, length in lengths.items()
        ]  # fmt: skip
        return worth_moving(pending, self.steps.seconds)

    def adopts(
        self, requests: Requests, *, should_stop: Callable[[], bool], agree: Callable[[Any], Any]
    ) -> bool:  # fmt: skip
        """This replica has nothing left: whether it got something of others. Returns when another gave, all have
        looked and none did, or this rank was told to stop. All ranks of the replica call together."""
        found = agree(self._ask(should_stop) if self.is_replica_leader else None)
        for name, begun in found.items():
            requests.add(name, begun)
        self.num_adopted += len(found)
        return bool(found)

    def _ask(self, should_stop: Callable[[], bool]) -> dict[str, Rollout]:
        ask = self.board.ask()
        while True:
            for each in self.board.unseen():
                self.board.saw(each)  # who asks has nothing to give
            have_all_seen = self.board.all_saw(ask)  # before the owner is looked for: an owner gives before it saw
            if self.board.is_owned(ask):
                return self.board.gift(ask)
            if have_all_seen or (should_stop() and self.board.own(ask)):
                return {}
            time.sleep(LOOK_S)

    def end(self) -> None:
        """This replica has nothing left and gets nothing, or was told to stop."""
        if self.is_replica_leader:
            self.board.leave()


def worth_moving(pending: Sequence[Pending], step_s: Callable[[float], float]) -> list[str]:
    """Names of the responses whose move to an idle replica lets both replicas end soonest; none unless that saves
    `MIN_GAIN_FRAC`. Those that are read again most cheaply move; `step_s(n)` are seconds of a step of n tokens."""
    ordered = sorted(pending, key=lambda each: (each.num_tokens, each.name))
    least_s, best = decode_s(ordered, step_s) * (1 - MIN_GAIN_FRAC), 0
    for count in range(1, len(ordered)):
        moved = ordered[:count]
        read_s = step_s(sum(each.num_tokens for each in moved))
        seconds = max(decode_s(ordered[count:], step_s), read_s + decode_s(moved, step_s))
        if seconds < least_s:
            least_s, best = seconds, count
    return [each.name for each in ordered[:best]]


def decode_s(pending: Sequence[Pending], step_s: Callable[[float], float]) -> float:
    """Seconds until all are done that decode together, fewer and fewer."""
    seconds, done = 0.0, 0.0
    for index, count in enumerate(sorted(each.num_steps for each in pending)):
        seconds += (count - done) * step_s(len(pending) - index)
        done = count
    return seconds
