"""Held-out evaluation: greedy and sampled answers to problems that training cannot draw."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from tlt.rollout.collector import RolloutCollector
from tlt.rollout.log import RolloutLog
from tlt.types import Prompt, RolloutGroup, SamplingConfig


class Evaluation:
    """Answers the same held-out prompts each time; the greedy part is deterministic for given weights. Nothing is
    trained on the answers; `collector` is one without work in the tail."""

    def __init__(
        self, prompts: Sequence[Prompt], collector: RolloutCollector, *, sampling: SamplingConfig, num_samples: int,
        rollout_log: RolloutLog, interval: int, train_iters: int,
    ):  # fmt: skip
        self.prompts = prompts
        self.collector = collector
        self.greedy = SamplingConfig(temperature=0.0, max_response_tokens=sampling.max_response_tokens)
        self.sampling = replace(sampling, is_learned_from=False)
        self.num_samples = num_samples
        self.rollout_log = rollout_log
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
            groups, _ = self.collector.collect(self.prompts, self.greedy, group_size=1, seed=0)
            metrics = greedy_metrics(groups)
            if self.num_samples > 0:
                groups, _ = self.collector.collect(self.prompts, self.sampling, group_size=self.num_samples, seed=0)
                self.rollout_log.write(iteration, groups, name="eval")
                metrics |= sampled_metrics(groups)
        return metrics


def greedy_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Of one greedy response to each prompt."""
    return {
        "eval/greedy_accuracy": sum(group.rewards[0] == 1.0 for group in groups) / len(groups),
        "eval/num_prompts": float(len(groups)),
        "eval/response_tokens_mean": statistics.fmean(len(group.rollouts[0].token_ids) for group in groups),
    }


def sampled_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Of several responses to each prompt; a group is mixed if some are right and some wrong."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    return {
        "eval/sampled_accuracy": statistics.fmean(reward == 1.0 for group in groups for reward in group.rewards),
        "eval/mixed_groups_frac": sum(not group.is_equal for group in groups) / len(groups),
        "eval/sampled_tokens_mean": statistics.fmean(len(rollout.token_ids) for rollout in rollouts),
        "eval/sampled_entropy": statistics.fmean(value for rollout in rollouts for value in rollout.entropies),
    }
