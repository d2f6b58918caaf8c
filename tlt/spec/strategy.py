"""What may be chosen for an engine step: `<method>:<draft tokens>` or `off`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from tlt.config.requirement import is_count
from tlt.types import OFF, SpecStrategy

ADAPTIVE = "adaptive"
"""Each request gets the drafter and the length that pay for it (tlt/drafter/router.py), at most so many tokens."""
MAX_HEADS = 8
HEADS = ("eagle", *(f"eagle{number}" for number in range(2, MAX_HEADS + 1)))
"""Names of learned drafters, in the order in which they are given."""
METHODS = (*HEADS, "prompt_lookup", "suffix", ADAPTIVE)
MAX_DRAFT_TOKENS = 32


def parse_strategy(text: str, flag: str, *, methods: tuple[str, ...] = METHODS) -> SpecStrategy:
    """Raises ValueError naming the flag."""
    if text == "off":
        return OFF
    method, _, count = text.partition(":")
    if method not in methods or not is_count(count) or not 1 <= int(count) <= MAX_DRAFT_TOKENS:
        raise ValueError(
            f"{flag} must be `off` or `<method>:<draft tokens>` with a method of "
            f"{', '.join(method for method in methods if method not in HEADS[1:])} (or eagle2, ...) and "
            f"1 to {MAX_DRAFT_TOKENS} tokens, got {text!r}"
        )
    return SpecStrategy(method=method, num_draft_tokens=int(count))


@dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """An engine step that read no prompts: what it verified, what came of it, how long that took. K draft tokens."""

    strategy: SpecStrategy
    """That made the drafts it verified."""
    num_running: int
    drafted: tuple[int, ...] = ()  # [K] requests whose draft had a token at each position
    accepted: tuple[int, ...] = ()  # [K] requests whose draft stood up to there
    draft_s: float
    """Spent on making the drafts, at the end of the step before."""
    verify_s: float
    """The step without the drafts that were made at its own end."""

    @property
    def num_verified(self) -> int:
        """Tokens that went through the policy, one of each request included."""
        return self.num_running + sum(self.drafted)

    @property
    def num_tokens(self) -> int:
        """Tokens that came of it."""
        return self.num_running + sum(self.accepted)

    @property
    def seconds(self) -> float:
        return self.draft_s + self.verify_s


class StrategyPolicy(Protocol):
    """Chooses the strategy of each engine step. Choices are made on a replica's first rank and broadcast."""

    max_draft_tokens: int
    """No step drafts more; 0 means that speculation is never on."""

    def choose(self, num_running: int) -> SpecStrategy:
        """For an engine step with so many running requests."""

    def arms(self, num_running: int) -> Sequence[SpecStrategy]:
        """All that `choose` may ever say for so many."""

    def observe(self, step: DecodeStep) -> None:
        """Learn from a step that decoded."""

    def state_dict(self) -> dict:
        """What was learned, JSON types; {} for nothing."""

    def load_state_dict(self, state: Mapping) -> None:
        """Go on with what a policy of the same text gave."""


class LearnsNothing:
    """What policies share that are pure functions of the batch size."""

    def arms(self: StrategyPolicy, num_running: int) -> Sequence[SpecStrategy]:
        """All that `choose` may ever say for so many."""
        return (self.choose(num_running),)

    def observe(self, step: DecodeStep) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict:
        """Nothing was learned."""
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        """Nothing to go on with."""


class FixedStrategy(LearnsNothing):
    """One strategy while at most `max_running_requests` run, off above; a pure function of what all ranks know."""

    def __init__(self, strategy: SpecStrategy, *, max_running_requests: int | None = None):
        self.strategy = strategy
        self.max_running_requests = max_running_requests

    @property
    def max_draft_tokens(self) -> int:
        """No step drafts more; 0 means that speculation is never on."""
        return self.strategy.num_draft_tokens

    def choose(self, num_running: int) -> SpecStrategy:
        """For an engine step with so many running requests."""
        if self.max_running_requests is not None and num_running > self.max_running_requests:
            return OFF
        return self.strategy


def rising_from_one(batches: Sequence[int]) -> list[int]:
    """Smallest batches of buckets that cover all sizes. Raises ValueError where they do not."""
    if not batches or batches[0] != 1 or any(a >= b for a, b in pairwise(batches)):
        raise ValueError(f"batch sizes must rise from 1, got {[*batches]}")
    return list(batches)


class Schedule(LearnsNothing):
    """A strategy for each range of batch sizes, as vLLM's own table of draft lengths by batch size."""

    def __init__(self, rows: Sequence[tuple[int, SpecStrategy]]):
        """(smallest batch, strategy), rising from 1; ValueError otherwise."""
        rising_from_one([first for first, _ in rows])
        self.rows = list(rows)

    @property
    def max_draft_tokens(self) -> int:
        return max(strategy.num_draft_tokens for _, strategy in self.rows)

    def choose(self, num_running: int) -> SpecStrategy:
        return [strategy for first, strategy in self.rows if first <= max(num_running, 1)][-1]
