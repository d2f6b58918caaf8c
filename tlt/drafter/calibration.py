"""From a drafter's own confidence to the probability that its token stands, learned from verified drafts.

A suffix tree counts occurrences and a head has a softmax; neither is the probability that the policy draws the token.
Counts of what stood, by cells of (kind, confidence), make them so. Pure functions of what was verified.
"""

import numpy as np

CONFIDENCE_EDGES = np.array([0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 0.995])
"""Borders of the confidence cells."""
NUM_CONFIDENCES = len(CONFIDENCE_EDGES) + 1
PRIOR_WEIGHT = 6.0
"""Verified tokens that a cell's prior counts for."""
DECAY = 0.998
"""What a cell's past weighs after one more token of that cell: about 500 tokens count."""


class Calibration:
    """[kinds, confidence cells] table of tokens that were decided on and that stood, with a prior for each cell."""

    def __init__(self, prior: np.ndarray):
        self.prior = prior  # [kinds, confidence cells]
        self.decided = np.zeros_like(prior)
        self.stood = np.zeros_like(prior)

    def estimate(self, kinds: np.ndarray, confidences: np.ndarray) -> np.ndarray:
        """Probability that a token stands if those before it do; arrays of one shape."""
        cells = np.searchsorted(CONFIDENCE_EDGES, confidences, side="right")
        return self.table()[kinds, cells]

    def table(self) -> np.ndarray:
        """[kinds, confidence cells] estimates."""
        return (self.stood + PRIOR_WEIGHT * self.prior) / (self.decided + PRIOR_WEIGHT)

    def observe(self, kinds: np.ndarray, confidences: np.ndarray, num_stood: int) -> None:
        """One verified draft: its first `num_stood` tokens stood, the next did not, the others were not decided on."""
        num_decided = min(num_stood + 1, len(kinds))
        cells = np.searchsorted(CONFIDENCE_EDGES, confidences[:num_decided], side="right")
        for position, (kind, cell) in enumerate(zip(kinds[:num_decided].tolist(), cells.tolist(), strict=True)):
            self.decided[kind, cell] = DECAY * self.decided[kind, cell] + 1
            self.stood[kind, cell] = DECAY * self.stood[kind, cell] + (position < num_stood)

    def doubt(self, share: float) -> None:
        """Let what was learned weigh only `share` of what it does: the drafter or the policy has changed."""
        self.decided *= share
        self.stood *= share


def cell_centres() -> np.ndarray:
    """[confidence cells]: the middle of each."""
    edges = np.concatenate([[0.0], CONFIDENCE_EDGES, [1.0]])
    return (edges[:-1] + edges[1:]) / 2
