"""Training of the drafter on ranks that idle in a rollout's tail."""

from dataclasses import dataclass
from typing import Literal

from tlt.config.requirement import require


@dataclass(frozen=True, kw_only=True)
class SpotConfig:
    """Flags --spot-*: ranks whose replica is done train the drafter until the last replica is."""

    training: Literal["off", "on"] = "off"
    """`on` needs --spec-drafter and --spec-hidden-states-mib."""
    lr: float = 3e-4
    """Learning rate of AdamW: the head is good already and follows the policy; --drafter-lr is for a head from
    nothing."""
    warmup_steps: int = 10
    """Optimizer steps of linear warm-up at the first training of a run, and of one that begins anew."""
    ema_decay: float = 0.9
    """Of the average of weights that is published: a tail has some ten steps, too few for --drafter-ema-decay."""
    max_age: int = 2
    """Policy versions that a hidden state may be older than the newest: its targets are read out with today's LM
    head."""
    held_out_every: int = 8
    """The responses of one prompt in so many are never trained on and judge new weights against those that draft."""
    judge_starts: int = 256
    """Drafts of held-out responses that judge, on each rank that had a tail; on all, where these have too few."""
    min_steps: int = 1
    """Optimizer steps, over all ranks, below which nothing is published."""
    min_gain: float = 0.002
    """Share of the tokens of a verification that a training must gain, measured over the last ones, for idle ranks to
    train at every chance; below it they train every 2 to 8 policy versions, as fast as the head gets stale."""
    compare_first: Literal["off", "on"] = "off"
    """Judge the head of --spec-drafter too, which nothing trains: `spot/first_score`."""

    def __post_init__(self):
        require(self.lr > 0, "--spot-lr", self.lr, "above 0")
        require(self.warmup_steps >= 0, "--spot-warmup-steps", self.warmup_steps, "at least 0")
        require(0 <= self.ema_decay < 1, "--spot-ema-decay", self.ema_decay, "in [0, 1)")
        require(self.max_age >= 0, "--spot-max-age", self.max_age, "at least 0")
        require(self.held_out_every >= 2, "--spot-held-out-every", self.held_out_every, "at least 2")
        require(self.judge_starts >= 1, "--spot-judge-starts", self.judge_starts, "at least 1")
        require(self.min_steps >= 1, "--spot-min-steps", self.min_steps, "at least 1")
        require(0 <= self.min_gain < 1, "--spot-min-gain", self.min_gain, "in [0, 1)")
