"""History of responses: never above its limit, the right ones leave, and it can be saved."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlt.drafter.history import LENGTH_DECAY, LENGTH_PRIOR, PROMPT_BYTES, RESPONSE_BYTES, SuffixHistory


def contents(history: SuffixHistory, *prompt_keys: str) -> list[list[tuple[int, list[int]]]]:
    return [
        [(response.policy_version, response.token_ids.tolist()) for response in history.responses(key)]
        for key in prompt_keys
    ]


def room_for(*lengths: int, prompts: int = 1) -> int:
    return prompts * PROMPT_BYTES + sum(4 * length + RESPONSE_BYTES for length in lengths)


class Reference:
    """The same rules, recomputed from scratch at each call."""

    def __init__(self, max_bytes: int, max_age: int | None):
        self.max_bytes, self.max_age, self.clock = max_bytes, max_age, 0
        self.prompts: dict[str, int] = {}  # -> last use
        self.kept: list[tuple[int, str, int, int]] = []  # version, prompt, order of arrival, length

    @property
    def num_bytes(self) -> int:
        return room_for(*(length for *_, length in self.kept), prompts=len(self.prompts))

    def use(self, key: str) -> None:
        self.clock += 1
        self.prompts[key] = self.clock

    def add(self, key: str, length: int, version: int) -> None:
        if self.max_bytes < PROMPT_BYTES:
            return
        self.use(key)
        self.shrink()
        if room_for(length) > self.max_bytes:
            return
        self.kept.append((version, key, self.clock, length))
        self.shrink(spare=self.clock)
        if self.max_age is not None:
            newest = max(version for version, *_ in self.kept)
            self.kept = [each for each in self.kept if each[0] >= newest - self.max_age]

    def shrink(self, spare: int = -1) -> None:
        while self.num_bytes > self.max_bytes:
            old = [each for each in self.kept if each[2] != spare]
            if old:
                self.kept.remove(min(old, key=lambda each: (each[0], self.prompts[each[1]], each[2])))
            else:
                del self.prompts[min(self.prompts, key=lambda key: self.prompts[key])]


calls = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 400), st.integers(0, 2), st.none() | st.sampled_from("abc")),
    max_size=40,
)
"""(prompt that gets a response, its length, versions since the last call, prompt that is read before)."""


@settings(max_examples=200, deadline=None)
@given(calls=calls, max_bytes=st.integers(0, 8000), max_age=st.none() | st.integers(0, 3))
def test_the_limit_holds_after_every_call_and_the_right_responses_leave(calls, max_bytes, max_age):
    history, reference, version = SuffixHistory(max_bytes, max_age=max_age), Reference(max_bytes, max_age), 0
    for key, length, step, read_key in calls:
        version += step
        if read_key in reference.prompts:
            history.responses(read_key)
            reference.use(read_key)
        history.add(key, [version] * length, policy_version=version)
        reference.add(key, length, version)
        assert history.num_bytes == reference.num_bytes <= max_bytes
    for key in "abc":
        kept = [(each[0], each[3]) for each in reference.kept if each[1] == key]
        assert [(each.policy_version, len(each.token_ids)) for each in history.responses(key)] == kept


@settings(max_examples=100, deadline=None)
@given(calls=calls, max_bytes=st.integers(2000, 8000))
def test_a_saved_history_goes_on_as_the_one_it_was_saved_from(calls, max_bytes):
    history, version = SuffixHistory(max_bytes, max_age=3), 0
    for number, (key, length, step, _) in enumerate(calls):
        version += step
        history.add(key, range(length), policy_version=version)
        if number == len(calls) // 2:
            state = json.loads(json.dumps(history.state_dict(), default=lambda array: array.tolist()))
            loaded = SuffixHistory(max_bytes, max_age=3)
            loaded.add("forgotten", [1], policy_version=9)
            loaded.load_state_dict(state)
        elif number > len(calls) // 2:
            loaded.add(key, range(length), policy_version=version)
    if calls:
        assert contents(loaded, *"abc") == contents(history, *"abc")
        assert [loaded.expected_length(key) for key in "abcd"] == [history.expected_length(key) for key in "abcd"]
        assert (loaded.num_bytes, loaded.num_dropped) == (history.num_bytes, history.num_dropped)


def test_state_holds_json_types_and_numpy_arrays_only():
    history = SuffixHistory(10_000)
    history.add("a", [1, 2], policy_version=3)
    state = history.state_dict()
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    assert {name: array.dtype.kind for name, array in arrays.items()} == dict.fromkeys(arrays, "i")
    json.dumps({name: value for name, value in state.items() if name not in arrays})
    assert SuffixHistory(10_000).state_dict()["token_ids"].tolist() == []


def test_a_lower_limit_holds_after_loading():
    history = SuffixHistory(10_000)
    for version in range(4):
        history.add("a", [version] * 10, policy_version=version)
    smaller = SuffixHistory(room_for(10, 10))
    smaller.load_state_dict(history.state_dict())
    assert [version for version, _ in contents(smaller, "a")[0]] == [2, 3]
    assert smaller.num_bytes == smaller.max_bytes


def test_oldest_policy_leaves_first_then_the_prompt_used_longest_ago():
    history = SuffixHistory(room_for(1, 1, 1, prompts=3))
    history.add("a", [1], policy_version=1)
    history.add("b", [2], policy_version=1)
    history.add("c", [3], policy_version=0)
    history.add("c", [4], policy_version=1)
    assert contents(history, "c", "b", "a") == [[(1, [4])], [(1, [2])], [(1, [1])]]  # read in this order
    history.add("c", [5], policy_version=2)
    assert contents(history, "a", "b", "c") == [[(1, [1])], [], [(1, [4]), (2, [5])]]
    assert history.num_dropped == 2


def test_old_responses_leave_when_newer_ones_come():
    history = SuffixHistory(10_000, max_age=2)
    for version in (0, 1, 3):
        history.add("a", [version], policy_version=version)
    assert [version for version, _ in contents(history, "a")[0]] == [1, 3]


def test_responses_are_copies_and_read_only():
    history, tokens = SuffixHistory(10_000), np.array([1, 2], dtype=np.int32)
    history.add("a", tokens, policy_version=0)
    tokens[:] = 9
    assert contents(history, "a") == [[(0, [1, 2])]]
    with pytest.raises(ValueError, match="read-only"):
        history.responses("a")[0].token_ids[0] = 7


def test_the_limit_bounds_real_memory():
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    history = SuffixHistory(400_000)
    for number in range(2000):
        history.add(f"a-prompt-of-some-source/{number % 300:05d}", [number] * 50, policy_version=number // 100)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert history.num_dropped > 1000, "the limit was reached"
    assert after - before <= 400_000


def test_expected_length_is_a_decayed_geometric_mean_drawn_to_that_of_all():
    history = SuffixHistory(100_000)
    assert history.expected_length("a") == 0
    history.add("a", [0] * 100, policy_version=0)
    assert history.expected_length("a") == pytest.approx(100)
    assert history.expected_length("never seen") == pytest.approx(100)
    history.add("a", [0] * 400, policy_version=1)
    history.add("b", [0] * 10, policy_version=1)
    total = LENGTH_DECAY * math.log(100) + math.log(400)
    overall = (total + math.log(10)) / (LENGTH_DECAY + 2)
    expected = math.exp((total + LENGTH_PRIOR * overall) / (LENGTH_DECAY + 1 + LENGTH_PRIOR))
    assert history.expected_length("a") == pytest.approx(expected)
    assert history.expected_length("b") < history.expected_length("never seen") < history.expected_length("a")


def test_statistics_outlive_responses_and_leave_with_their_prompt():
    history = SuffixHistory(room_for(10, prompts=1))
    history.add("a", [0] * 10, policy_version=0)
    history.add("a", [0] * 1000, policy_version=1)  # larger than the limit
    assert contents(history, "a") == [[(0, [0] * 10)]]
    assert history.expected_length("a") > 100
    history.add("b", [0] * 10, policy_version=2)
    assert contents(history, "a", "b") == [[], [(2, [0] * 10)]]
    assert history.expected_length("a") == pytest.approx(10)


def test_a_limit_of_nothing_keeps_nothing():
    history = SuffixHistory(0)
    history.add("a", [1], policy_version=0)
    assert (history.num_bytes, history.expected_length("a"), history.responses("a")) == (0, 0, ())
