"""Responses that change hands: replicas interleaved at every access to the store, and what a move is worth.

Real engines: tests/engine/test_consolidation.py.
"""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.engines import make_prompts
from tests.unit.turns import Store, Turns
from tlt.rollout import consolidation
from tlt.rollout.collector import ReplicaReport, in_order
from tlt.rollout.consolidation import Consolidation, Pending, decode_s, worth_moving
from tlt.rollout.handover import HandoverBoard
from tlt.rollout.resources import own_resources
from tlt.types import EngineStats, Rollout, RolloutGroup, TailReport


def part(token_ids: tuple[int, ...]) -> Rollout:
    return Rollout(token_ids=token_ids, logprobs=(0.0,) * len(token_ids), text="", finish_reason="", policy_version=0)


class FakeRequests:
    """A response of name n is the numbers from 0 to its length; each step adds one."""

    def __init__(self, lengths: dict[str, int], own: list[str]):
        self.ends = lengths
        self.made: dict[str, tuple[int, ...]] = {name: () for name in own}
        self.finished: dict[str, tuple[int, ...]] = {}

    def step(self) -> None:
        for name, tokens in list(self.made.items()):
            self.made[name] = (*tokens, len(tokens))
            if len(self.made[name]) == self.ends[name]:
                self.finished[name] = self.made.pop(name)

    def lengths(self) -> dict[str, int]:
        return {name: len(tokens) for name, tokens in self.made.items()}

    def num_known_tokens(self, name: str) -> int:
        return len(self.made[name])

    def are_decoding(self) -> bool:
        return True

    def parts(self, names) -> dict[str, Rollout]:
        return {name: part(self.made[name]) for name in names}

    def drop(self, names) -> None:
        for name in names:
            del self.made[name]

    def add(self, name: str, begun: Rollout | None = None) -> None:
        assert name not in self.made
        self.made[name] = () if begun is None else begun.token_ids


class Arbitrary(Consolidation):
    """Gives whatever, now and then."""

    random: Random

    def choose(self, lengths, requests) -> list[str]:
        names = sorted(lengths)
        return self.random.sample(names, self.random.randrange(len(names))) if names else []


class Stopped(Exception):  # noqa: N818
    """As RolloutInterrupted."""


class Replica:
    """What `VLLMRolloutEngine._run` does with its requests."""

    def __init__(self, values: dict, turns: Turns, index: int, count: int, random: Random, *, stops_after: int | None):
        store = Store(values, turns, index)
        board = HandoverBoard(store, replica=index, num_replicas=count)
        self.consolidation = Arbitrary(board, None, is_replica_leader=True)
        self.consolidation.random = random
        self.stops_after = stops_after
        self.was_stopped = False

    def is_stopped(self) -> bool:
        if self.stops_after is None:
            return False
        self.stops_after -= 1
        self.was_stopped = self.stops_after < 0
        return self.was_stopped

    def rollout(self, requests: FakeRequests) -> None:
        self.requests = requests
        self.consolidation.begin()
        try:
            self.decode()
            while self.consolidation.adopts(requests, should_stop=self.is_stopped, agree=lambda value: value):
                self.decode()
        except Stopped:
            pass
        finally:
            self.consolidation.end()

    def decode(self) -> None:
        while self.requests.made:
            if self.is_stopped():
                raise Stopped
            num_running = len(self.requests.made)
            self.consolidation.before_step(self.requests)
            self.requests.step()
            self.consolidation.after_step(
                self.requests, num_running=num_running, seconds=1.0, agree=lambda value: value
            )


def walk(seed: int, count: int, lengths: dict[str, int], owners: list[int], stops: dict[int, int]) -> list[Replica]:
    """One rollout in a random interleaving."""
    random, values = Random(seed), {}
    turns = Turns(count, random.choice)
    replicas = [
        Replica(values, turns, index, count, random, stops_after=stops.get(index)) for index in range(count)
    ]  # fmt: skip
    requests = [
        FakeRequests(lengths, [name for name, owner in zip(lengths, owners, strict=True) if owner == index])
        for index in range(count)
    ]
    turns.walk([lambda r=r, q=q: r.rollout(q) for r, q in zip(replicas, requests, strict=True)])
    assert not [key for key in values if "/gift/" in key], "what was given was taken, nothing given to one that left"
    return replicas


@pytest.fixture(autouse=True, scope="module")
def _look_at_every_step():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(consolidation, "LOOK_STEPS", 1)
        patch.setattr(consolidation, "LOOK_S", 0.0)
        yield


CASES = st.tuples(
    st.integers(0, 2**32), st.integers(1, 4), st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), max_size=7)
)


