"""Held-out evaluation: greedy answers to problems that training cannot draw."""

from collections.abc import Sequence

from tlt.rollout.collector import RolloutCollector
from tlt.types import Prompt, SamplingConfig


class Evaluation:
    """Answers the same held-out prompts greedily each time; deterministic for given weights."""

    def __init__(
        self, prompts: Sequence[Prompt], collector: RolloutCollector, *, max_response_tokens: int, interval: int,
        train_iters: int,
    ):  # fmt: skip
        self.prompts = prompts
        self.collector = collector
        self.sampling = SamplingConfig(temperature=0.0, max_response_tokens=max_response_tokens)
        self.interval = interval
        self.train_iters = train_iters

    def is_due(self, iteration: int) -> bool:
        """Before the first iteration, every `interval` iterations and after the last one."""
        if not self.prompts:
            return False
        on_interval = self.interval > 0 and iteration % self.interval == 0
        return iteration == 0 or iteration == self.train_iters or on_interval

    def metrics_if_due(self, iteration: int) -> dict[str, float]:
        """Accuracy (share of rewards equal to 1) and lengths. Collective over all ranks; all must call."""
        if not self.is_due(iteration):
            return {}
        with self.collector.trace.span("evaluation", iteration=iteration), self.collector.interrupt.held():
            groups, _ = self.collector.collect(self.prompts, self.sampling, group_size=1, seed=0)
        lengths = [len(group.rollouts[0].token_ids) for group in groups]
        return {
            "eval/greedy_accuracy": sum(group.rewards[0] == 1.0 for group in groups) / len(groups),
            "eval/num_prompts": float(len(groups)),
            "eval/response_tokens_mean": sum(lengths) / len(lengths),
        }
