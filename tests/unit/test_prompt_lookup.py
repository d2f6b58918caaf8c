"""Prompt lookup against a search of all suffixes and all places."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tlt.drafter.prompt_lookup import prompt_lookup


def reference(tokens: list[int], *, min_match: int, max_match: int, max_tokens: int) -> list[int]:
    """By definition."""
    size = len(tokens)
    for length in range(min(max_match, size - 1), min_match - 1, -1):
        for end in range(size - 1, length - 1, -1):  # places where an earlier occurrence could end, latest first
            if tokens[end - length : end] == tokens[size - length :]:
                text = list(tokens)
                for place in range(end, end + max_tokens):
                    text.append(text[place])  # what is drafted may itself be copied
                return text[size:]
    return []


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), max_size=40), min_match=st.integers(1, 4), extra=st.integers(0, 6),
    max_tokens=st.integers(0, 10),
)  # fmt: skip
@example(tokens=[1, 1], min_match=1, extra=3, max_tokens=5)
@example(tokens=[0, 1, 2, 0, 1], min_match=2, extra=0, max_tokens=9)
def test_lookup_finds_the_latest_place_of_the_longest_suffix(tokens, min_match, extra, max_tokens):
    options = {"min_match": min_match, "max_match": min_match + extra, "max_tokens": max_tokens}
    assert prompt_lookup(np.array(tokens, dtype=np.int32), **options).tolist() == reference(tokens, **options)


@pytest.mark.parametrize(
    ("tokens", "drafted"),
    [
        ([5, 1, 2, 8, 3, 1, 2, 9, 1, 2], [9, 1, 2]),  # the later of two places
        ([3, 1, 2, 9, 1, 2, 8, 3, 1, 2], [9, 1, 2]),  # the longer match wins over the later place
        ([7, 4, 5, 4, 5, 4, 5], [4, 5, 4]),  # a loop goes on
        ([1, 2, 3, 9, 3], []),  # one token is less than min_match
        ([], []),
        ([1], []),
    ],
)
def test_lookup_of_texts_worked_out_by_hand(tokens, drafted):
    token_ids = np.array(tokens, dtype=np.int32)
    assert prompt_lookup(token_ids, min_match=2, max_match=8, max_tokens=3).tolist() == drafted


def test_a_draft_does_not_change_with_the_text_it_came_from():
    token_ids = np.array([1, 2, 3, 1, 2], dtype=np.int32)
    drafted = prompt_lookup(token_ids, min_match=2, max_match=4, max_tokens=2)
    token_ids[:] = 0
    assert drafted.tolist() == [3, 1]
    assert drafted.dtype == np.int32
