"""One rollout of the world: replicas decode, idle ones take over responses or train, until the last one is done."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from tlt.rollout.outlook import Outlook
from tlt.simulation.moves import Moves, NoMoves
from tlt.simulation.replica import Replica, Request
from tlt.simulation.step_table import StepTable
from tlt.spot.opportunity import SwitchCost


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one rollout; R replicas."""

    duration_s: float
    ends_s: tuple[float, ...]  # [R] when each had nothing left
    num_tokens: int
    num_requests: int
    num_moved: int
    tokens_per_step: float
    """Of a request: the acceptance length, steps without drafts included."""
    peak_context: float
    """Tokens of context at most in one replica."""
    train_s: tuple[float, ...] = field(default=())
    """[R] seconds in which an idle replica trained."""

    @property
    def tail_s(self) -> float:
        """Between the first replica's end and the last one's."""
        return self.duration_s - min(self.ends_s)

    @property
    def idle_frac(self) -> float:
        """Of all replicas' seconds, those after their own end."""
        if self.duration_s == 0:
            return 0.0
        return sum(self.duration_s - end_s for end_s in self.ends_s) / (len(self.ends_s) * self.duration_s)

    @property
    def used_frac(self) -> float:
        """Share of the idle seconds in which replicas trained."""
        idle_s = sum(self.duration_s - end_s for end_s in self.ends_s)
        return sum(self.train_s) / idle_s if idle_s > 0 else 0.0


class NoTraining:
    """Idle replicas wait."""

    def idle(self, replica: Replica, others: Sequence[Replica]) -> None:
        """Nothing is begun."""

    def train_s(self, duration_s: float, count: int) -> tuple[float, ...]:
        """Nothing was trained."""
        return ()


class TailTraining:
    """Idle replicas train where the expected rest of the rollout is worth the switch (`SwitchCost`).

    Expected is what the decoding replicas would tell: their longest response's further tokens at the present rate. A
    replica that found the rest too short does not look again, as the rest only gets shorter.
    """

    def __init__(self, outlook: Outlook, switch: SwitchCost):
        self.outlook = outlook
        self.switch = switch
        self.begun_s: dict[int, float] = {}
        self._told: dict[int, tuple[int, float]] = {}

    def idle(self, replica: Replica, others: Sequence[Replica]) -> None:
        """A replica is done; the others decode."""
        now_s = replica.begin_s
        remaining_s = max((self._tells_end_s(other) - now_s for other in others), default=0.0)
        if others and self.switch.fits(remaining_s if len(self.outlook.past) else None):
            self.begun_s[replica.index] = now_s

    def _tells_end_s(self, replica: Replica) -> float:
        """When a replica expects its longest response to end, as it told at the beginning of its stretch."""
        if replica.index not in self._told or self._told[replica.index][0] != replica.num_steps:
            more = max(
                self.outlook.expected_more(request.name, int(replica.done_tokens(end, request)))
                for end, _, request in replica.running
            )
            step_s = replica.stretch_s(1)
            self._told[replica.index] = replica.num_steps, replica.begin_s + more * step_s / replica.tokens_per_step
        return self._told[replica.index][1]

    def train_s(self, duration_s: float, count: int) -> tuple[float, ...]:
        """[R] seconds of training, from the first optimizer step's beginning on."""
        begun_s = {index: begin_s + self.switch.seconds for index, begin_s in self.begun_s.items()}
        return tuple(max(duration_s - begun_s[index], 0.0) if index in begun_s else 0.0 for index in range(count))


def roll_out(
    table: StepTable, requests: Sequence[Sequence[Request]], *, moves: Moves | NoMoves,
    training: TailTraining | NoTraining, begin_s: Sequence[float] | None = None,
) -> Outcome:  # fmt: skip
    """Of the requests of each replica, in the order in which they begin; `begin_s` [R] is when each replica can begin
    to read prompts."""
    replicas = [
        Replica(index, table, list(own), begin_s=begin_s[index] if begin_s else 0.0)
        for index, own in enumerate(requests)
    ]
    decoding = {replica.index: replica for replica in replicas}
    ends_s = [0.0] * len(replicas)
    num_done = 0
    events = [(replica.end_s, replica.index) for replica in replicas]
    heapq.heapify(events)
    while events:
        time_s, index = heapq.heappop(events)
        replica = replicas[index]
        if index not in decoding or time_s != replica.end_s:
            continue  # its stretch was cut short
        num_done += len(replica.finish()) if replica.running else 0
        if not replica.running:
            del decoding[index]
            ends_s[index] = replica.begin_s
            giver = moves.find(replica, list(decoding.values()))
            if giver is None:
                training.idle(replica, list(decoding.values()))
                continue
            heapq.heappush(events, (giver.end_s, giver.index))
            decoding[index] = replica
        heapq.heappush(events, (replica.end_s, index))
    duration_s = max(ends_s)
    num_tokens, request_steps = (
        sum(getattr(replica, name) for replica in replicas) for name in ("num_tokens", "request_steps")
    )
    return Outcome(
        duration_s=duration_s, ends_s=tuple(ends_s), num_tokens=num_tokens, num_requests=num_done,
        num_moved=moves.num_moved, tokens_per_step=num_tokens / request_steps if request_steps else 0.0,
        peak_context=max(replica.peak_context for replica in replicas),
        train_s=training.train_s(duration_s, len(replicas)),
    )  # fmt: skip
