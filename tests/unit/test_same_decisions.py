"""Ranks of a tensor-parallel replica decide alike for 10,000 steps though their clocks do not: policies behind the
controller, the router behind its prices. Not covered: the broadcast itself (tests/engine/test_speculation.py)."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tlt.drafter.router import Candidate, DraftRouter
from tlt.spec.controller import Controller
from tlt.spec.policy import parse_policy
from tlt.spec.replay import Prospects
from tlt.spec.step_model import stated_model
from tlt.types import OFF

SKEWS = (1.0, 3.0, 0.2, 1.1)
"""Of the ranks' clocks."""
NUM_STEPS = 10_000


class Broadcast:
    """Ranks called one after the other, the first one first: what it says is what the others hear."""

    def __init__(self, num_ranks: int):
        self.heard: list[deque] = [deque() for _ in range(num_ranks - 1)]
        self.num_overruled = 0

    def of(self, rank: int) -> Callable:
        def say(value):
            for each in self.heard:
                each.append(value)
            return value

        def hear(value):
            told = self.heard[rank - 1].popleft()
            self.num_overruled += told != value
            return told

        return hear if rank else say

    def all_were_heard(self) -> bool:
        return not any(self.heard)


def batch_sizes(rng: np.random.Generator):
    """Rollouts of up to 32 requests that end one by one."""
    while True:
        for size in range(int(rng.integers(8, 33)), 0, -1):
            yield from [size] * int(rng.integers(1, 12))


@pytest.mark.parametrize(
    "text", ["beg-mab@1=eagle:6|suffix:8/5=eagle:2|suffix:4", "cost-model@eagle:2|eagle:6|suffix:4|suffix:8"]
)
def test_policies_that_measure_other_times_choose_the_same(text):
    rng = np.random.default_rng(7)
    broadcast = Broadcast(len(SKEWS))
    ranks = [
        Controller(parse_policy(text, "test", seed=rank)[0], agree=broadcast.of(rank)) for rank in range(len(SKEWS))
    ]
    arms = (*parse_policy(text, "test")[1], OFF)
    prospects = Prospects(stated_model(), arms, max_requests=32, share=1.0)
    chosen = []
    for _, size in zip(range(NUM_STEPS), batch_sizes(rng), strict=False):
        decisions = [rank.choose(size, num_planned=0, max_draft_tokens=8 * size) for rank in ranks]
        assert decisions.count(decisions[0]) == len(ranks)
        assert broadcast.all_were_heard()
        chosen.append(decisions[0][0])
        step, _ = prospects.play(chosen[-1], size, 1.0, rng)
        for rank, skew in zip(ranks, SKEWS, strict=True):
            jitter = skew * rng.lognormal(0, 0.3)
            rank.observe(replace(step, draft_s=jitter * step.draft_s, verify_s=jitter * step.verify_s))
    assert broadcast.num_overruled > NUM_STEPS // 100, "left to themselves the ranks would part"
    assert len(set(chosen)) == len(arms)


def test_routers_that_are_told_prices_plan_the_same():
    rng = np.random.default_rng(8)
    skews = SKEWS[:2]
    broadcast = Broadcast(len(skews))
    ranks = [Controller(parse_policy("adaptive:6", "test")[0], agree=broadcast.of(rank)) for rank in range(len(skews))]
    routers = [DraftRouter(["eagle"], max_draft_tokens=6) for _ in ranks]
    model = stated_model()
    num_drafts = 0
    for _, size in zip(range(NUM_STEPS), batch_sizes(rng), strict=False):
        size = min(size, 4)
        candidates = [
            Candidate(
                name=f"p#{row}", group="p", room=8, is_random=True, match_length=int(rng.integers(1, 20)),
                probs=rng.uniform(0.2, 1, 6),
            ) for row in range(size)
        ]  # fmt: skip
        plans, cuts = [], []
        for rank, router in zip(ranks, routers, strict=True):
            router.source_of = {"p": "tests"}
            _, prices = rank.choose(size, num_planned=router.num_planned, max_draft_tokens=6 * size)
            plans.append(router.plan(candidates, prices, num_running=size))
            routed = [(one, route) for one, route in zip(candidates, plans[-1], strict=True) if route]
            standings = [
                router.standing(
                    route.drafter, request=one.name, group="p", is_random=True, match_length=one.match_length,
                    confidences=np.full(route.num_draft_tokens, 0.8),
                ) for one, route in routed
            ]  # fmt: skip
            cuts.append(router.cut(standings, [False] * len(routed)))
        assert plans.count(plans[0]) == cuts.count(cuts[0]) == len(ranks)
        assert broadcast.all_were_heard()
        num_tokens = size
        for (one, route), count in zip(routed, cuts[0], strict=True):
            num_drafts += count > 0
            num_tokens += count
            num_stood = int(rng.integers(count + 1))
            for router in routers:
                router.verified(
                    route.drafter, request=one.name, group="p", is_random=True, match_length=one.match_length,
                    confidences=np.full(count, 0.8), num_stood=num_stood,
                )  # fmt: skip
        for rank, skew in zip(ranks, skews, strict=True):
            rank.costs.observe_step(num_tokens, skew * rng.lognormal(0, 0.3) * model.steps.seconds(num_tokens))
            rank.costs.observe_pass("eagle", size, skew * 0.002)
            rank.costs.observe_rate(size, num_tokens, skew * rng.lognormal(0, 0.3) * 0.02)
    assert broadcast.num_overruled > NUM_STEPS // 2
    assert num_drafts > NUM_STEPS // 10
