"""How much better trained weights draft than those that do, on the same held-out responses of all ranks."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tlt.types import Piece

ONCE_IN_FORTY = {
    1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23, 12: 2.18, 15: 2.13,
    20: 2.09, 30: 2.04, 60: 2.00, 120: 1.98,
}  # fmt: skip
"""Standard errors that chance exceeds to one side so often, by degrees of freedom: Student's t at 0.975."""


def once_in_forty(degrees: int) -> float:
    """Of the next fewer degrees of freedom in the table; infinite below 1."""
    known = sorted(ONCE_IN_FORTY)
    return ONCE_IN_FORTY[known[bisect_right(known, degrees) - 1]] if degrees >= 1 else math.inf


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Scores are expected accepted tokens of a draft."""

    live: float
    """Of the weights that draft."""
    candidate: float
    """Of those that were trained."""
    error: float
    """Standard error of the difference between responses; infinite where fewer than two judged."""
    num_judges: int
    """Responses that judged."""

    @property
    def gain(self) -> float:
        """Accepted tokens that each draft would have more."""
        return self.candidate - self.live

    @property
    def is_better(self) -> bool:
        """Whether the trained weights are to draft: they gain more than chance would."""
        return self.gain > self.error

    @property
    def is_worse(self) -> bool:
        """Whether the training went wrong: they lose more than chance would but once in forty. One that has just begun
        may lose a little before it gains."""
        return self.gain < -once_in_forty(self.num_judges - 1) * self.error

    def frac(self, value: float) -> float:
        """A difference of scores as a share of the tokens that one verification gives now."""
        return value / (1 + self.live)


@dataclass(frozen=True, kw_only=True)
class Judges:
    """P stretches of held-out text on one rank, and what the weights that draft now are worth there."""

    pieces: Sequence[Piece]
    live: torch.Tensor
    """[P] expected accepted tokens, summed over a piece's drafts."""
    first: torch.Tensor
    """[F] of the head that the run was given, on the first F of them; [0] where no one asks for it."""
    drafter_version: int

    @property
    def num_starts(self) -> int:
        """Drafts."""
        return sum(piece.num_starts for piece in self.pieces)

    @property
    def num_responses(self) -> int:
        """That the stretches are of."""
        return len({piece.sample.request_id for piece in self.pieces})

    def first_sums(self) -> torch.Tensor:
        """[2] float64: the first head's score, and the drafts that it was scored on."""
        drafts = sum(piece.num_starts for piece in self.pieces[: len(self.first)])
        return torch.stack([self.first.sum(), torch.tensor(drafts, dtype=torch.float64)])

    def scores(self, candidate: torch.Tensor) -> torch.Tensor:
        """[R, 3] float64 of each response: the scores of live weights and of others, given as [P]; drafts."""
        names = [piece.sample.request_id for piece in self.pieces]
        rows = {name: row for row, name in enumerate(dict.fromkeys(names))}
        drafts = torch.tensor([piece.num_starts for piece in self.pieces], dtype=torch.float64)
        index = torch.tensor([rows[name] for name in names], dtype=torch.int64)
        columns = torch.stack([self.live, candidate, drafts], dim=1)
        return torch.zeros(len(rows), 3, dtype=torch.float64).index_add_(0, index, columns)


NO_JUDGES = Judges(
    pieces=(), live=torch.zeros(0, dtype=torch.float64), first=torch.zeros(0, dtype=torch.float64), drafter_version=-1
)
"""A rank that has none."""


def judgement_sums(scores: torch.Tensor) -> torch.Tensor:
    """[7] of one rank's [R, 3] scores (of live weights, of trained ones, drafts); those of all ranks add up."""
    live, candidate, drafts = scores.double().unbind(1)
    gain = candidate - live
    return torch.stack([
        live.sum(), candidate.sum(), drafts.sum(), (gain * gain).sum(), (gain * drafts).sum(),
        (drafts * drafts).sum(), torch.tensor(float(len(scores)), dtype=torch.float64),
    ])  # fmt: skip


def judgement(sums: torch.Tensor) -> Judgement | None:
    """Of the sums of all ranks; None where no response judged.

    The gain of a draft is a ratio of sums over responses, whose drafts are not independent: its variance is that of
    the ratio estimator (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    live, candidate, drafts, gain_2, gain_drafts, drafts_2, responses = sums.tolist()
    if drafts == 0:
        return None
    ratio = (candidate - live) / drafts
    residual = max(gain_2 - 2 * ratio * gain_drafts + ratio**2 * drafts_2, 0.0)
    error = math.sqrt(residual * responses / (responses - 1)) / drafts if responses > 1 else math.inf
    return Judgement(
        live=live / drafts, candidate=candidate / drafts, error=error, num_judges=int(responses)
    )  # fmt: skip
