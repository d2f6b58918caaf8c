"""Training of the drafter."""

from dataclasses import dataclass

from tlt.config.requirement import require


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """Flags --drafter-*: how an EAGLE head learns to draft what the policy will say."""

    lr: float = 2e-3
    """Peak learning rate of AdamW."""
    warmup_steps: int = 30
    """Optimizer steps of linear warm-up."""
    min_lr_frac: float = 0.01
    """Share of the peak that the cosine decay ends at."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moments (that of the first is 0.9)."""
    weight_decay: float = 0.0
    """AdamW's, decoupled."""
    clip_grad: float = 1.0
    """Norm above which gradients are scaled down."""
    ema_decay: float = 0.98
    """Of the average of weights that is published; 0 publishes the last weights."""
    num_depths: int = 4
    """Draft tokens that the head is unrolled for in training."""
    deep_frac: float = 0.5
    """Share of the starts that are unrolled beyond the first draft token."""
    starts_per_step: int = 512
    """Positions at which drafts begin, of one optimizer step on each rank."""
    micro_step_ms: int = 200
    """Aim for one forward and backward, which an interruption has to wait for; starts of a micro-step follow it."""
    cross_entropy_weight: float = 1.0
    """Of the soft cross-entropy on the target's distribution at the sampled temperature."""
    hidden_weight: float = 0.1
    """Of the smooth L1 loss on hidden states."""
    total_variation_weight: float = 0.0
    """Of the total variation distance between both distributions."""
    depth_decay: float = 0.9
    """Each further depth counts this much of the one before."""

    def __post_init__(self):
        for flag in ("num_depths", "starts_per_step", "micro_step_ms"):
            value = getattr(self, flag)
            require(value >= 1, "--drafter-" + flag.replace("_", "-"), value, "at least 1")
        losses = ("cross_entropy_weight", "hidden_weight", "total_variation_weight")
        for flag in ("warmup_steps", "weight_decay", *losses):
            value = getattr(self, flag)
            require(value >= 0, "--drafter-" + flag.replace("_", "-"), value, "at least 0")
        require(self.lr > 0, "--drafter-lr", self.lr, "above 0")
        require(self.clip_grad > 0, "--drafter-clip-grad", self.clip_grad, "above 0")
        require(0 < self.adam_beta2 < 1, "--drafter-adam-beta2", self.adam_beta2, "in (0, 1)")
        require(0 <= self.min_lr_frac <= 1, "--drafter-min-lr-frac", self.min_lr_frac, "in [0, 1]")
        require(0 <= self.ema_decay < 1, "--drafter-ema-decay", self.ema_decay, "in [0, 1)")
        require(0 < self.deep_frac <= 1, "--drafter-deep-frac", self.deep_frac, "in (0, 1]")
        require(0 < self.depth_decay <= 1, "--drafter-depth-decay", self.depth_decay, "in (0, 1]")
