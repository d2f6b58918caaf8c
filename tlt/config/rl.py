"""The algorithm."""

from dataclasses import dataclass
from typing import Literal

from tlt.config.requirement import require


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Flags --rl-*: GRPO and its loss (equations in docs/algorithm.md)."""

    prompts_per_iteration: int = 8
    """Prompts (groups) of one iteration."""
    group_size: int = 8
    """Responses sampled per prompt."""
    optimizer_steps: int = 1
    """Optimizer steps of one iteration; its groups are split evenly over them."""
    advantage_std: bool = True
    """Divide a group's centred rewards by their standard deviation (GRPO); --no-rl-advantage-std leaves them
    (Dr.GRPO)."""
    loss_aggregation: Literal["token-mean", "sequence-mean-token-mean", "dr-grpo"] = "token-mean"
    """Denominator of the loss: all response tokens (DAPO); each response's own length, then the mean over responses
    (GRPO); --rollout-max-response-tokens times the number of responses (Dr.GRPO)."""
    clip_low: float = 0.2
    """Probability ratios below 1 - this are clipped."""
    clip_high: float = 0.2
    """Probability ratios above 1 + this are clipped; larger than --rl-clip-low is clip-higher (DAPO)."""
    dual_clip: float | None = None
    """Bound on ratio x |advantage| for negative advantages (at least 1; usual 3.0); None turns it off."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the reference policy (the initial one) in the loss; 0 builds no reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token KL estimator (Schulman's k1, k2, k3)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, in nats per token (as in A3C, arXiv 1602.01783)."""
    importance_sampling_cap: float | None = 2.0
    """Cap of exp(old logprob - rollout logprob), which corrects the mismatch of trainer and engine (truncated
    importance sampling); None does not correct."""
    max_logprob_diff: float | None = 1.0
    """Mean |old logprob - rollout logprob| over an optimizer step's tokens, in nats, above which the step is skipped
    and counted (`policy/skipped_steps`): the engine then runs another policy than the trainer. None never skips."""
    drop_equal_groups: bool = False
    """Leave out groups whose rewards are all equal: they have no gradient (DAPO's dynamic sampling)."""
    refill_rounds: int = 0
    """Further rounds in which new prompts are sampled in place of groups of equal reward, at most; needs
    --rl-drop-equal-groups (DAPO's dynamic sampling)."""
    overlong_buffer_tokens: int = 0
    """Tokens before --rollout-max-response-tokens over which the reward falls linearly by --rl-overlong-penalty
    (DAPO's soft overlong punishment); 0 turns it off."""
    overlong_penalty: float = 1.0
    """Reward lost by a response of --rollout-max-response-tokens."""

    def __post_init__(self):
        for flag in ("prompts_per_iteration", "group_size", "optimizer_steps"):
            value = getattr(self, flag)
            require(value >= 1, "--rl-" + flag.replace("_", "-"), value, "at least 1")
        require(
            self.optimizer_steps <= self.prompts_per_iteration,
            "--rl-optimizer-steps",
            self.optimizer_steps,
            f"at most --rl-prompts-per-iteration ({self.prompts_per_iteration})",
        )
        require(
            self.max_logprob_diff is None or self.max_logprob_diff > 0,
            "--rl-max-logprob-diff",
            self.max_logprob_diff,
            "above 0",
        )
        require(0 <= self.clip_low <= 1, "--rl-clip-low", self.clip_low, "in [0, 1]")
        require(self.clip_high >= 0, "--rl-clip-high", self.clip_high, "at least 0")
        require(self.dual_clip is None or self.dual_clip >= 1, "--rl-dual-clip", self.dual_clip, "at least 1")
        require(
            self.refill_rounds == 0 or (self.refill_rounds > 0 and self.drop_equal_groups),
            "--rl-refill-rounds",
            self.refill_rounds,
            "0, or above 0 together with --rl-drop-equal-groups",
        )
        for flag in ("overlong_buffer_tokens", "overlong_penalty"):
            value = getattr(self, flag)
            require(value >= 0, "--rl-" + flag.replace("_", "-"), value, "at least 0")
        require(self.kl_coef >= 0, "--rl-kl-coef", self.kl_coef, "at least 0")
        require(
            self.importance_sampling_cap is None or self.importance_sampling_cap > 0,
            "--rl-importance-sampling-cap",
            self.importance_sampling_cap,
            "above 0",
        )
