"""Decides for each engine step, on a replica's first rank, what is drafted; the other ranks hear it.

Ranks measure other times, so their policies and prices drift apart; what is acted on is the first rank's alone. Knows
neither an engine nor a clock.
"""

from collections.abc import Callable
from typing import Any

from tlt.spec.cost_model import NO_PRICES, CostModel, Prices
from tlt.spec.strategy import ADAPTIVE, DecodeStep, StrategyPolicy
from tlt.types import SpecStrategy


class Controller:
    """Of one engine. `agree` makes a value of the replica's first rank that of all its ranks; all must call alike."""

    def __init__(self, policy: StrategyPolicy, *, agree: Callable[[Any], Any]):
        self.policy = policy
        self.agree = agree
        self.costs = CostModel()

    def choose(
        self, num_running: int, *, num_planned: int, max_draft_tokens: int
    ) -> tuple[SpecStrategy, Prices]:  # fmt: skip
        """For a step with so many running requests: the strategy, and what a router is to weigh with that has planned
        `num_planned` draft tokens last and plans `max_draft_tokens` at most. Collective over the replica's ranks."""
        strategy, prices = self.policy.choose(num_running), NO_PRICES
        if strategy.method == ADAPTIVE:
            prices = self.costs.prices(num_running, num_planned, max_draft_tokens=max_draft_tokens)
        return self.agree((strategy, prices))

    def observe(self, step: DecodeStep) -> None:
        """Learn what this rank measured."""
        self.costs.observe_step(step.num_verified, step.verify_s)
        if step.strategy.method == ADAPTIVE:
            self.costs.observe_rate(step.num_running, step.num_tokens, step.seconds)
        self.policy.observe(step)
