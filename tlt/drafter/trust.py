"""How far a request, its group or its data source kept to what was expected of a drafter."""

from dataclasses import dataclass

TRUST_WEIGHT, TRUST_DECAY = 6.0, 0.97
"""Expected tokens with which a request's trust in a drafter starts from its group's; what its past weighs after one
more verification."""


@dataclass
class Trust:
    """How many draft tokens stood where so many were expected to."""

    expected: float = 0.0
    stood: float = 0.0

    def factor(self, prior: float) -> float:
        return min(max((self.stood + TRUST_WEIGHT * prior) / (self.expected + TRUST_WEIGHT), 0.2), 1.5)

    def count(self, expected: float, stood: int) -> None:
        self.expected = TRUST_DECAY * self.expected + expected
        self.stood = TRUST_DECAY * self.stood + stood