@settings(max_examples=250, deadline=None)
@given(CASES)
def test_each_response_ends_once_and_whole_whatever_the_order(case):
    seed, count, drawn = case
    lengths = {f"r{index}": length for index, (length, _) in enumerate(drawn)}
    replicas = walk(seed, count, lengths, [owner % count for _, owner in drawn], {})
    finished = [item for replica in replicas for item in replica.requests.finished.items()]
    assert sorted(name for name, _ in finished) == sorted(lengths)
    assert all(tokens == tuple(range(lengths[name])) for name, tokens in finished)


@settings(max_examples=250, deadline=None)
@given(CASES, st.dictionaries(st.integers(0, 3), st.integers(0, 12), min_size=1))
def test_no_one_hangs_where_some_are_told_to_stop(case, stops):
    seed, count, drawn = case
    lengths = {f"r{index}": length for index, (length, _) in enumerate(drawn)}
    replicas = walk(seed, count, lengths, [owner % count for _, owner in drawn], stops)
    finished = Counter(name for replica in replicas for name in replica.requests.finished)
    assert max(finished.values(), default=1) == 1
    if not any(replica.was_stopped for replica in replicas):
        assert sorted(finished) == sorted(lengths)


def test_responses_do_move_in_these_walks_and_come_back():
    moved = returned = 0
    for seed in range(40):
        replicas = walk(seed, 2, {f"r{index}": 6 + index % 3 for index in range(6)}, [0] * 6, {})
        moved += sum(replica.consolidation.num_adopted for replica in replicas)
        returned += replicas[0].consolidation.num_adopted > 0  # all were its own
    assert moved > 40
    assert returned > 0


def pending(*steps_and_tokens: tuple[float, int]) -> list[Pending]:
    return [
        Pending(name=f"r{index}", num_steps=steps, num_tokens=tokens)
        for index, (steps, tokens) in enumerate(steps_and_tokens)
    ]


def linear(size: float) -> float:
    return 0.010 + 0.001 * size


def test_decoding_together_takes_as_long_as_its_steps():
    each = pending((30, 1), (10, 1), (20, 1))
    assert decode_s(each, linear) == pytest.approx(10 * linear(3) + 10 * linear(2) + 10 * linear(1))
    assert decode_s([], linear) == 0


def test_half_of_a_crowded_replica_moves_where_steps_grow_with_their_requests():
    names = worth_moving(pending(*[(200, 50)] * 16), linear)
    assert len(names) == 7, "an eighth would be read again for longer than it saves"
    names = worth_moving(pending((400, 900), *[(100, 30)] * 11), linear)
    assert names
    assert "r0" not in names, "the longest text is read again last"


@pytest.mark.parametrize(
    ("each", "step_s"),
    [
        ([], linear),
        ([(500, 10)], linear),  # alone it would be no faster elsewhere
        ([(200, 50)] * 16, lambda size: 0.02),  # a step takes as long whatever runs in it: a GPU
        ([(200, 50)] * 16, lambda size: 0.0),  # nothing was measured yet
        ([(4, 2000)] * 8, linear),  # nearly done, and long to read
        ([(200, 50)] * 2, linear),  # 11 instead of 12 milliseconds
    ],
)
def test_nothing_moves_where_it_does_not_pay(each, step_s):
    assert worth_moving(pending(*each), step_s) == []


def report(groups: list[RolloutGroup]) -> ReplicaReport:
    return ReplicaReport(
        groups=groups, stats=EngineStats(), begin_s=0.0, end_s=1.0, tail=TailReport(), reward_stats={},
        interrupted=False, resources=own_resources(history_bytes=0),
    )  # fmt: skip


def group(prompt, samples: list[int]) -> RolloutGroup:
    rollouts = tuple(replace(part((sample,)), sample_index=sample) for sample in samples)
    return RolloutGroup(prompt=prompt, rollouts=rollouts, rewards=tuple(float(sample) for sample in samples))


def test_groups_are_put_together_from_where_their_responses_ended():
    first, second = make_prompts(2)
    reports = [report([group(second, [0, 1]), group(first, [1])]), report([]), report([group(first, [0, 2])])]
    reports.append(report([group(second, [2])]))
    groups = in_order([first, second], reports, group_size=3)
    assert [each.prompt for each in groups] == [first, second]
    for each in groups:
        assert [rollout.sample_index for rollout in each.rollouts] == [0, 1, 2]
        assert each.rewards == (0.0, 1.0, 2.0)
    for wrong in (reports[:2], [*reports, report([group(first, [1])])]):  # one lost, one twice
        with pytest.raises(RuntimeError, match="p/0: responses"):
            in_order([first, second], wrong, group_size=3)
