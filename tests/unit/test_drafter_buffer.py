"""The hidden-state buffer: bounded, two policy versions, the long responses of the older one while the newer run."""

from collections import Counter

import pytest
import torch

from tests.unit.drafter_cases import make_trainer, with_aux_states
from tlt.drafter.batch import whole
from tlt.drafter.buffer import NUM_STRATA, HiddenStateBuffer, num_bytes
from tlt.types import HiddenStateSample

HIDDEN = 32


def sample(length: int, version: int, index: int = 0) -> HiddenStateSample:
    return HiddenStateSample(
        request_id=f"{version}/{length}/{index}", token_ids=torch.full((length,), index, dtype=torch.int32),
        num_prompt_tokens=2, last_hidden_states=torch.ones(length - 1, HIDDEN), policy_version=version,
    )  # fmt: skip


LENGTHS = [4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 20, 22, 30, 50, 70, 90]


def filled(max_bytes: int = 10**9, version: int = 1) -> HiddenStateBuffer:
    buffer = HiddenStateBuffer(max_bytes, max_age=1)
    for index, length in enumerate(LENGTHS):
        buffer.add(sample(length, version, index))
    return buffer


def lengths_of(samples, version: int | None = None) -> list[int]:
    return sorted(len(s.token_ids) for s in samples if version in (None, s.policy_version))


def test_long_responses_come_from_the_version_before_until_the_present_ones_end():
    buffer = filled()
    assert lengths_of(buffer.training_samples(seed=1)) == LENGTHS
    present = [4, 5, 5, 6, 9]
    for index, length in enumerate(present):
        buffer.add(sample(length, 2, 100 + index))
    found = buffer.training_samples(seed=1)
    assert lengths_of(found, 2) == present
    old = lengths_of(found, 1)
    assert set(LENGTHS[-8:]) <= set(old), "none of the long ones is missing"
    assert len(old) == 16 - 4 - 1, "four of the shortest class and one of the second were replaced"
    assert len(set(map(id, found))) == len(found)
    assert [s.request_id for s in found] == [s.request_id for s in buffer.training_samples(seed=1)]
    assert [s.request_id for s in found] != [s.request_id for s in buffer.training_samples(seed=2)]
    for index, length in enumerate(LENGTHS):
        buffer.add(sample(length, 2, 200 + index))
    assert lengths_of(buffer.training_samples(seed=1), 1) == [], "all classes are full of new ones"


def test_versions_that_are_too_old_are_dropped():
    buffer = filled(version=1)
    buffer.add(sample(5, 2))
    buffer.add(sample(5, 3))
    assert Counter(s.policy_version for s in buffer) == {2: 1, 3: 1}
    buffer.add(sample(5, 1))  # came too late
    assert len(buffer) == 2
    assert buffer.num_dropped == 1
    assert buffer.num_bytes == sum(map(num_bytes, buffer))
    every = HiddenStateBuffer(10**9)
    for version in (1, 5, 2):
        every.add(sample(5, version))
    assert [s.policy_version for s in every] == [1, 2, 5]
    assert [s.policy_version for s in every.training_samples(seed=1)] == [5], "the one before has no longer ones"


def test_a_full_buffer_keeps_its_bound_and_its_long_responses():
    everything = filled()
    bound = everything.num_bytes * 3 // 4
    buffer = filled(bound)
    for index in range(40):
        buffer.add(sample(4, 1, 100 + index))
        assert buffer.num_bytes == sum(map(num_bytes, buffer)) <= bound
    kept = lengths_of(buffer)
    assert 90 in kept
    assert 70 in kept
    assert buffer.num_dropped == 56 - len(buffer)
    tiny = HiddenStateBuffer(100)
    tiny.add(sample(50, 1))
    assert (len(tiny), tiny.num_dropped) == (0, 1)
    closed = HiddenStateBuffer(0)
    assert not closed.is_open
    assert buffer.is_open


def test_the_older_version_makes_room_first():
    buffer = filled(filled().num_bytes)
    for length in (50, 70):
        buffer.add(sample(length, 2))
    assert lengths_of(buffer, 2) == [50, 70]
    assert lengths_of(buffer, 1) != LENGTHS


def test_a_preempted_training_leaves_the_buffer_as_it_was():
    buffer = filled()
    before = [id(s) for s in buffer]
    trainer = make_trainer(starts_per_step=16)
    trainer.micro_step_starts = 8
    chosen = [whole(s) for s in buffer.training_samples(seed=1)]
    trainer.train(chosen, progress=lambda: 0.5, should_stop=lambda: trainer.num_steps == 1)
    assert [id(s) for s in buffer] == before
    assert [s.request_id for s in buffer.training_samples(seed=1)] == [p.sample.request_id for p in chosen]


@pytest.mark.parametrize("max_bytes", [10**9, 20_000])
def test_a_buffer_is_saved_and_read_back(tmp_path, max_bytes):
    buffer = filled()
    buffer.add(sample(9, 2))
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    other = HiddenStateBuffer(max_bytes)
    other.add(sample(5, 7))
    other.load_state_dict(torch.load(tmp_path / "buffer.pt"))
    assert other.num_bytes <= max_bytes
    if max_bytes == 10**9:
        assert [s.request_id for s in other] == [s.request_id for s in buffer]
        assert [s.request_id for s in other.training_samples(seed=3)] == [
            s.request_id for s in buffer.training_samples(seed=3)
        ]
    else:
        assert 0 < len(other) < len(buffer)
        assert any(s.policy_version == 2 for s in other)


def test_states_of_three_layers_are_counted_and_kept(tmp_path):
    buffer, plain = HiddenStateBuffer(10**9), sample(9, 1)
    buffer.add(with_aux_states(plain))
    buffer.add(plain)
    assert num_bytes(plain) == 4 * (9 + 8 * HIDDEN)
    assert buffer.num_bytes == 2 * num_bytes(plain) + 4 * 8 * 3 * HIDDEN
    torch.save(buffer.state_dict(), tmp_path / "buffer.pt")
    other = HiddenStateBuffer(10**9)
    other.load_state_dict(torch.load(tmp_path / "buffer.pt"))
    first, second = other
    assert torch.equal(first.aux_hidden_states, with_aux_states(plain).aux_hidden_states)
    assert second.aux_hidden_states is None
    assert other.num_bytes == buffer.num_bytes


def test_length_classes_are_of_equal_number():
    buffer = filled()
    edges = buffer._edges(1)
    assert len(edges) == NUM_STRATA - 1
    classes = Counter(sum(length >= edge for edge in edges) for length in LENGTHS)
    assert set(classes.values()) == {4}
