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

    def choose(self, num_running: int, *, num_planned: int) -> tuple[SpecStrategy, Prices]:
        """For a step with so many running requests: the strategy, and what a router is to weigh with that has planned
        `num_planned` draft tokens last. Collective over the replica's ranks."""
        strategy = self.policy.choose(num_running)
        prices = self.costs.prices(num_running, num_planned) if strategy.method == ADAPTIVE else NO_PRICES
        return self.agree((strategy, prices))

    def observe(self, step: DecodeStep) -> None:
        """Learn what this rank measured."""
        self.costs.observe_step(step.num_verified, step.verify_s)
        self.policy.observe(step)
