"""Scored groups -> the sequences of each optimizer step; a pure function of data that all ranks share."""

import logging
import math
import statistics
from collections.abc import Sequence

from tlt.config import RLConfig
from tlt.rl.advantages import group_advantages
from tlt.types import Rollout, RolloutGroup, TrainBatch, TrainSequence

logger = logging.getLogger(__name__)

LOW_ENTROPY = 0.01
"""Nats below which a token counts as certain (arXiv 2506.01939 has half of a reasoning model's tokens there)."""


def build_train_batch(groups: Sequence[RolloutGroup], *, rl: RLConfig, max_response_tokens: int) -> TrainBatch:
    """Advantages, loss weights and the split over optimizer steps (groups stay whole, in order).

    A group with a logprob that is not finite is left out, named and counted (`rl/unsound_groups`). Raises RuntimeError
    where that is more than half of them, and for groups without rewards or of different policy versions. Where every
    group is dropped the batch has no optimizer step.
    """
    versions = {rollout.policy_version for group in groups for rollout in group.rollouts}
    if len(versions) != 1:
        raise RuntimeError(f"rollouts of one iteration must be of one policy version, got {sorted(versions)}")
    for group in groups:
        if group.rewards is None or len(group.rewards) != len(group.rollouts):
            raise RuntimeError(f"group {group.prompt.prompt_id} is not scored: {group.rewards}")
    sound = sound_groups(groups)
    kept = [group for group in sound if not (rl.drop_equal_groups and group.is_equal)]
    steps = [
        step_sequences(step, rl=rl, max_response_tokens=max_response_tokens)
        for step in split_evenly(kept, rl.optimizer_steps)
    ]
    metrics = batch_metrics(groups, len(kept)) | {"rl/unsound_groups": float(len(groups) - len(sound))}
    return TrainBatch(optimizer_steps=tuple(steps), policy_version=versions.pop(), metrics=metrics)


def sound_groups(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Those whose logprobs are all finite. RuntimeError where that is less than half of them."""
    sound = []
    for group in groups:
        bad = [each for each in group.rollouts if not all(map(math.isfinite, each.logprobs))]
        if bad:
            logger.error(
                "prompt %s is left out: the engine's logprobs are not finite in responses %s", group.prompt.prompt_id,
                [each.sample_index for each in bad],
            )  # fmt: skip
        else:
            sound.append(group)
    if 2 * len(sound) < len(groups):
        raise RuntimeError(
            f"the engine's logprobs are not finite in {len(groups) - len(sound)} of {len(groups)} groups; the policy "
            "is that of the last update"
        )
    return sound


def split_evenly(groups: Sequence[RolloutGroup], num_steps: int) -> list[Sequence[RolloutGroup]]:
    """`num_steps` consecutive parts whose sizes differ by at most 1; fewer where there are fewer groups."""
    num_steps = min(num_steps, len(groups))
    bounds = [len(groups) * step // num_steps for step in range(num_steps + 1)] if num_steps else [0]
    return [groups[begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]


def step_sequences(
    groups: Sequence[RolloutGroup], *, rl: RLConfig, max_response_tokens: int
) -> tuple[TrainSequence, ...]:
    """Sequences of one optimizer step, weighted so that the step's loss is a plain sum over response tokens.

    Weight of a token of response i among N responses with R_i tokens each:
    token-mean 1 / sum(R); sequence-mean-token-mean 1 / (N R_i); dr-grpo 1 / (N max_response_tokens).
    """
    num_rollouts = sum(len(group.rollouts) for group in groups)
    num_tokens = sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)
    sequences = []
    for group in groups:
        rewards = shaped_rewards(group, rl=rl, max_response_tokens=max_response_tokens)
        advantages = group_advantages(rewards, divide_by_std=rl.advantage_std)
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            denominator = {
                "token-mean": num_tokens,
                "sequence-mean-token-mean": num_rollouts * len(rollout.token_ids),
                "dr-grpo": num_rollouts * max_response_tokens,
            }[rl.loss_aggregation]
            sequences.append(
                TrainSequence(
                    token_ids=group.prompt.token_ids + rollout.token_ids,
                    num_prompt_tokens=len(group.prompt.token_ids),
                    advantage=advantage,
                    rollout_logprobs=rollout.logprobs,
                    loss_weight=1.0 / denominator,
                )
            )
    return tuple(sequences)


def shaped_rewards(group: RolloutGroup, *, rl: RLConfig, max_response_tokens: int) -> list[float]:
    """Rewards with DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), off where the buffer is 0.

    A response of L tokens loses overlong_penalty * (L - (max_response_tokens - buffer)) / buffer beyond the buffer's
    begin.
    """
    buffer = rl.overlong_buffer_tokens
    if buffer == 0:
        return list(group.rewards)
    begin = max_response_tokens - buffer
    return [
        reward - rl.overlong_penalty * max(0, len(rollout.token_ids) - begin) / buffer
        for reward, rollout in zip(group.rewards, group.rollouts, strict=True)
    ]


def batch_metrics(groups: Sequence[RolloutGroup], num_kept: int) -> dict[str, float]:
    """Rewards and response lengths of all groups, dropped ones included."""
    rewards = [reward for group in groups for reward in group.rewards]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = sorted(len(rollout.token_ids) for rollout in rollouts)

    def percentile(share: float) -> float:
        return float(lengths[min(len(lengths) - 1, int(share * len(lengths)))])

    return {
        "rl/reward": statistics.fmean(rewards),
        "rl/equal_groups_frac": sum(group.is_equal for group in groups) / len(groups),
        "rl/trained_groups": float(num_kept),
        "rollout/response_tokens_mean": statistics.fmean(lengths),
        "rollout/response_tokens_p50": percentile(0.5),
        "rollout/response_tokens_p90": percentile(0.9),
        "rollout/response_tokens_p99": percentile(0.99),
        "rollout/response_tokens_max": float(lengths[-1]),
        **token_metrics(rollouts),
        "rollout/truncated_frac": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
    }


def token_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean entropy (nats), share of tokens below 0.01 nats and mean largest probability; nothing if not recorded."""
    entropies = [value for rollout in rollouts for value in rollout.entropies]
    max_probs = [value for rollout in rollouts for value in rollout.max_probs]
    if not entropies:
        return {}
    return {
        "rollout/entropy": statistics.fmean(entropies),
        "rollout/low_entropy_frac": sum(value < LOW_ENTROPY for value in entropies) / len(entropies),
        "rollout/max_prob": statistics.fmean(max_probs),
    }
