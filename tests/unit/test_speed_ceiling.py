"""What perfect or free drafts could come to, on costs whose answer is known."""

import pytest

from tlt.spec.recording import RecordedRollout
from tlt.spec.strategy import DecodeStep, parse_strategy
from tools.speed_ceiling import decode_s, foreseen_s, ratios, rows


def cost(base: float, each: float):
    return lambda size: base + each * size


def test_perfect_free_drafts_give_a_step_for_as_many_tokens_as_are_drafted_and_one():
    alike = {"stands": 1.0, "pass_s": 0.0}
    assert decode_s([19, 10], cost(1.0, 0.0), counts=(0,), **alike) == pytest.approx(18.0)
    assert decode_s([19, 10], cost(1.0, 0.0), counts=range(9), **alike) == pytest.approx(2.0)
    assert decode_s([19], cost(1.0, 0.0), counts=range(9), stands=1.0, pass_s=0.5) == pytest.approx(2 * (1 + 8 * 0.5))


def test_where_a_token_costs_as_much_as_a_step_nothing_is_drafted():
    drafted = decode_s([30, 30, 5], cost(0.0, 1.0), stands=0.9, pass_s=0.0, counts=range(9))
    assert drafted == pytest.approx(decode_s([30, 30, 5], cost(0.0, 1.0), stands=0.9, pass_s=0.0, counts=(0,)))


def test_foresight_pays_for_nothing_in_vain():
    drafted = {"stands": 0.5, "pass_s": 1.0}
    for seed in range(20):
        assert foreseen_s([2], cost(1.0, 0.0), **drafted, longest=4, seed=seed) <= 1.0
        known = foreseen_s([40, 40], cost(0.5, 0.5), **drafted, longest=4, seed=seed)
        assert 39 <= known < decode_s([40, 40], cost(0.5, 0.5), **drafted, counts=(2,))
    assert foreseen_s([19], cost(1.0, 0.0), stands=1.0, pass_s=0.0, longest=8, seed=1) == 2.0
    assert foreseen_s([19], cost(1.0, 0.0), stands=0.0, pass_s=0.0, longest=8, seed=1) == 18.0


def test_a_rollout_lasts_as_long_as_its_slowest_rank():
    assert ratios([4.0, 2.0, 6.0, 6.0], [1.0, 2.0, 1.0, 3.0], num_ranks=2) == (2.0, 2.0)


def test_a_recording_gives_costs_lengths_and_what_was_measured():
    strategy = parse_strategy("eagle:1", "x")
    steps = tuple(
        DecodeStep(
            strategy=strategy, num_running=1, drafted=(1,) * count, accepted=(1,) * count, draft_s=0.25, verify_s=1.0
        )
        for count in (0, 1, 1, 1)
    )  # fmt: skip
    recorded = [RecordedRollout(policy="eagle:1", steps=steps, response_tokens=(9,))]
    found = {name: median for name, median, _ in rows(recorded, num_ranks=1, stands=0.5, pass_s=0.25, longest=1)}
    assert found == {
        "every draft stands, drafts are free": 2.0,
        "0.5 of a token stands, drafts are free": pytest.approx(8 / 6),
        "0.5 of a token stands, 250 ms a pass, it is foreseen which": pytest.approx(1.25, abs=0.2),
        "0.5 of a token stands, 250 ms a pass, best length for so many requests": pytest.approx(8 / (6 * 1.25)),
        "0.5 of a token stands, 250 ms a pass, best single length": pytest.approx(8 / (6 * 1.25)),
        "measured, eagle:1": pytest.approx(8 / 5),
    }
