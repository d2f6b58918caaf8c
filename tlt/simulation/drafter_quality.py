"""How good the head is from iteration to iteration: updates of the policy harm it, training on idle ranks helps.

A model with two stated numbers, not a measurement; whether idle ranks train is the product's decision (`GainRecord`),
which is told the gain as it would measure it.
"""

from dataclasses import dataclass, field
from math import exp

import numpy as np

from tlt.spot.judgement import Judgement
from tlt.spot.opportunity import PATIENCE_STEPS, GainRecord

DEPTH = 4
"""Draft tokens over which heads are judged."""
NUM_JUDGES = 100
"""Responses that judge; the error is given, whatever their number."""


@dataclass(kw_only=True)
class DrafterQuality:
    """`share` of its acceptance at each depth is left of what the head could have."""

    stands: tuple[float, ...]
    """At its best, by depth."""
    loss: float
    """Share of its acceptance that an update of the policy takes."""
    recovery_rank_s: float
    """Seconds of training, over all ranks, that bring back all but 1/e of what is missing."""
    error_frac: float = 0.003
    """Standard error with which a gain is measured, of the tokens of a verification."""
    share: float = 1.0
    gains: GainRecord = field(default_factory=lambda: GainRecord(min_gain_frac=0.002))
    version: int = 0

    @property
    def is_due(self) -> bool:
        """Whether idle ranks train in the next rollout."""
        return self.gains.is_due(self.version)

    def score(self, share: float) -> float:
        """Expected accepted tokens of a draft."""
        stands = np.array([*self.stands, *[self.stands[-1]] * DEPTH])[:DEPTH]
        return float(np.cumprod(share * stands).sum())

    def trained(self, rank_s: float, *, meeting_frac: float) -> None:
        """Ranks trained for so long in all; better weights draft from now on. `meeting_frac` is what the ranks'
        meeting took, as a share of the rollout."""
        if rank_s <= 0:
            return
        better = self.share + (1 - self.share) * (1 - exp(-rank_s / self.recovery_rank_s))
        live, candidate = self.score(self.share), self.score(better)
        error = self.error_frac * (1 + live)
        judged = Judgement(live=live, candidate=candidate, error=error, num_judges=NUM_JUDGES)
        self.gains.count(judged, policy_version=self.version, cost_frac=meeting_frac, num_steps=PATIENCE_STEPS)
        if judged.is_better:
            self.gains.published(judged, policy_version=self.version)
            self.share = better
        else:
            self.gains.begun_anew()  # the model forgets what does not draft

    def policy_updated(self) -> None:
        """The text that is to be drafted has changed a little."""
        self.version += 1
        self.share *= 1 - self.loss
