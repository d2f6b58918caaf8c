"""Packing: everything once, balanced, at the right positions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlt.rl.packing import pack, pack_train_step
from tlt.types import TrainSequence


def sequence(num_prompt: int, num_response: int, offset: int = 0) -> TrainSequence:
    return TrainSequence(
        token_ids=tuple(range(offset, offset + num_prompt + num_response)),
        num_prompt_tokens=num_prompt,
        advantage=1.0,
        rollout_logprobs=tuple(-0.1 * i for i in range(num_response)),
        loss_weight=0.5,
    )


@given(
    sizes=st.lists(st.integers(2, 300), min_size=1, max_size=40),
    dp_size=st.integers(1, 5),
    max_tokens=st.integers(1, 600),
)
def test_every_sequence_is_in_exactly_one_micro_batch_within_the_limit(sizes, dp_size, max_tokens):
    sequences = [sequence(1, size - 1) for size in sizes]
    layout = pack_train_step(sequences, dp_size=dp_size, max_tokens=max_tokens)
    assert len(layout) == dp_size
    assert len({len(rank) for rank in layout}) == 1
    assert sorted(i for rank in layout for batch in rank for i in batch) == list(range(len(sizes)))
    limit = max(max_tokens, max(sizes))
    assert all(sum(sizes[i] for i in batch) <= limit for rank in layout for batch in rank)


@given(sizes=st.lists(st.integers(2, 300), min_size=8, max_size=64), dp_size=st.integers(2, 4))
def test_ranks_differ_by_no_more_than_the_longest_sequence(sizes, dp_size):
    layout = pack_train_step([sequence(1, size - 1) for size in sizes], dp_size=dp_size, max_tokens=10**6)
    loads = [sum(sizes[i] for batch in rank for i in batch) for rank in layout]
    assert max(loads) - min(loads) <= max(sizes)


def test_fields_of_a_pack_are_those_of_the_table():
    batch = pack([sequence(2, 2), sequence(1, 1, offset=50)])
    assert batch.token_ids.tolist() == [0, 1, 2, 3, 50, 51]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 6]
    assert batch.predicting.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [2, 3, 51]
    assert batch.rollout_logprobs.tolist() == pytest.approx([0, -0.1, 0])
    assert batch.loss_weights.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("multiple", [1, 2, 4, 8])
def test_filling_to_a_multiple_adds_no_response(multiple):
    batch = pack([sequence(2, 3)], multiple=multiple)
    assert len(batch.token_ids) % multiple == 0
    assert batch.cu_seqlens[-1] == len(batch.token_ids) == len(batch.position_ids)
    assert len(batch.predicting) == 3


def test_a_rank_without_sequences_gets_a_pack_without_response():
    batch = pack([], multiple=4)
    assert len(batch.token_ids) == 4
    assert len(batch.predicting) == len(batch.loss_weights) == 0
