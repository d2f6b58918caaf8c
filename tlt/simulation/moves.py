"""What a replica that is done gets of others: the product's decision (`worth_moving`), asked as its protocol asks.

An idle replica asks; each that decodes looks at its next agreed step, and the first to whom a move pays gives. One
that refused is not asked again before one of its responses ends. Not modelled: the seconds in which the store is read.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from tlt.rollout.consolidation import LOOK_STEPS, MIN_GAIN_FRAC, Pending, worth_moving
from tlt.simulation.replica import Replica


class Expectation(Protocol):
    """How long responses will be."""

    def expected_more(self, name: str, num_tokens: int) -> float:
        """Further tokens of a response that has so many."""


class KnownLengths:
    """Who knows the true lengths: a bound on what any expectation can bring."""

    def __init__(self, lengths: dict[str, int]):
        self.lengths = lengths

    def expected_more(self, name: str, num_tokens: int) -> float:
        """Further tokens of a response that has so many."""
        return float(self.lengths[name] - num_tokens)


class NoMoves:
    """Each replica ends what it began."""

    num_moved = 0

    def find(self, taker: Replica, others: Sequence[Replica]) -> Replica | None:
        """Nothing is given."""
        return None


class Moves:
    """Of one rollout."""

    def __init__(self, expectation: Expectation):
        self.expectation = expectation
        self.num_moved = 0
        self._refused: dict[int, int] = {}
        """Requests that ran in a replica when it refused."""

    def find(self, taker: Replica, others: Sequence[Replica]) -> Replica | None:
        """Move what pays to `taker`, which has nothing left; the giver, or None."""
        looks = (self._look(giver, taker.begin_s) for giver in others if self._may_give(giver))
        by_index = {giver.index: giver for giver in others}
        for time_s, index, steps in sorted(look for look in looks if look is not None):
            giver = by_index[index]
            names = self._choose(giver, steps)
            if names:
                requests = giver.give(set(names), steps=steps)
                taker.take(requests, time_s=time_s)
                self.num_moved += len(requests)
                return giver
            self._refused[giver.index] = giver.num_running
        return None

    def _may_give(self, giver: Replica) -> bool:
        """False where no lengths could make a move pay: who keeps or gets the longest response needs a step for each
        of its steps, and the giver alone would not need more than one of all its requests."""
        count = giver.num_running
        if count < 2 or self._refused.get(giver.index) == count:
            return False
        step_s = step_times(giver)
        return step_s(1) < (1 - MIN_GAIN_FRAC) * step_s(count)

    def _look(self, giver: Replica, time_s: float) -> tuple[float, int, int] | None:
        """(time, replica, steps of its stretch) of the giver's first look from then on; None where its last step runs:
        what ends with the stretch cannot move any more."""
        steps = giver.steps_until(time_s)
        if steps >= giver.stretch_steps:
            return None
        steps = min(steps + -(giver.num_steps + steps) % LOOK_STEPS, giver.stretch_steps - 1)
        return max(giver.begin_s + giver.stretch_s(steps), time_s), giver.index, steps

    def _choose(self, giver: Replica, steps: int) -> list[str]:
        """Names of those that should move after so many steps of the stretch."""
        ahead = steps * giver.tokens_per_step
        pending = []
        for end, _, request in giver.running:
            done = int(giver.done_tokens(end, request) + ahead)
            more = self.expectation.expected_more(request.name, done)
            pending.append(
                Pending(
                    name=request.name, num_tokens=request.num_prompt_tokens + done,
                    num_steps=more / giver.tokens_per_step,
                )
            )  # fmt: skip
        return worth_moving(pending, step_times(giver))


def step_times(replica: Replica) -> Callable[[float], float]:
    """Seconds of a step by requests in it, at their present contexts: what the replica would have measured lately."""
    return partial(replica.table.decode_s, context=replica.context / replica.num_running)
