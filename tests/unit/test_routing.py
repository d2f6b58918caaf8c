"""How many tokens drafters are asked for: what a route says, or as many as can be where a draft ends itself."""

from types import SimpleNamespace

import numpy as np
import pytest

from tlt.drafter.router import Route
from tlt.rollout.vllm.learned_drafter import DraftRequest
from tlt.rollout.vllm.routing import AdaptiveRouting
from tlt.spec.strategy import parse_strategy

pytestmark = pytest.mark.engine


class Router:
    """Sends its first request to a head for 2 tokens, the second to the suffix drafter."""

    max_draft_tokens = 8

    def __init__(self, *, is_probe: bool):
        self.is_probe = is_probe

    def plan(self, candidates, prices, *, num_running):
        return [Route(drafter="eagle", num_draft_tokens=2), Route(drafter="suffix", num_draft_tokens=3), None]


@pytest.mark.parametrize(
    ("ends_early", "is_probe", "room", "asked"),
    [(True, False, 20, 6), (True, False, 4, 4), (True, True, 20, 2), (False, False, 20, 2)],
)
def test_a_head_that_ends_its_drafts_is_asked_for_all_there_is_room_for(ends_early, is_probe, room, asked):
    requests = [
        DraftRequest(row=row, request_id=f"{row}", name=f"p#{row}", num_tokens=9, num_draft_tokens=room,
                     temperature=1.0, seed=0)
        for row in range(3)
    ]  # fmt: skip
    nothing = SimpleNamespace(match_length=0, probs=[])
    suffix = SimpleNamespace(look_up=lambda requests: {request.request_id: nothing for request in requests})
    head = SimpleNamespace(name="eagle", ends_early=ends_early)
    routing = AdaptiveRouting(Router(is_probe=is_probe), suffix, [head], agree=lambda value: value)
    plan = routing.plan(requests, parse_strategy("adaptive:6", "test"))
    found = {name: [request.num_draft_tokens for request in own] for name, own in plan.items()}
    assert found == {"eagle": [asked], "suffix": [3]}


@pytest.mark.parametrize("ends_early", [True, False])
def test_ranks_agree_on_each_token_only_where_passes_wait_for_it(ends_early):
    agreed = []

    def agree(value):
        agreed.append(value)
        return value

    router = SimpleNamespace(
        factor=lambda *names: 1.0, stands=lambda name, depth, is_random, confidences: confidences,
        goes_on=lambda name, depth, standing, is_random, factors: standing > 0.5,
    )  # fmt: skip
    head = SimpleNamespace(name="eagle", ends_early=ends_early)
    limit = AdaptiveRouting(router, None, [head], agree=agree).limits[True]
    limit.begin("eagle", [SimpleNamespace(temperature=1.0, name=f"p#{row}", group="p") for row in range(2)])
    assert limit.goes_on(np.arange(2), np.array([0.9, 0.1])).tolist() == [True, False]
    assert bool(agreed) is ends_early
