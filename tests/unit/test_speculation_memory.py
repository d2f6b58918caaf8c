"""What speculation learned goes through a checkpoint's file and decides on as before."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tlt.drafter.router import SUFFIX, Candidate, DraftRouter
from tlt.rollout.vllm.speculation import NoSpeculation
from tlt.run_state import SPECULATION, read_speculation, write_speculation
from tlt.spec.cost_model import CostModel
from tlt.spec.policy import parse_policy
from tlt.spec.replay import Prospects
from tlt.spec.step_model import stated_model
from tlt.types import OFF


def through_a_file(state: dict, folder) -> dict:
    write_speculation(folder, SimpleNamespace(state_dict=lambda: state))
    return read_speculation(folder)


def test_prices_are_saved(tmp_path):
    costs = CostModel()
    for index in range(100):
        costs.observe_step(1 + index % 30, 0.016 + 0.0015 * (1 + index % 30) + 1e-5 * index)
        costs.observe_pass("eagle", 1 + index % 8, 0.002)
        costs.observe_rate(1 + index % 4, 2 + index % 3, 0.02)
    found = CostModel()
    found.load_state_dict(through_a_file(costs.state_dict(), tmp_path))
    for each in (costs, found):
        each.observe_step(12, 0.05)
    for size in range(1, 40):
        restored, own = (each.prices(size, 2 * size, max_draft_tokens=8 * size) for each in (found, costs))
        assert restored == own
    assert found.prices(4, 8, max_draft_tokens=8).rate is not None


def taught_router(heads: list[str]) -> DraftRouter:
    rng = np.random.default_rng(4)
    router = DraftRouter(heads, max_draft_tokens=6)
    router.begin({"p": "sums", "q": "stories"})
    router.step = 1000
    for index in range(300):
        router.verified(
            rng.choice([SUFFIX, *heads]), request=f"{'pq'[index % 2]}#{index % 5}", group="pq"[index % 2],
            is_random=bool(index % 3), match_length=int(rng.integers(1, 20)), confidences=rng.uniform(0, 1, 4),
            num_stood=int(rng.integers(5)),
        )  # fmt: skip
    return router


def test_calibrations_and_the_trust_in_sources_are_saved(tmp_path):
    router = taught_router(["eagle", "eagle2"])
    found = DraftRouter(["eagle", "eagle2"], max_draft_tokens=6)
    found.load_state_dict(through_a_file(router.state_dict(), tmp_path))
    costs = CostModel()
    for size, seconds in ((1, 0.018), (8, 0.028), (40, 0.076)):
        costs.observe_step(size, seconds)
    for name in ("eagle", "eagle2"):
        costs.observe_pass(name, 1, 0.002)
    rng = np.random.default_rng(5)
    candidates = [
        Candidate(name=f"{group}#9", group=group, room=6, is_random=True, match_length=4, probs=rng.uniform(0, 1, 5))
        for group in "pqpq"
    ]
    plans = []
    for each in (router, found):
        each.begin({"p": "sums", "q": "stories"})
        plans.append(
            [each.plan(candidates, costs.prices(4, 8, max_draft_tokens=24), num_running=4) for _ in range(100)]
        )
    assert plans[0] == plans[1]
    assert any(any(routes) for routes in plans[0])
    fresh = DraftRouter(["eagle", "eagle2"], max_draft_tokens=6)
    fresh.begin({"p": "sums", "q": "stories"})
    assert fresh.factor("eagle", "p#9", "p") == 1 != found.factor("eagle", "p#9", "p")


def test_a_router_of_other_heads_takes_what_it_knows():
    saved = taught_router(["eagle", "eagle2"]).state_dict()
    other = DraftRouter(["eagle"], max_draft_tokens=6)
    other.load_state_dict(saved)
    assert set(other.calibrations) == {(name, kind) for name in (SUFFIX, "eagle") for kind in (False, True)}
    assert other.state_dict()["tables"] == [row for row in saved["tables"] if row["drafter"] != "eagle2"]
    none = DraftRouter([], max_draft_tokens=6)
    none.load_state_dict(saved)
    none.begin({"p": "sums"})
    assert none.factor(SUFFIX, "p#0", "p") != 1


@pytest.mark.parametrize("text", ["beg-mab@1=eagle:2|suffix:4/5=eagle:2", "cost-model@eagle:2|eagle:4|suffix:4"])
def test_what_a_policy_learned_is_saved(tmp_path, text):
    policy, strategies = parse_policy(text, "test", seed=1)
    prospects = Prospects(stated_model(), (*strategies, OFF), max_requests=16, share=1.0)
    rng = np.random.default_rng(1)

    def play(policy, size: int):
        arm = policy.choose(size)
        policy.observe(prospects.play(arm, size, 1.0, rng)[0])
        return arm

    for index in range(400):
        play(policy, 1 + index % 16)
    found, _ = parse_policy(text, "test", seed=1)
    found.load_state_dict(through_a_file(policy.state_dict(), tmp_path))
    assert found.state_dict() == policy.state_dict()
    for each in (policy, found):
        each.epsilon = 0.0  # the bandit's dice begin anew
    assert [found.choose(n) for n in range(1, 17)] == [policy.choose(n) for n in range(1, 17)]
    assert play(found, 3) in strategies


def test_nothing_is_saved_where_nothing_was_learned(tmp_path):
    write_speculation(tmp_path, NoSpeculation())
    assert not (tmp_path / SPECULATION).exists()
    assert read_speculation(tmp_path) == {}
    for text in ("off", "eagle:4", "schedule@1=eagle:4/9=off", "adaptive:8"):
        assert json.dumps(parse_policy(text, "test")[0].state_dict()) == "{}"
