"""Which kernel attention runs, and that a wrong one is found out before it trains anything."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import varlen

from tlt.policy.attention import (
    MAX_DIFFERENCE,
    all_at_once,
    fastest_kernel,
    largest_difference,
    packed_bounds,
    sequence_by_sequence,
)

pytestmark = pytest.mark.megatron
CPU = torch.device("cpu")
SHAPE = SimpleNamespace(num_attention_heads=9, num_query_groups=3, kv_channels=64, params_dtype=torch.bfloat16)


def as_one_sequence(query, key, value, bounds, scale):
    """Sees other sequences of the pack."""
    whole = packed_bounds(torch.tensor([0, len(query)], dtype=torch.int32), query.device)
    return sequence_by_sequence(query, key, value, whole, scale)


def reference(query, key, value, begins, _key_begins, longest, _longest_key, *, scale, window_size):
    """In the place of torch's, which only a GPU has."""
    assert window_size == (-1, 0)
    assert longest == int(begins.diff().max())
    assert query.shape == key.shape == value.shape, "heads of keys as many as of queries"
    return sequence_by_sequence(query, key, value, packed_bounds(begins, query.device), scale)


def test_a_cpu_takes_a_call_for_each_sequence():
    assert fastest_kernel(SHAPE, CPU) is sequence_by_sequence


def test_a_kernel_that_looks_at_other_sequences_is_found_out():
    assert largest_difference(as_one_sequence, SHAPE, CPU) > 10 * MAX_DIFFERENCE


def test_one_call_for_all_shares_keys_among_heads_as_a_call_for_each_does(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", reference)
    assert largest_difference(all_at_once, SHAPE, CPU) < MAX_DIFFERENCE
