"""What is minimised: the policy loss of GRPO and its relatives, or the likelihood loss of supervised fine-tuning.

Equations in docs/algorithm.md. Shape: N response tokens of a micro-batch.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from tlt.config import RLConfig
from tlt.metrics import MetricSums, token_sums
from tlt.rl.logprobs import LogprobOutputs
from tlt.types import PackedMicroBatch


@dataclass(frozen=True, kw_only=True)
class LossOutputs:
    loss: torch.Tensor  # [] float32; already normalised over the whole optimizer step: summed, never averaged
    metrics: MetricSums


class Objective(Protocol):
    """What the policy trainer minimises."""

    steps_per_iteration: int
    """Most optimizer steps that one batch has."""
    uses_reference: bool
    """Whether micro-batches need the reference policy's logprobs."""
    max_logprob_diff: float | None
    """Mean |old logprob - rollout logprob| in nats above which an optimizer step is skipped; None never skips."""

    def __call__(self, outputs: LogprobOutputs, batch: PackedMicroBatch) -> LossOutputs:
        """Loss and metrics of one micro-batch."""


class PolicyObjective:
    """Reinforcement learning: `policy_loss`."""

    def __init__(self, rl: RLConfig):
        self.rl = rl
        self.steps_per_iteration = rl.optimizer_steps
        self.uses_reference = rl.kl_coef > 0
        self.max_logprob_diff = rl.max_logprob_diff

    def __call__(self, outputs: LogprobOutputs, batch: PackedMicroBatch) -> LossOutputs:
        result = policy_loss(outputs.logprobs, outputs.entropy, batch, self.rl)
        result.metrics.add(token_sums(max_prob=outputs.max_prob))
        return result


class LikelihoodObjective:
    """Supervised fine-tuning: L = -sum_t w_t logprob_t, the mean negative log-likelihood of response tokens."""

    steps_per_iteration = 1
    uses_reference = False
    max_logprob_diff = None

    def __call__(self, outputs: LogprobOutputs, batch: PackedMicroBatch) -> LossOutputs:
        loss = -(batch.loss_weights * outputs.logprobs).sum()
        return LossOutputs(loss=loss, metrics=token_sums(nll=-outputs.logprobs, entropy=outputs.entropy))


def policy_loss(
    logprobs_N: torch.Tensor, entropy_N: torch.Tensor, batch: PackedMicroBatch, rl: RLConfig
) -> LossOutputs:
    """Clipped policy gradient with optional dual clip, importance correction, KL penalty and entropy bonus.

    L = sum_t w_t [ -c_t min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t) + kl_coef KL_t - entropy_coef H_t ]
    with rho = exp(logprobs - old_logprobs), w the loss weights of the batch (`rl/train_batch.py`) and
    c = min(exp(old_logprobs - rollout_logprobs), cap), the truncated importance weight of trainer against engine.
    Without old logprobs in the batch the present ones are the old ones: the iteration's first optimizer step.
    clip-higher: arXiv 2503.14476; dual clip: 1912.09729, for A < 0 the surrogate is at least dual_clip x A.
    """
    advantages = batch.advantages
    old_logprobs_N = logprobs_N.detach() if batch.old_logprobs is None else batch.old_logprobs
    log_ratio_N = logprobs_N - old_logprobs_N
    ratio_N = log_ratio_N.exp()
    clipped_N = ratio_N.clamp(1 - rl.clip_low, 1 + rl.clip_high)
    surrogate_N = torch.minimum(ratio_N * advantages, clipped_N * advantages)
    if rl.dual_clip is not None:
        surrogate_N = torch.where(advantages < 0, surrogate_N.maximum(rl.dual_clip * advantages), surrogate_N)

    mismatch_N = old_logprobs_N - batch.rollout_logprobs
    correction_N = mismatch_N.exp()
    cap = float("inf") if rl.importance_sampling_cap is None else rl.importance_sampling_cap
    objective_N = surrogate_N if rl.importance_sampling_cap is None else surrogate_N * correction_N.clamp(max=cap)

    loss_N = -objective_N - rl.entropy_coef * entropy_N
    metrics = token_sums(
        policy_loss=-objective_N,
        entropy=entropy_N,
        ratio=ratio_N,
        approx_kl=(-log_ratio_N).exp() - 1 + log_ratio_N,
        clip_low_frac=((ratio_N < 1 - rl.clip_low) & (advantages < 0)).float(),
        clip_high_frac=((ratio_N > 1 + rl.clip_high) & (advantages > 0)).float(),
        logprob_diff_mean=mismatch_N.abs(),
        importance_weight=correction_N,
        importance_capped_frac=(correction_N > cap).float(),
    )
    if batch.ref_logprobs is not None:
        kl_N = kl_penalty(logprobs_N, batch.ref_logprobs, rl.kl_estimator)
        loss_N = loss_N + rl.kl_coef * kl_N
        metrics.add(token_sums(ref_kl=kl_N))
    if len(logprobs_N):
        metrics.maxima["logprob_diff_max"] = float(mismatch_N.abs().max())
        metrics.maxima["ratio_max"] = float(ratio_N.detach().max())
    return LossOutputs(loss=(batch.loss_weights * loss_N).sum(), metrics=metrics)


def kl_penalty(logprobs_N: torch.Tensor, ref_logprobs_N: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from tokens of the policy (Schulman, "Approximating KL
    divergence").

    With d = logprob - ref_logprob: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d.
    """
    difference_N = logprobs_N - ref_logprobs_N
    if estimator == "k1":
        return difference_N
    if estimator == "k2":
        return difference_N.square() / 2
    return (-difference_N).exp() - 1 + difference_N
