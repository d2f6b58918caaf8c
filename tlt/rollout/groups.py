"""The groups of one iteration: sampled from the next prompts, refilled where groups teach nothing."""

from tlt.config import RLConfig
from tlt.protocols import PromptSource
from tlt.rollout.collector import RolloutCollector
from tlt.types import RolloutGroup, SamplingConfig

ADDED = (
    "rollout/duration_s",
    "rollout/tail_s",
    "rollout/preemptions",
    "rollout/moved_responses",
    "reward/timeouts",
    "reward/errors",
    "reward/out_of_memory",
    "reward/wait_s",
    "spot/steps",
    "spot/train_s",
    "spot/ranks_too_late",
    "spot/published",
)
"""Metrics that add up over the rounds of an iteration; of those named `_max` the largest counts; the others are means
weighted by each round's duration."""


class GroupSampler:
    """`prompts_per_iteration` groups, then up to `refill_rounds` further rounds in place of groups of equal reward.

    DAPO's dynamic sampling (arXiv 2503.14476, section 3.2). Every round is a function of data that all ranks share.
    """

    def __init__(
        self, prompts: PromptSource, rollouts: RolloutCollector, sampling: SamplingConfig, *, rl: RLConfig, seed: int
    ):
        self.prompts = prompts
        self.rollouts = rollouts
        self.sampling = sampling
        self.rl = rl
        self.seed = seed

    def sample(self, iteration: int) -> tuple[list[RolloutGroup], dict[str, float]]:
        """Scored groups, those of equal reward included, and metrics; equal on all ranks.

        Raises Interrupted as `RolloutCollector.collect` does. Collective over all ranks; all must call.
        """
        groups: list[RolloutGroup] = []
        rounds: list[dict[str, float]] = []
        missing = self.rl.prompts_per_iteration
        while missing > 0 and len(rounds) <= self.rl.refill_rounds:
            new, metrics = self.rollouts.collect(
                self.prompts.next_batch(missing), self.sampling, group_size=self.rl.group_size,
                seed=self.seed + iteration,
            )  # fmt: skip
            groups += new
            rounds.append(metrics)
            missing = self.rl.prompts_per_iteration - sum(not group.is_equal for group in groups)
        return groups, {**merged(rounds), "rl/sampling_rounds": float(len(rounds))}


def merged(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Metrics of several rollouts as those of one."""
    result = {}
    for name in sorted({name for metrics in rounds for name in metrics}):
        holding = [metrics for metrics in rounds if name in metrics]  # a round without drafts says nothing of them
        if name in ADDED:
            result[name] = sum(metrics[name] for metrics in holding)
        elif name.endswith("_max"):
            result[name] = max(metrics[name] for metrics in holding)
        else:
            total_s = sum(metrics["rollout/duration_s"] for metrics in holding)
            weighted = sum(metrics[name] * metrics["rollout/duration_s"] for metrics in holding)
            result[name] = weighted / total_s if total_s > 0 else holding[0][name]
    return result
