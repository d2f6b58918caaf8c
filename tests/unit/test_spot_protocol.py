"""The protocol of idle ranks: `use_tail` itself on three and four ranks, in every order of what they see and do.

Ranks are threads that take turns: one goes on until its next access to the store, its next micro-step, the end of its
next rollout. What they do is checked against rollouts' ends as the walk itself knows them, never against the board.
Real processes and delays: tests/distributed/test_spot_ranks.py. Not covered: a rank that dies.
"""

import os
import re
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.drafter_cases import make_sample
from tests.unit.test_opportunity import record_of
from tests.unit.turns import Move, Store, Turns
from tlt.config import SpotConfig
from tlt.spot import training
from tlt.spot.board import TailBoard
from tlt.spot.opportunity import MAX_INTERVAL, SESSIONS
from tlt.spot.rank_state import Event, RankState
from tlt.spot.training import SpotTraining, is_held_out
from tlt.trace import NoTrace
from tlt.types import TailReport

SAMPLE = next(
    sample for sample in (make_sample(9, 3, seed=seed) for seed in range(9))
    if not is_held_out(sample, every=SpotConfig().held_out_every)
)  # fmt: skip
REAL = (SpotTraining, TailBoard)


@pytest.fixture(autouse=True, scope="module")
def _one_core():
    """One thread runs at a time: to wake it on another core may take several times as long as what it does."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What may happen."""

    num_ranks: int
    num_rollouts: int = 1
    is_due: bool = True
    lack_samples: frozenset[int] = frozenset()
    most_steps: int = 2
    """Micro-steps that a rank makes at most while others decode; further ones would meet nothing else."""
    fails: Mapping[int, int] | None = None
    """Micro-step of a rank at which its trainer raises, 0: as it begins; None: whenever the order has it, or never."""
    stops: Mapping[int, int] = field(default_factory=dict)
    """A rank is told to stop after it asked so often whether it was."""
    tells: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    """Seconds that a rank says it will still decode; a first optimizer step takes 1."""
    num_turns: Mapping[int, int] = field(default_factory=dict)
    """Turns that a rank decodes for before it says so and before it ends, at least."""
    is_whole: bool = False
    """Each access is a turn, what ranks expect to decode included, and rollouts end with a meeting."""


class Engine:
    """Part of the engine that is asked for."""

    drafter_version = 0

    def __init__(self, case: Case, index: int):
        self.policy_version = SESSIONS + MAX_INTERVAL * case.is_due
        self.samples = [] if index in case.lack_samples else [SAMPLE]

    def training_samples(self, *, seed: int) -> list:
        return self.samples

    def hidden_state_samples(self) -> list:
        return self.samples

    def drafter_tensors(self) -> dict:
        return {}


class WatchedStore(Store):
    """The end of a rollout and the access that follows are one turn: no one can tell them apart."""

    def __init__(self, values: dict, world: "World", index: int):
        super().__init__(values, world.turns, index)
        self.world = world
        self.has_turn = False

    def turn(self, key: str) -> None:
        if self.has_turn:
            self.has_turn = False
        elif self.world.case.is_whole or "ended" in key:  # else all that is ever read there is 0
            super().turn(key)

    def add(self, key: str, amount: int) -> int:
        value = super().add(key, amount)
        self.world.accessed(self.index)
        return value


class Learner:
    """As HeadLearner: asks before the first micro-step and after each."""

    def __init__(self, world: "World", index: int):
        self.world, self.index = world, index

    def train(self, samples, *, should_stop: Callable[[], bool], on_step: Callable[[], None]) -> None:
        try:
            self.world.joins(self.index)
            while not should_stop():
                self.world.steps(self.index)
                on_step()
        finally:
            self.world.training.discard(self.index)

    def average(self, sum_in_place, *others, weight: float) -> None:
        total = torch.tensor(weight)
        sum_in_place(total)
        self.world.check(float(total) == pytest.approx(1), "weights are no mean")

    def score(self, pieces, tensors, *, should_stop=None) -> torch.Tensor:
        return torch.zeros(len(pieces), dtype=torch.float64)

    def published(self) -> dict:
        return {}


