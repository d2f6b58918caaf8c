"""The cost-model policy against machines and drafters whose best arm is known."""

import random

import pytest

from tlt.spec import cost_policy
from tlt.spec.cost_policy import TRIES, CostModelPolicy, Depths
from tlt.spec.policy import parse_policy
from tlt.spec.strategy import DecodeStep, parse_strategy
from tlt.types import OFF, SpecStrategy


def strategy(text: str) -> SpecStrategy:
    return parse_strategy(text, "test")


def step(
    arm: SpecStrategy, num_running: int, *, stands: float, base_s: float = 0.016, token_s: float = 0.0015,
    noise: float = 1.0,
) -> DecodeStep:  # fmt: skip
    """On a machine whose step has these prices, with drafts of which a share stands at each depth."""
    num = arm.num_draft_tokens
    accepted = tuple(round(num_running * stands ** (depth + 1)) for depth in range(num))
    return DecodeStep(
        strategy=arm, num_running=num_running, drafted=(num_running,) * num, accepted=accepted, draft_s=0.002 * num,
        verify_s=noise * (base_s + token_s * num_running * (1 + num)),
    )  # fmt: skip


def played(policy: CostModelPolicy, num_running: int, num_steps: int, **machine) -> list[str]:
    chosen = []
    for _ in range(num_steps):
        arm = policy.choose(num_running)
        chosen.append(str(arm))
        policy.observe(step(arm, num_running, **machine))
    return chosen


def test_depths_are_counted_and_what_is_unknown_is_hoped_for():
    depths = Depths()
    verified = DecodeStep(
        strategy=strategy("suffix:3"), num_running=100, drafted=(100, 50), accepted=(80, 40), draft_s=0.0,
        verify_s=0.1,
    )  # fmt: skip
    for _ in range(300):
        depths.fade()
        depths.observe(verified)
    drafted, stands = depths.expected(2)
    assert drafted == pytest.approx(1.5)
    assert stands == pytest.approx(0.8 + 0.8 * 0.5, rel=0.02)
    assert depths.expected(3)[0] == pytest.approx(1.5), "no request had a third token"
    assert depths.expected(3)[1] == pytest.approx(stands, rel=0.02), "none of those that stood twice stood again"
    assert Depths().expected(2)[1] > 0.7 + 0.7**2, "hoped for, not merely expected"
    for _ in range(8000):
        depths.fade()
    assert depths.expected(1)[1] > 0.7, "what was known is old"


def test_each_arm_is_tried_then_the_best_of_each_batch_size_is_kept():
    policy = CostModelPolicy([strategy("eagle:1"), strategy("eagle:2"), strategy("eagle:6")])
    assert set(played(policy, 1, 4 * TRIES, stands=0.85)) == {"eagle:1", "eagle:2", "eagle:6", "off"}
    assert set(played(policy, 1, 50, stands=0.85)[10:]) == {"eagle:6"}
    for num_running in range(2, 64):  # tokens a second by hand: eagle:1 1.85 n / (18 + 3 n), off n / (16 + 1.5 n)
        played(policy, num_running, 3, stands=0.85)
    assert set(played(policy, 64, 30, stands=0.85)[10:]) == {"eagle:1"}
    # A batch size at which no arm ever ran: nothing is tried anew.
    assert set(played(policy, 128, 30, stands=0.5)[20:]) == {"off"}


def test_where_drafts_never_stand_it_is_off_but_for_a_try_now_and_then():
    policy = CostModelPolicy([strategy("eagle:4"), strategy("suffix:4")])
    chosen = played(policy, 4, 4000, stands=0.0)[200:]
    assert 0 < len(chosen) - chosen.count("off") < 0.02 * len(chosen)


def test_it_follows_a_drafter_that_falls_and_recovers():
    policy = CostModelPolicy([strategy("eagle:4")])
    assert played(policy, 2, 400, stands=0.8)[-100:].count("eagle:4") == 100
    assert played(policy, 2, 600, stands=0.05)[-100:].count("off") > 90
    assert played(policy, 2, 3000, stands=0.8)[-100:].count("eagle:4") == 100


def test_noise_does_not_flip_it(monkeypatch):
    def switches() -> int:
        rng = random.Random(3)
        policy = CostModelPolicy([strategy("eagle:2"), strategy("eagle:3")])
        chosen = [played(policy, 8, 1, stands=0.7, noise=rng.lognormvariate(0, 0.3))[0] for _ in range(1000)]
        return sum(a != b for a, b in zip(chosen[100:], chosen[101:], strict=False))

    calm = switches()
    monkeypatch.setattr(cost_policy, "MARGIN", 0.0)
    assert calm < 6
    assert switches() > calm


def test_steps_of_other_strategies_teach_it_prices():
    policy = CostModelPolicy([strategy("eagle:2")])
    policy.observe(step(strategy("prompt_lookup:3"), 4, stands=0.5))
    assert policy.steps.seconds(16) == pytest.approx(0.016 + 16 * 0.0015)
    assert set(policy.num_tries.values()) == {0}


def test_it_is_named_by_its_arms():
    policy, strategies = parse_policy("cost-model@eagle:2|suffix:8", "--spec-strategy")
    assert isinstance(policy, CostModelPolicy)
    assert policy.max_draft_tokens == 8
    assert [str(arm) for arm in strategies] == ["eagle:2", "suffix:8"]
    assert OFF in policy.arms(5)
    for bad in ("cost-model@", "cost-model@adaptive:4", "cost-model@eagle:2/suffix:8"):
        with pytest.raises(ValueError, match="--spec-strategy must be"):
            parse_policy(bad, "--spec-strategy")
