"""Group-relative advantages: the rewards of one prompt's responses, centred on their own mean."""

import statistics
from collections.abc import Sequence

STD_EPS = 1e-6
"""Added to the standard deviation, as verl does; far below the smallest one that a 0/1 reward gives."""


def group_advantages(rewards: Sequence[float], *, divide_by_std: bool) -> list[float]:
    """`(r_i - mean(r)) / (std(r) + 1e-6)` (GRPO, arXiv 2402.03300, eq. 3), or `r_i - mean(r)` (Dr.GRPO, 2503.20783).

    std is the unbiased one (denominator G - 1), as in verl. A group of one has no baseline: its advantage is 0.
    """
    if len(rewards) == 1:
        return [0.0]
    mean = statistics.fmean(rewards)
    centred = [reward - mean for reward in rewards]
    if not divide_by_std:
        return centred
    std = (sum(value * value for value in centred) / (len(rewards) - 1)) ** 0.5
    return [value / (std + STD_EPS) for value in centred]