class Parallel:
    """Ranks that meet wait for each other."""

    def __init__(self, world: "World", index: int):
        self.world, self.rank = world, index
        self.num_meetings = 0

    def all_gather_objects(self, value) -> list:
        values = self.world.told.setdefault(self.num_meetings, {})
        self.num_meetings += 1
        values[self.rank] = value
        self.world.turns.wait(self.rank, ("meet",), is_ready=lambda: len(values) == self.world.case.num_ranks)
        return [values[rank] for rank in sorted(values)]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.all_gather_objects(values)).sum(0)

    def sum_in_place(self, values: torch.Tensor) -> None:
        values.copy_(self.sum(values.clone()))


class World:
    """Ranks that decode, use their tails and meet; what they did wrong is written to `wrongs`, since a failure inside
    a trainer is one that they survive."""

    def __init__(self, case: Case, choose: Callable[["World", list[Move]], Move | None], kinds: tuple[type, type]):
        spot, board = kinds
        ranks = range(case.num_ranks)
        self.case = case
        self.turns = Turns(case.num_ranks, lambda moves: None if self.wrongs else choose(self, moves))
        self.values: dict[str, int] = {}
        self.wrongs: list[str] = []
        self.met: set[str] = set()
        """Situations that came up."""
        self.told: dict[int, dict] = {}
        """By each rank at each meeting."""
        self.asked = [0] * case.num_ranks
        self.num_back = 0
        self.num_steps = [0] * case.num_ranks
        """Micro-steps of each rank's life."""
        self.unshared = [0] * case.num_ranks
        """Those that the next average will have."""
        self.expected: dict[str, float] = {}
        self.raised: set[int] = set()
        self.reported: list[int] = []
        self.stopped: set[int] = set()
        self.training: set[int] = set()
        self.heard: list[list] = [[] for _ in ranks]
        """What the board answered a rank in this tail."""
        self.begin()
        self.stores = [WatchedStore(self.values, self, rank) for rank in ranks]
        self.spots = [
            spot(
                Learner(self, rank), Engine(case, rank),
                self.listening(board(self.stores[rank], rank=rank, world_size=case.num_ranks), rank),
                Parallel(self, rank), config=SpotConfig(max_age=999), trace=NoTrace(),
                is_stopped=lambda rank=rank: self.is_stopped(rank),
            )
            for rank in ranks
        ]  # fmt: skip
        for each in self.spots:
            each.gains = record_of([0.0] * SESSIONS)
            each.switch.observe(1.0)

    def begin(self) -> None:
        """A rollout begins."""
        count = self.case.num_ranks
        self.decoding = set(range(count))
        self.num_accesses, self.steps_here, self.steps_late = [0] * count, [0] * count, [0] * count
        self.last: int | None = None

    def listening(self, board: TailBoard, index: int) -> TailBoard:
        def noting(ask):
            def answer():
                self.heard[index].append(ask())
                return self.heard[index][-1]

            return answer

        board.all_ended, board.remaining_s = noting(board.all_ended), noting(board.remaining_s)
        return board

    def check(self, is_right: bool, wrong: str) -> None:
        if not is_right:
            self.wrongs.append(wrong)

    @property
    def is_drained(self) -> bool:
        """The last rollout ended, and its rank had the one access it takes to say so, or two where it told more."""
        return not self.decoding and all(
            count >= 1 + bool(self.case.tells.get(rank)) for rank, count in enumerate(self.num_accesses)
        )

    def accessed(self, index: int) -> None:
        if index not in self.decoding and not self.is_drained:
            self.num_accesses[index] += 1
            self.last = index if self.is_drained else None

    def is_stopped(self, index: int) -> bool:
        self.asked[index] += 1
        if self.asked[index] > self.case.stops.get(index, self.asked[index]):
            self.stopped.add(index)
        return index in self.stopped

    def joins(self, index: int) -> None:
        self.check(index not in self.decoding, "trains while it decodes")
        self.check(index not in self.raised, "trains although its trainer raised")
        self.check(index != self.last, "trains although all had ended as it looked")
        self.check(self.case.is_due, "trains although it is not due")
        self.check(index not in self.case.lack_samples, "trains on nothing")
        self.check(self.spots[index].rank.state is RankState.TRAINING, "trains and does not say so")
        self.met |= {f"joins {len(self.training)} others"}
        self.met |= {"drained between look and training"} if self.is_drained else set()
        self.training.add(index)
        if self.case.fails is not None and self.case.fails.get(index) == 0:
            self.raises(index)

    def steps(self, index: int) -> None:
        """One micro-step."""
        moves = ("step", "raise") if self.case.fails is None else ("step",)
        self.num_steps[index] += 1
        move = self.turns.wait(
            index, moves, is_ready=lambda: self.is_drained or self.steps_here[index] < self.case.most_steps
        )
        self.steps_here[index] += 1
        self.steps_late[index] += self.is_drained
        self.check(self.steps_late[index] <= 1, "a second micro-step after the drain")
        self.check(index not in self.decoding, "a micro-step while it decodes")
        self.met |= {"a micro-step after the drain"} if self.is_drained else set()
        if move == "raise" or (self.case.fails is not None and self.case.fails.get(index) == self.num_steps[index]):
            self.raises(index)
        self.unshared[index] += 1

    def raises(self, index: int) -> None:
        self.raised.add(index)
        self.unshared[index] = 0
        self.met |= {f"raises beside {len(self.training) - 1}", f"{len(self.raised)} failed"}
        raise ArithmeticError("a micro-step went wrong")

    def comes_back(self, index: int, report: TailReport) -> None:
        has_failed, is_excused = index in self.raised, index in self.raised | self.stopped | self.case.lack_samples
        self.met |= {"stopped before the drain"} if index in self.stopped and self.decoding else set()
        self.check(not self.decoding or is_excused or not self.case.is_due, "back before the drain")
        self.check(self.spots[index].rank.state is RankState.BACK, "back and does not say so")
        self.check(report.has_failed == has_failed, "a failure is not in the report")
        self.check(self.reported.count(index) == has_failed, "a failure is not logged once")
        self.check(report.num_steps == (0 if has_failed else self.steps_here[index]), "steps are not counted")
        self.met |= {"too short"} if report.was_too_short else set()
        self.heard[index].clear()
        self.num_back += 1
        if self.num_back % self.case.num_ranks == 0:
            self.expected = {"spot/steps": float(sum(self.unshared)), "spot/failed_ranks": float(len(self.raised))}
            self.unshared = [0] * self.case.num_ranks
            self.begin()

    def decodes(self, index: int) -> None:
        for _ in range(self.case.num_turns.get(index, 0)):
            self.turns.wait(index)

    def run(self, index: int) -> None:
        spot = self.spots[index]
        for rollout in range(self.case.num_rollouts):
            spot.begin()
            for seconds in self.case.tells.get(index, ()):
                self.decodes(index)
                spot.board.tell_remaining(seconds)
            self.decodes(index)
            self.turns.wait(index, ("end",))
            self.check(spot.rank.state is RankState.ROLLOUT, "decodes and does not say so")
            self.decoding.discard(index)
            self.stores[index].has_turn = True
            self.comes_back(index, spot.use_tail())
            if self.case.is_whole:
                metrics = spot.publish()
                self.check(self.expected.items() <= metrics.items(), f"published {metrics}, not {self.expected}")
            elif rollout + 1 < self.case.num_rollouts:
                due_back = (rollout + 1) * self.case.num_ranks
                self.turns.wait(index, ("meet",), is_ready=lambda due_back=due_back: self.num_back >= due_back)
                spot.num_steps = 0  # as `publish` leaves it

    def walk(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            clock = SimpleNamespace(perf_counter=lambda: 0.0, time=lambda: 0.0, sleep=lambda seconds: None)
            patch.setattr(training, "time", clock)
            patch.setattr(training, "logger", SimpleNamespace(exception=lambda text, rank: self.reported.append(rank)))
            try:
                self.turns.walk([lambda rank=rank: self.run(rank) for rank in range(self.case.num_ranks)])
            except Exception as error:  # noqa: BLE001 - a wrong like the others
                self.wrongs.append(repr(error))

    def state(self) -> tuple:
        """All that the rest depends on, whichever rank is which: what a rank does follows from what it heard."""
        return (
            str(sorted(item for item in self.values.items() if "ended" in item[0])),
            *sorted(map(self.state_of, range(self.case.num_ranks))),
        )

    def state_of(self, rank: int) -> str:
        spot, turns = self.spots[rank], self.turns
        return str((
            spot.rank.state.value, spot.board.rollout, spot.has_failed, spot.num_steps,
            self.heard[rank], turns.asked[rank][0], rank in turns.running, rank in self.decoding,
            rank in self.training, rank in self.raised, self.reported.count(rank), self.last == rank,
            self.num_accesses[rank] > 0, self.steps_here[rank], self.steps_late[rank], rank in self.case.lack_samples,
            self.asked[rank] if rank in self.case.stops else None,
        ))  # fmt: skip


@dataclass
class Found:
    wrongs: list[str] = field(default_factory=list)
    """Of the first walk that had any."""
    met: set[str] = field(default_factory=set)
    states: set[tuple] = field(default_factory=set)
    num_walks: int = 0
    num_ends: int = 0


def explored(case: Case, *, spot: type[SpotTraining] = SpotTraining, board: type[TailBoard] = TailBoard) -> Found:
    """Every order: each walk goes on from a state with a move that none made there, until one that others met."""
    assert (case.is_whole, case.fails, case.tells) == (False, None, {}), "states do not tell these apart"
    found = Found()
    ahead: deque[tuple[Move, ...]] = deque([()])  # first in, first out: walks that part early find faults soonest
    while ahead and not found.wrongs:
        begun, path = ahead.popleft(), []

        def choose(world: World, moves: list[Move], begun=begun, path=path) -> Move | None:
            move = moves[0]
            if len(path) < len(begun):
                move = begun[len(path)]
            else:
                state = world.state()
                if state in found.states:
                    return None
                found.states.add(state)
                ahead.extend((*path, each) for each in moves[1:])
            path.append(move)
            return move

        world = World(case, choose, (spot, board))
        world.walk()
        found.num_walks += 1
        found.num_ends += not world.turns.was_left
        found.met |= world.met
        found.wrongs = [f"{wrong}: {path}" for wrong in world.wrongs]
    return found


@pytest.mark.parametrize(
    ("case", "least"),
    [
        (Case(num_ranks=3), 400),
        (Case(num_ranks=3, num_rollouts=2, most_steps=1), 700),
        (Case(num_ranks=4, most_steps=1), 1000),
        pytest.param(Case(num_ranks=4), 3000, marks=pytest.mark.slow),
        pytest.param(Case(num_ranks=4, num_rollouts=2, most_steps=1), 4000, marks=pytest.mark.slow),
        (Case(num_ranks=4, most_steps=1, lack_samples=frozenset({1, 2})), 200),
    ],
)
def test_every_order_ends_and_nothing_trains_for_long_after_the_drain(case, least):
    found = explored(case)
    assert not found.wrongs
    assert found.num_ends > 0
    assert len(found.states) >= least
    trainers = case.num_ranks - len(case.lack_samples)
    most = trainers - (not case.lack_samples)  # the last one has no tail
    assert found.met >= {
        "a micro-step after the drain", *(f"joins {count} others" for count in range(most)),
        *(f"raises beside {count}" for count in range(most)), *(f"{count} failed" for count in range(1, most + 1)),
    }  # fmt: skip
    assert f"joins {most} others" not in found.met


def test_no_order_hangs_where_a_rank_is_told_to_stop():
    found = [explored(Case(num_ranks=3, most_steps=1, stops={1: num_asked})) for num_asked in range(5)]
    assert not [wrong for each in found for wrong in each.wrongs]
    assert sum("stopped before the drain" in each.met for each in found) >= 3, "as it looks, joins or trains"


@pytest.mark.parametrize("num_ranks", [3, 4])
def test_no_order_trains_where_training_is_not_due(num_ranks):
    found = explored(Case(num_ranks=num_ranks, num_rollouts=2, is_due=False))
    assert not found.wrongs
    assert not found.met


def test_states_that_are_not_walked_again_are_all_there_are():
    """Walks that are never cut short come to no state that the exploration does not know."""
    case, random = Case(num_ranks=3, num_rollouts=2, most_steps=1), Random(1)
    states = explored(case).states
    for _ in range(300):
        came: set[tuple] = set()
        world = World(case, lambda world, moves, came=came: (came.add(world.state()), random.choice(moves))[1], REAL)
        world.walk()
        assert not world.wrongs
        assert came <= states


RANKS = st.integers(0, 3)
CASES = st.builds(
    Case, num_ranks=st.integers(2, 4), num_rollouts=st.integers(1, 3), is_due=st.integers(0, 4).map(bool),
    lack_samples=st.frozensets(RANKS, max_size=2), most_steps=st.integers(1, 4),
    fails=st.dictionaries(RANKS, st.integers(0, 5)), stops=st.dictionaries(RANKS, st.integers(0, 8), max_size=2),
    num_turns=st.dictionaries(RANKS, st.integers(0, 30)),
    tells=st.dictionaries(RANKS, st.lists(st.sampled_from([0.1, 5.0]), min_size=1, max_size=3).map(tuple)),
    is_whole=st.just(True),
)  # fmt: skip


def walked(case: Case, seed: int, kinds: tuple[type, type] = REAL) -> World:
    random = Random(seed)
    world = World(case, lambda world, moves: random.choice(moves), kinds)
    world.walk()
    return world


@settings(max_examples=300, deadline=None)
@given(CASES, st.integers(0, 2**32))
def test_rollouts_that_meet_and_tell_how_long_they_last_end_too(case, seed):
    assert not walked(case, seed).wrongs


USUAL = Case(
    num_ranks=3, num_rollouts=2, tells={2: (0.1, 5.0)}, num_turns={2: 6}, fails={0: 2}, stops={1: 9}, is_whole=True
)


def test_in_such_rollouts_all_situations_come_up():
    met = set().union(*(walked(USUAL, seed).met for seed in range(60)))
    assert met >= {
        "drained between look and training", "a micro-step after the drain", "too short", "raises beside 1",
        "stopped before the drain",
    }  # fmt: skip


class NeverOver(TailBoard):
    def all_ended(self) -> bool:
        return super().all_ended() and False


class OverTooEarly(TailBoard):
    def all_ended(self) -> bool:
        return self.store.add(self._key, 0) >= self.world_size - 1


class OneCounter(TailBoard):
    def begin(self) -> None:
        """Counts on where the last rollout's marks are."""


class Deaf(SpotTraining):
    """Never looks while it trains."""

    def _is_over(self) -> bool:
        return self.rank.state is not RankState.TRAINING and super()._is_over()


class HardOfHearing(SpotTraining):
    """Looks after every second micro-step."""

    num_looks = 0

    def _is_over(self) -> bool:
        self.num_looks += self.rank.state is RankState.TRAINING
        return self.num_looks % 2 == 0 and super()._is_over()


class Unasked(SpotTraining):
    """Begins without a look."""

    def _is_over(self) -> bool:
        return self.rank.state is RankState.TRAINING and super()._is_over()


class SilentOnceFailed(SpotTraining):
    def use_tail(self) -> TailReport:
        if self.has_failed:
            self.board.ended = lambda: None
        return super().use_tail()


class MarksAsItLeaves(SpotTraining):
    def use_tail(self) -> TailReport:
        ended, self.board.ended = self.board.ended, lambda: None
        report = super().use_tail()
        self.board.ended = ended
        ended()
        return report


class MarksItsFailure(SpotTraining):
    """Once more, as if it left only then."""

    def _train(self, begin_s: float) -> None:
        super()._train(begin_s)
        if self.has_failed:
            self.board.ended()


class Reckless(SpotTraining):
    def _train(self, begin_s: float) -> None:
        def count() -> None:
            self.num_steps += 1

        self.rank.on(Event.TRAINING_BEGAN)
        self.learner.train([SAMPLE], should_stop=self._is_over, on_step=count)
        self.rank.on(Event.TRAINING_ENDED)


class Forgetful(SpotTraining):
    """Trains again in the next rollout."""

    def begin(self) -> None:
        super().begin()
        self.has_failed = False


class Secretive(SpotTraining):
    def use_tail(self) -> TailReport:
        return replace(super().use_tail(), has_failed=False)


class Impatient(SpotTraining):
    def begin(self) -> None:
        super().begin()
        self.learner.train([SAMPLE], should_stop=lambda: True, on_step=lambda: None)


class Eager(SpotTraining):
    def begin(self) -> None:
        super().begin()
        self.gains = record_of([])


class Undecided(SpotTraining):
    """Takes a transition that the table does not have."""

    def _train(self, begin_s: float) -> None:
        self.rank.on(Event.TRAINING_BEGAN)
        self.rank.on(Event.LEFT_TAIL)


MUTANTS = [
    (NeverOver, {}, "trains although all had ended|second micro-step"),
    (OverTooEarly, {}, "back before the drain"),
    (OneCounter, {"num_rollouts": 2}, "second micro-step"),
    (Deaf, {}, "second micro-step"),
    (HardOfHearing, {}, "second micro-step"),
    (Unasked, {}, "trains although all had ended"),
    (SilentOnceFailed, {"num_rollouts": 2}, "second micro-step|wait for ever"),
    (MarksAsItLeaves, {}, "second micro-step|wait for ever"),
    (MarksItsFailure, {}, "trains although all had ended|back before the drain"),
    (Reckless, {}, "a micro-step went wrong"),
    (Forgetful, {"num_rollouts": 2}, "trains although its trainer raised"),
    (Secretive, {}, "a failure is not in the report"),
    (Impatient, {}, "trains while it decodes"),
    (Eager, {"is_due": False}, "trains although it is not due"),
    (Undecided, {}, "cannot take the event"),
]


@pytest.mark.parametrize("num_ranks", [3, 4])
@pytest.mark.parametrize(("mutant", "case", "wrong"), MUTANTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_protocol_is_found(mutant, case, wrong, num_ranks):
    kind = "board" if issubclass(mutant, TailBoard) else "spot"
    found = explored(Case(num_ranks=num_ranks, **{"most_steps": 1} | case), **{kind: mutant})
    assert re.search(wrong, found.wrongs[0]), found.wrongs[:1]


class CountsItsFailure(SpotTraining):
    def publish(self) -> dict[str, float]:
        self.num_steps += self.has_failed
        return super().publish()


class StaysAway(SpotTraining):
    """From where ranks meet, once its trainer failed."""

    def publish(self) -> dict[str, float]:
        return {} if self.has_failed else super().publish()


@pytest.mark.parametrize(
    ("mutant", "wrong"), [(CountsItsFailure, "published"), (StaysAway, "published|wait for ever")]
)
def test_a_broken_meeting_is_found(mutant, wrong):
    wrongs = [each for seed in range(60) for each in walked(USUAL, seed, (mutant, TailBoard)).wrongs]
    assert any(re.search(wrong, each) for each in wrongs), wrongs
