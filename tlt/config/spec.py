"""Speculative decoding of rollouts."""

from dataclasses import dataclass
from typing import Literal

from tlt.config.requirement import require


@dataclass(frozen=True, kw_only=True)
class SpecConfig:
    """Flags --spec-*: lossless speculative decoding; responses have the policy's distribution whatever is drafted."""

    strategy: str = "off"
    """What drafts: `eagle:<tokens>` (a head of --spec-drafter), `suffix:<tokens>` (longest match in the texts of the
    request, its siblings and past responses), `prompt_lookup:<tokens>` (n-gram match in its own text),
    `adaptive:<tokens>` (for each request the drafter and the number of tokens, at most so many, that pay for
    themselves), or `off`; by batch size `schedule@1=eagle:6/9=suffix:4/33=off`, or arms of a bandit,
    `beg-mab@1=eagle:6|suffix:8/9=eagle:3|suffix:4`; or arms for a learned model of costs,
    `cost-model@eagle:2|eagle:6|suffix:8` (docs/speculation.md)."""
    max_running_requests: int | None = None
    """Speculate in engine steps with at most this many running requests (the long tail); None means always."""
    drafter: tuple[str, ...] | None = None
    """Directories of EAGLE heads (config.json, model.safetensors) for the policy: strategies name them `eagle`,
    `eagle2`, ...; `adaptive` chooses among them. The first is the one that follows the policy."""
    drafts: Literal["coupled", "one-hot", "sampled", "auto"] = "coupled"
    """How a learned drafter's tokens are chosen: drawn from its own distribution with the numbers that the policy will
    draw with (coupled) or its best token (one-hot), which both leave each response token for token as without
    speculation; or drawn independently and verified by rejection sampling (sampled), which leaves its distribution.
    `auto`: for each temperature the one that stands most often at the positions that were verified lately."""
    history_mib: int = 64
    """MiB of host memory on each rank for responses of past iterations, which suffix drafts and expected lengths are
    taken from; 0 keeps none."""
    collapse_frac: float = 0.5
    """A newly loaded drafter whose acceptance rate falls below this share of its predecessor's is withdrawn."""
    hidden_states_mib: int = 0
    """MiB of host memory on each rank for hidden states of finished responses, the drafter's training data; 0 keeps
    none."""
    startup_profile: Literal["on", "off"] = "on"
    """Where a strategy weighs what engine steps cost (`adaptive`, `cost-model`), time some of each size before a run's
    first rollout: a few seconds. A resumed run goes on with the prices that it has."""

    def __post_init__(self):
        require(
            self.max_running_requests is None or self.max_running_requests >= 1,
            "--spec-max-running-requests",
            self.max_running_requests,
            "at least 1",
        )
        require(self.history_mib >= 0, "--spec-history-mib", self.history_mib, "at least 0")
        require(0 <= self.collapse_frac < 1, "--spec-collapse-frac", self.collapse_frac, "in [0, 1)")
        require(self.hidden_states_mib >= 0, "--spec-hidden-states-mib", self.hidden_states_mib, "at least 0")
