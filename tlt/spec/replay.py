"""Rollouts of a model of the engine under any policy, and what its choices lost against those of an oracle.

The oracle knows the model as it is at the moment and takes at each batch size the arm with the most expected tokens a
second. A step's regret is the seconds that its arm takes on average beyond those in which the oracle would have got
as many tokens; it does not depend on how the step's dice fell. A choice takes effect at once, in the engine one step
later. Shapes: B requests, K draft tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from tlt.spec.cost_policy import num_passes
from tlt.spec.step_model import StepModel
from tlt.spec.strategy import HEADS, DecodeStep, StrategyPolicy
from tlt.types import OFF, SpecStrategy

NUM_NOISES = 1024
"""Drawn for a rollout; a longer one meets them again."""

Lengths = Callable[[np.random.Generator, int], np.ndarray]
"""Draws so many response lengths, in tokens."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What updates of the policy do to learned drafters: `fall` of their acceptance is lost every `period` iterations,
    and all but 1/e of that is back after `recovery` iterations. Other drafters read the policy's own text."""

    fall: float = 0.4
    recovery: float = 5.0
    period: int = 20

    def share(self, iteration: int) -> float:
        """Of a head's acceptance that is there in an iteration."""
        return 1 - self.fall * float(np.exp(-(iteration % self.period) / self.recovery))


def heavy_tailed(median: float, sigma: float, longest: int) -> Lengths:
    """Lognormal, cut at the response limit as rollouts are."""

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        return np.clip(rng.lognormal(np.log(median), sigma, count), 1, longest).astype(int)

    return draw


def as_recorded(lengths: Sequence[int]) -> Lengths:
    """Drawn from real ones, with replacement."""
    values = np.array(lengths)
    return lambda rng, count: rng.choice(values, count)


class Prospects:
    """What each arm would bring at each batch size, at one moment of the drift."""

    def __init__(self, model: StepModel, arms: Sequence[SpecStrategy], *, max_requests: int, share: float):
        self.model = model
        self.share = share
        sizes = range(1, max_requests + 1)
        expected = {arm: [model.expected(arm, size, share=self._share_of(arm)) for size in sizes] for arm in arms}
        self.best = [OFF, *(max(arms, key=lambda arm, i=size - 1: rate(*expected[arm][i])) for size in sizes)]
        """Arm by batch size."""
        best_rates = [rate(*expected[self.best[size]][size - 1]) for size in sizes]
        self.loss_s = {
            arm: [0.0, *(seconds - tokens / best for (tokens, seconds), best in zip(rows, best_rates, strict=True))]
            for arm, rows in expected.items()
        }  # fmt: skip
        """Regret of a step by arm and batch size."""
        self.rates = {
            arm: tuple(rates[::-1].copy() for rates in model.drafters[arm.method].rates(
                arm.num_draft_tokens, share=self._share_of(arm)
            )) for arm in arms if arm != OFF
        }  # fmt: skip
        """By arm, rising: [K] covers, [K] probability that all before a depth stand."""

    def _share_of(self, arm: SpecStrategy) -> float:
        return self.share if arm.method in HEADS else 1.0

    def play(
        self, arm: SpecStrategy, num_running: int, noise: float, rng: np.random.Generator
    ) -> tuple[DecodeStep, np.ndarray]:
        """(a step under the arm, [B] draft tokens that stood)."""
        if arm == OFF:
            verify_s = noise * self.model.steps.seconds(num_running)
            step = DecodeStep(strategy=arm, num_running=num_running, draft_s=0.0, verify_s=verify_s)
            return step, np.zeros(num_running, dtype=int)
        longest = arm.num_draft_tokens
        covers, stands = self.rates[arm]
        accepted = longest - np.searchsorted(stands, rng.random(num_running), side="right")
        drafted = (num_running,) * longest
        if covers[0] < 1:
            lengths = longest - np.searchsorted(covers, rng.random(num_running), side="right")
            accepted = np.minimum(accepted, lengths)
            drafted = at_least(lengths, longest)
        step = DecodeStep(
            strategy=arm, num_running=num_running, drafted=drafted, accepted=at_least(accepted, longest),
            draft_s=num_passes(arm) * self.model.drafters[arm.method].passes.seconds(num_running),
            verify_s=noise * self.model.steps.seconds(num_running + sum(drafted)),
        )  # fmt: skip
        return step, accepted


def rate(tokens: float, seconds: float) -> float:
    """Tokens a second."""
    return tokens / seconds


def at_least(counts: np.ndarray, longest: int) -> tuple[int, ...]:
    """[K] how many of the counts reach 1, 2, ... `longest`."""
    return tuple(np.bincount(counts, minlength=longest + 1)[:0:-1].cumsum()[::-1].tolist())


@dataclass(frozen=True, kw_only=True)
class World:
    """What a policy is replayed in."""

    model: StepModel
    arms: tuple[SpecStrategy, ...]
    """The oracle's: all that any of the policies to compare may choose."""
    drift: Drift
    lengths: Lengths
    num_requests: int
    """That begin together in each rollout."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a policy did in so many iterations."""

    regret_s: np.ndarray  # [iterations]
    seconds: np.ndarray  # [iterations] of the rollout
    num_steps: int
    num_switches: int


def replay(policy: StrategyPolicy | None, world: World, *, iterations: int, seed: int) -> Replay:
    """Rollouts, one after the other, of the oracle where `policy` is None. Same seed, same responses to generate."""

    @cache
    def prospects_at(share: float) -> Prospects:
        return Prospects(world.model, world.arms, max_requests=world.num_requests, share=share)

    regret_s, seconds = np.zeros((2, iterations))
    num_steps = num_switches = 0
    last = OFF
    for iteration in range(iterations):
        rng = np.random.default_rng([seed, iteration])
        prospects = prospects_at(world.drift.share(iteration))
        remaining = world.lengths(rng, world.num_requests)
        noise = rng.choice(world.model.noise, NUM_NOISES).tolist()
        while num_running := len(remaining):
            arm = prospects.best[num_running] if policy is None else policy.choose(num_running)
            step, accepted = prospects.play(arm, num_running, noise[num_steps % NUM_NOISES], rng)
            if policy is not None:
                policy.observe(step)
            remaining = remaining - 1 - accepted
            remaining = remaining[remaining > 0]
            regret_s[iteration] += prospects.loss_s[arm][num_running]
            seconds[iteration] += step.seconds
            num_steps += 1
            num_switches += arm != last
            last = arm
    return Replay(regret_s=regret_s, seconds=seconds, num_steps=num_steps, num_switches=num_switches)
