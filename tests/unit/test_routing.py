"""How many tokens drafters are asked for: what a route says, or as many as can be where a draft ends itself."""

from types import SimpleNamespace

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
