"""Prompt lookup: what followed a request's last tokens where they occurred before, in its own text."""

import numpy as np


def prompt_lookup(token_ids: np.ndarray, *, min_match: int, max_match: int, max_tokens: int) -> np.ndarray:
    """[K] tokens behind the latest earlier occurrence of the longest suffix, min_match to max_match tokens, of [S].

    The occurrence may overlap the suffix; where it is so near the end that fewer than `max_tokens` follow, these are
    repeated (a loop goes on). K is 0 where nothing matches. One pass over S, then over places that still match.
    """
    size = len(token_ids)
    if size < 2:
        return token_ids[:0].copy()
    ends = np.flatnonzero(token_ids[:-1] == token_ids[-1])  # where occurrences of the suffix end
    length = 1 if len(ends) else 0
    while length and length < max_match:
        longer = ends[ends >= length]
        longer = longer[token_ids[longer - length] == token_ids[size - 1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    if length < max(min_match, 1) or max_match < 1:
        return token_ids[:0].copy()
    return np.resize(token_ids[ends[-1] + 1 :], max_tokens)
