"""Policy loss of GRPO and its relatives; equations in docs/algorithm.md. Shapes: T packed tokens of a micro-batch."""

from dataclasses import dataclass

import torch

from tlt.config import RLConfig
from tlt.metrics import MetricSums, masked_sums
from tlt.types import PackedMicroBatch


@dataclass(frozen=True, kw_only=True)
class LossOutputs:
    loss: torch.Tensor  # [] float32; already normalised over the whole optimizer step: summed, never averaged
    metrics: MetricSums


def policy_loss(
    logprobs_T: torch.Tensor, entropy_T: torch.Tensor, batch: PackedMicroBatch, rl: RLConfig
) -> LossOutputs:
    """Clipped policy gradient with optional dual clip, importance correction, KL penalty and entropy bonus.

    L = sum_t w_t [ -c_t min(rho_t A_t, clip(rho_t, 1 - low, 1 + high) A_t) + kl_coef KL_t - entropy_coef H_t ]
    with rho = exp(logprobs - old_logprobs), w the loss weights of the batch (`rl/train_batch.py`) and
    c = min(exp(old_logprobs - rollout_logprobs), cap), the truncated importance weight of trainer against engine.
    clip-higher: arXiv 2503.14476; dual clip: 1912.09729, for A < 0 the surrogate is at least dual_clip x A.
    """
    mask, advantages = batch.response_mask, batch.advantages
    log_ratio_T = logprobs_T - batch.old_logprobs
    ratio_T = log_ratio_T.exp()
    clipped_T = ratio_T.clamp(1 - rl.clip_low, 1 + rl.clip_high)
    surrogate_T = torch.minimum(ratio_T * advantages, clipped_T * advantages)
    if rl.dual_clip is not None:
        surrogate_T = torch.where(advantages < 0, surrogate_T.maximum(rl.dual_clip * advantages), surrogate_T)

    mismatch_T = batch.old_logprobs - batch.rollout_logprobs
    correction_T = mismatch_T.exp()
    if rl.importance_sampling_cap is None:
        objective_T = surrogate_T
    else:
        objective_T = surrogate_T * correction_T.clamp(max=rl.importance_sampling_cap)

    loss_T = -objective_T - rl.entropy_coef * entropy_T
    metrics = masked_sums(
        mask,
        policy_loss=-objective_T,
        entropy=entropy_T,
        ratio=ratio_T,
        approx_kl=(-log_ratio_T).exp() - 1 + log_ratio_T,
        clip_low_frac=((ratio_T < 1 - rl.clip_low) & (advantages < 0)).float(),
        clip_high_frac=((ratio_T > 1 + rl.clip_high) & (advantages > 0)).float(),
        logprob_diff_mean=mismatch_T.abs(),
        importance_weight=correction_T,
        importance_capped_frac=(correction_T > (rl.importance_sampling_cap or float("inf"))).float(),
    )
    if batch.ref_logprobs is not None:
        kl_T = kl_penalty(logprobs_T, batch.ref_logprobs, rl.kl_estimator)
        loss_T = loss_T + rl.kl_coef * kl_T
        metrics.add(masked_sums(mask, ref_kl=kl_T))
    if mask.any():
        metrics.maxima["logprob_diff_max"] = float(mismatch_T[mask].abs().max())
        metrics.maxima["ratio_max"] = float(ratio_T.detach()[mask].max())
    # Prompt positions have weight 0, but an infinite ratio there would make 0 x inf: they are left out.
    loss = (batch.loss_weights * loss_T)[mask].sum()
    return LossOutputs(loss=loss, metrics=metrics)


def kl_penalty(logprobs_T: torch.Tensor, ref_logprobs_T: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference) from tokens of the policy (Schulman, "Approximating KL divergence").

    With d = logprob - ref_logprob: k1 = d; k2 = d^2 / 2; k3 = exp(-d) - 1 + d.
    """
    difference_T = logprobs_T - ref_logprobs_T
    if estimator == "k1":
        return difference_T
    if estimator == "k2":
        return difference_T.square() / 2
    return (-difference_T).exp() - 1 + difference_T
