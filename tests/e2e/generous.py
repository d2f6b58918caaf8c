"""pretrain_rl.py whose crowded replicas give every second response to whoever asks, whether that pays or not."""

from collections.abc import Sequence

import pretrain_rl
from tlt.rollout import consolidation


def main(argv: Sequence[str]) -> int:
    consolidation.worth_moving = lambda pending, step_s: sorted(each.name for each in pending)[1::2]
    return pretrain_rl.main(argv)
