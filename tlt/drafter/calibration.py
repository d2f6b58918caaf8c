"""From a drafter's own confidence to the probability that its token stands, learned from verified drafts.

A suffix tree counts occurrences and a head has a softmax; neither is the probability that the policy draws the token.
Counts of what stood, by cells of (kind, confidence), make them so. Pure functions of what was verified.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np

EDGES = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.995)
CONFIDENCE_EDGES = np.array(EDGES)
"""Borders of the confidence cells."""
NUM_CONFIDENCES = len(EDGES) + 1
PRIOR_WEIGHT = 6.0
"""Verified tokens that a cell's prior counts for."""
DECAY = 0.998
"""What a cell's past weighs after one more token of that cell: about 500 tokens count."""


class Calibration:
    """[kinds, confidence cells] table of tokens that were decided on and that stood, with a prior for each cell.

    Lists, not arrays: a verification touches a few cells one by one, which arrays are slow at.
    """

    def __init__(self, prior: np.ndarray):
        self.prior = prior.tolist()  # [kinds][confidence cells]
        self.decided = np.zeros_like(prior).tolist()
        self.stood = np.zeros_like(prior).tolist()
        self._table: np.ndarray | None = None
        """Made when it is asked for: several times in an engine step, between whose verifications nothing changes."""

    def estimate(self, kinds: np.ndarray, confidences: np.ndarray) -> np.ndarray:
        """Probability that a token stands if those before it do; arrays of one shape."""
        return self.table()[kinds, np.searchsorted(CONFIDENCE_EDGES, confidences, side="right")]

    def table(self) -> np.ndarray:
        """[kinds, confidence cells] estimates, to be read only."""
        if self._table is None:
            prior, decided, stood = np.array([self.prior, self.decided, self.stood])
            self._table = (stood + PRIOR_WEIGHT * prior) / (decided + PRIOR_WEIGHT)
        return self._table

    def observe(self, kinds: Sequence[int], confidences: Sequence[float], num_stood: int) -> float:
        """One verified draft: its first `num_stood` tokens stood, the next did not, the others were not decided on.

        Returns how many tokens were expected to stand of those decided on.
        """
        self._table = None
        expected = 0.0
        for position in range(min(num_stood + 1, len(kinds))):
            kind, cell = kinds[position], bisect_right(EDGES, confidences[position])
            decided, stood = self.decided[kind][cell], self.stood[kind][cell]
            expected += (stood + PRIOR_WEIGHT * self.prior[kind][cell]) / (decided + PRIOR_WEIGHT)
            self.decided[kind][cell] = DECAY * decided + 1
            self.stood[kind][cell] = DECAY * stood + (position < num_stood)
        return expected

    def state_dict(self) -> dict:
        """JSON types."""
        return {"decided": self.decided, "stood": self.stood}

    def load_state_dict(self, state: Mapping) -> None:
        """Go on with the counts of a table of the same kinds."""
        self._table = None
        self.decided, self.stood = ([[*row] for row in state[name]] for name in ("decided", "stood"))

    def doubt(self, share: float) -> None:
        """Let what was learned weigh only `share` of what it does: the drafter or the policy has changed."""
        self._table = None
        for table in (self.decided, self.stood):
            table[:] = [[value * share for value in row] for row in table]


def cell_centres() -> np.ndarray:
    """[confidence cells]: the middle of each."""
    edges = np.concatenate([[0.0], CONFIDENCE_EDGES, [1.0]])
    return (edges[:-1] + edges[1:]) / 2
