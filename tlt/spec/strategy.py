"""What may be chosen for an engine step: `<method>:<draft tokens>` or `off`."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

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
    if method not in methods or not count.isdigit() or not 1 <= int(count) <= MAX_DRAFT_TOKENS:
        raise ValueError(
            f"{flag} must be `off` or `<method>:<draft tokens>` with a method of "
            f"{', '.join(method for method in methods if method not in HEADS[1:])} (or eagle2, ...) and "
            f"1 to {MAX_DRAFT_TOKENS} tokens, got {text!r}"
        )
    return SpecStrategy(method=method, num_draft_tokens=int(count))


class StrategyPolicy(Protocol):
    """Chooses the strategy of each engine step. Choices are made on a replica's first rank and broadcast."""

    max_draft_tokens: int
    """No step drafts more; 0 means that speculation is never on."""

    def choose(self, num_running: int) -> SpecStrategy:
        """For an engine step with so many running requests."""

    def observe(self, strategy: SpecStrategy, *, num_running: int, num_tokens: int, seconds: float) -> None:
        """A decoding step that verified the strategy's drafts gave `num_tokens` in `seconds`, drafting included."""


class FixedStrategy:
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

    def observe(self, strategy: SpecStrategy, *, num_running: int, num_tokens: int, seconds: float) -> None:
        """Learns nothing."""


def rising_from_one(batches: Sequence[int]) -> list[int]:
    """Smallest batches of buckets that cover all sizes. Raises ValueError where they do not."""
    if not batches or batches[0] != 1 or any(a >= b for a, b in pairwise(batches)):
        raise ValueError(f"batch sizes must rise from 1, got {[*batches]}")
    return list(batches)


class Schedule:
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

    def observe(self, strategy: SpecStrategy, *, num_running: int, num_tokens: int, seconds: float) -> None:
        """Learns nothing."""
