"""BEG-MAB: the bucketed epsilon-greedy bandit of TLT (arXiv 2511.16665, algorithm 1), here over chains of drafts.

Each bucket of batch sizes chooses within a group of strategies: such as verify many tokens for small batches. `off` is
an arm of every bucket, which the paper has not: there speculation ends above a fixed batch size. Clock and random
generator are the caller's.
"""

import random
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median

from tlt.spec.strategy import DecodeStep, rising_from_one
from tlt.types import OFF, SpecStrategy


class BegMab:
    """One bandit of an engine; its choice is made on the first rank and broadcast, so times need not agree."""

    def __init__(
        self, buckets: Sequence[tuple[int, Sequence[SpecStrategy]]], *, epsilon: float, window: int, seed: int
    ):
        """`buckets`: (smallest batch, its group of strategies), batches rising from 1, or ValueError."""
        self.thresholds = rising_from_one([first for first, _ in buckets])
        self.groups = [[*(arm for arm in arms if arm != OFF), OFF] for _, arms in buckets]
        self.epsilon = epsilon
        self.random = random.Random(seed)
        self.max_draft_tokens = max(arm.num_draft_tokens for arms in self.groups for arm in arms)
        self.rewards: dict[tuple[int, SpecStrategy], deque[float]] = defaultdict(lambda: deque(maxlen=window))

    def bucket(self, num_running: int) -> int:
        """Index of the last threshold that the batch reaches."""
        return max(index for index, threshold in enumerate(self.thresholds) if threshold <= max(num_running, 1))

    def arms(self, num_running: int) -> Sequence[SpecStrategy]:
        """Its bucket's."""
        return self.groups[self.bucket(num_running)]

    def choose(self, num_running: int) -> SpecStrategy:
        """For an engine step with so many running requests: an arm never tried first, then mostly the best median."""
        bucket = self.bucket(num_running)
        arms = self.groups[bucket]
        untried = [arm for arm in arms if not self.rewards[bucket, arm]]
        if untried:
            return untried[0]
        if self.random.random() < self.epsilon:
            return self.random.choice(arms)
        return max(arms, key=lambda arm: median(self.rewards[bucket, arm]))

    def observe(self, step: DecodeStep) -> None:
        """Count its tokens a second for its strategy, in the bucket of its batch."""
        bucket = self.bucket(step.num_running)
        if step.seconds > 0 and step.strategy in self.groups[bucket]:
            self.rewards[bucket, step.strategy].append(step.num_tokens / step.seconds)

    def state_dict(self) -> dict:
        """JSON types. The random generator begins anew: choices follow measured times anyway."""
        return {
            "rewards": [
                {"bucket": bucket, "strategy": str(arm), "tokens_per_s": list(rewards)}
                for (bucket, arm), rewards in self.rewards.items()
            ]
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on with what a bandit of the same arms gave."""
        arms = {str(arm): arm for group in self.groups for arm in group}
        for row in state["rewards"]:
            self.rewards[row["bucket"], arms[row["strategy"]]].extend(row["tokens_per_s"])
