"""Model-free drafts of a prompt's group: what most often followed a request's last tokens, in its own text, in its
siblings, finished or not, and in responses of past iterations.

Lifecycle: one tree per group and iteration. Begin the prompt; begin each past response (`SuffixHistory`) and each
request after the prompt; per engine step append every request's new tokens, then draft; end a request when it has
finished, its text stays. A draft is a function of the order of these calls and of their tokens, nothing else.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from tlt.drafter.suffix_automaton import ROOT, Arrays, extend, follow, locate, new_arrays


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Proposed continuation of one request. K draft tokens, possibly none."""

    token_ids: np.ndarray  # [K] int32
    probs: np.ndarray  # [K] float64: estimated probability of each token, given that those before it stand
    match_length: int
    """Tokens at the request's end that were followed by something elsewhere; may be less than `min_match`."""


class SuffixTree:
    """Texts of one group, each growing on its own; amortised constant time per token, about 35 bytes per token."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._arrays = new_arrays()
        self._wholes: dict[Hashable, int] = {}  # state of each open sequence's whole text

    @property
    def num_bytes(self) -> int:
        """Memory of the tree, what is allocated ahead included."""
        return sum(array.nbytes for array in self._arrays)

    def begin(
        self, sequence_id: Hashable, token_ids: Sequence[int] | np.ndarray = (), *, after: Hashable | None = None
    ) -> None:
        """Open a sequence, at the present end of the open sequence `after` if given, whose text is shared and counts
        once. Raises ValueError if it is open already."""
        if sequence_id in self._wholes:
            raise ValueError(f"sequence {sequence_id!r} has begun and not ended")
        self._wholes[sequence_id] = ROOT if after is None else self._wholes[after]
        self.append(sequence_id, token_ids)

    def append(self, sequence_id: Hashable, token_ids: Sequence[int] | np.ndarray) -> None:
        """Extend an open sequence. Raises ValueError for a token below 0 (a rejected draft's place)."""
        tokens = np.ascontiguousarray(token_ids, dtype=np.int32)
        if len(tokens) == 0:
            return
        if tokens.min() < 0:
            raise ValueError(f"sequence {sequence_id!r}: token ids must be at least 0, got {tokens.min()}")
        sizes, whole = self._arrays.sizes, self._wholes[sequence_id]
        states, counts, edges, table, whole = extend(*self._arrays, whole, tokens)
        self._arrays = Arrays(states=states, counts=counts, edges=edges, table=table, sizes=sizes)
        self._wholes[sequence_id] = whole
        self.num_tokens += len(tokens)

    def end(self, sequence_id: Hashable) -> None:
        """Close a sequence; its text stays."""
        del self._wholes[sequence_id]

    def draft(
        self, sequence_id: Hashable, max_tokens: int, *, min_match: int = 1, tokens_per_match: float = 2.0,
        min_prob: float = 0.2,
    ) -> Draft:  # fmt: skip
        """Follow the sequence's longest suffix that was followed by something, by the most frequent token each time.

        At most `max_tokens` and `tokens_per_match` for each matched token; ends before the estimated probability that
        the whole draft stands would fall below `min_prob`, and where fewer than `min_match` tokens match. Of equally
        frequent tokens the one that followed for the first time last is taken.
        """
        token_ids, probs = np.empty(max_tokens, dtype=np.int32), np.empty(max_tokens)
        states, counts, edges, _, _ = self._arrays
        num_tokens, match_length = follow(
            states, counts, edges, self._wholes[sequence_id], token_ids, probs, min_match, tokens_per_match, min_prob
        )
        return Draft(token_ids=token_ids[:num_tokens], probs=probs[:num_tokens], match_length=match_length)

    def count(self, token_ids: Sequence[int] | np.ndarray) -> int:
        """Places where this string of at least one token ends."""
        states, counts, edges, table, _ = self._arrays
        state = locate(states, edges, table, np.ascontiguousarray(token_ids, dtype=np.int32))
        return int(counts[state]) if state != ROOT else 0
