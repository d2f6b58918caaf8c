"""What an engine step costs and what its drafts come to: stated, or fitted to a recording.

A step's time is a curve over verified tokens times measured noise; a drafter's pass is a curve over the batch; drafts
stand depth by depth, each request and step on its own. Not modelled: prompts, contexts that grow, requests that
differ. Shapes: K draft tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tlt.spec.cost_model import Curve
from tlt.spec.cost_policy import num_passes
from tlt.spec.recording import RecordedRollout
from tlt.spec.strategy import ADAPTIVE, HEADS, DecodeStep
from tlt.types import OFF, SpecStrategy

NUM_STATED_NOISES = 2000


class Times(Protocol):
    """Seconds by size."""

    def seconds(self, size: float) -> float:
        """Of that size."""


@dataclass(frozen=True)
class Line:
    """`Times` that rise evenly: `base_s` and so much for each of the size."""

    base_s: float
    each_s: float

    def seconds(self, size: float) -> float:
        return self.base_s + self.each_s * size


@dataclass(frozen=True, kw_only=True)
class DrafterModel:
    """One drafter."""

    covers: tuple[float, ...]  # [K] probability that a request gets a draft of at least so many tokens
    stands: tuple[float, ...]  # [K] probability that a token stands where it was drafted and those before it stand
    passes: Times
    """One pass, by running requests."""

    def rates(self, num_draft_tokens: int, *, share: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """([K] covers, [K] probability that a drafted token and all before it stand); the last known depth goes on.
        `share` of its acceptance is left."""
        covers, stands = (
            np.array([*known, *[known[-1]] * num_draft_tokens])[:num_draft_tokens]
            for known in (self.covers, self.stands)
        )
        return covers, np.cumprod(share * stands)


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """One engine on one machine."""

    steps: Times
    """A step without its drafting, by verified tokens."""
    drafters: Mapping[str, DrafterModel]
    noise: np.ndarray
    """Samples of a step's time over its curve's."""

    def first_head(self) -> DrafterModel | None:
        """The first head of those that drafted alone."""
        return next((self.drafters[name] for name in HEADS if name in self.drafters), None)

    def expected(self, arm: SpecStrategy, num_running: int, *, share: float = 1.0) -> tuple[float, float]:
        """(tokens, seconds) of a step on average."""
        noise = float(self.noise.mean())
        if arm == OFF:
            return num_running, noise * self.steps.seconds(num_running)
        drafter = self.drafters[arm.method]
        covers, stands = drafter.rates(arm.num_draft_tokens, share=share)
        verify_s = noise * self.steps.seconds(num_running * (1 + float(covers.sum())))
        tokens = num_running * (1 + float((covers * stands).sum()))
        return tokens, verify_s + num_passes(arm) * drafter.passes.seconds(num_running)


def stated_model() -> StepModel:
    """Without a recording, of the size of a small model on a CPU core: a step is 16 ms and 1.5 ms for each verified
    token, times a lognormal noise of 5 % with a step in a hundred at twice its time; a pass of the head is 2 ms, and
    its tokens stand with .84, .82, .76, .74 by depth; the suffix drafter has a draft for 40 % of requests, in 50 us,
    whose tokens stand with .75."""
    rng = np.random.default_rng(0)
    noise = rng.lognormal(0.0, 0.05, NUM_STATED_NOISES) * np.where(rng.random(NUM_STATED_NOISES) < 0.01, 2.0, 1.0)
    return StepModel(
        steps=Line(0.016, 0.0015),
        drafters={
            "eagle": DrafterModel(covers=(1.0,), stands=(0.84, 0.82, 0.76, 0.74), passes=Line(0.002, 0.0)),
            "suffix": DrafterModel(covers=(0.4,), stands=(0.75,), passes=Line(50e-6, 0.0)),
        },
        noise=noise,
    )


def fit_model(rollouts: Sequence[RecordedRollout]) -> StepModel:
    """Of a recording; steps under `adaptive`, whose drafters are mixed, tell of step times alone. Raises ValueError
    where nothing was decoded."""
    steps = [step for rollout in rollouts for step in rollout.steps]
    if not steps:
        raise ValueError("the recording has no step that decoded")
    times = Curve(window=None)
    for step in steps:
        times.observe(step.num_verified, step.verify_s)
    by_method: dict[str, list[DecodeStep]] = {}
    for step in steps:
        if step.strategy.method not in (OFF.method, ADAPTIVE):
            by_method.setdefault(step.strategy.method, []).append(step)
    return StepModel(
        steps=times,
        drafters={method: fit_drafter(found) for method, found in by_method.items()},
        noise=np.array([step.verify_s / times.seconds(step.num_verified) for step in steps]),
    )


def fit_drafter(steps: Sequence[DecodeStep]) -> DrafterModel:
    """Of the steps that verified its drafts, at least one."""
    passes = Curve(window=None)
    longest = max(step.strategy.num_draft_tokens for step in steps)
    requests, drafted, stood = np.zeros((3, longest))
    for step in steps:
        passes.observe(step.num_running, step.draft_s / num_passes(step.strategy))
        requests[: step.strategy.num_draft_tokens] += step.num_running
        drafted[: len(step.drafted)] += step.drafted
        stood[: len(step.accepted)] += step.accepted
    covers = drafted / requests
    # A draft's length is taken to say nothing about its tokens: then all before depth d stand, of those drafted to d,
    # as often as of those drafted to d - 1.
    chain = np.divide(stood, drafted, out=np.zeros(longest), where=drafted > 0)
    before = np.concatenate([[1.0], chain[:-1]])
    stands = np.divide(chain, before, out=np.zeros(longest), where=before > 0)
    return DrafterModel(covers=tuple(covers), stands=tuple(np.minimum(stands, 1.0)), passes=passes)
