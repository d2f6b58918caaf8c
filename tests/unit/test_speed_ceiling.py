"""What perfect, free or foreseen drafts could come to, on costs whose answer is known."""

from functools import partial

import pytest

from tlt.spec.recording import RecordedRollout
from tlt.spec.strategy import DecodeStep, parse_strategy
from tools.speed_ceiling import best_for_batch, decode_s, foreseen, ratios, rows, runs, single


def cost(base: float, each: float):
    return lambda size: base + each * size


def test_perfect_free_drafts_give_a_step_for_as_many_tokens_as_are_drafted_and_one():
    assert decode_s([19, 10], cost(1.0, 0.0), partial(single, 0)) == 18
    assert decode_s([19, 10], cost(1.0, 0.0), partial(best_for_batch, 1.0, 8)) == 2
    assert decode_s([19], cost(1.0, 0.0), partial(single, 8), pass_s=cost(0.5, 0.0)) == 2 * (1 + 8 * 0.5)
    assert decode_s([5], cost(1.0, 1.0), partial(single, 8)) == 1 + 4, "no draft beyond the end"


def test_where_a_token_costs_as_much_as_a_step_nothing_is_drafted():
    drafted = decode_s([30, 30, 5], cost(0.0, 1.0), partial(best_for_batch, 0.9, 8), stands=0.9)
    assert drafted == decode_s([30, 30, 5], cost(0.0, 1.0), partial(single, 0))


def test_a_run_is_as_long_as_tokens_stand_one_after_another():
    found = runs(4000, stands=0.8, longest=3, seed=2)
    assert all(now == min(following + 1, 3) or now == 0 for now, following in zip(found, found[1:], strict=False))
    assert sum(now > 0 for now in found) / 4000 == pytest.approx(0.8, abs=0.03)
    assert set(runs(9, stands=1.0, longest=3, seed=2)) == {3}


def test_foresight_verifies_nothing_in_vain():
    assert foreseen(4, [0, 3, 4], [9, 9, 1], cost(1.0, 0.1), cost(0.0, 0.0)) == [0, 3, 1]
    assert foreseen(4, [0, 4], [9, 9], cost(1.0, 0.0), cost(0.6, 0.0)) == [0, 0], "a pass for one token does not pay"
    assert foreseen(4, [4, 4], [9, 9], cost(1.0, 0.0), cost(0.6, 0.0)) == [4, 4]
    for seed in range(20):
        alike = {"stands": 0.5, "pass_s": cost(0.1, 0.0), "longest": 4, "seed": seed}
        known = decode_s([60], cost(0.5, 0.5), partial(foreseen, 4), **alike)
        guessed = [decode_s([60], cost(0.5, 0.5), partial(single, count), **alike) for count in range(5)]
        assert known < min(guessed)


def test_a_rollout_lasts_as_long_as_its_slowest_rank():
    assert ratios([4.0, 2.0, 6.0, 6.0], [1.0, 2.0, 1.0, 3.0], num_ranks=2) == (2.0, 2.0)


def recording(method: str, *, length: int) -> list[RecordedRollout]:
    """One response; a step takes a second, a draft a quarter."""
    strategy = parse_strategy(method, "x")
    steps = tuple(
        DecodeStep(
            strategy=strategy, num_running=1, drafted=(1,) * count, accepted=(1,) * count, draft_s=0.25, verify_s=1.0
        )
        for count in (0, 1, 1, 1)
    )  # fmt: skip
    return [RecordedRollout(policy=method, steps=steps, response_tokens=(length,))]


def test_a_recording_gives_costs_lengths_and_what_was_measured():
    alike = {"num_ranks": 1, "stands": 0.5, "longest": 1}
    found = rows(recording("eagle:1", length=4001), **alike, pass_s=None)
    values = dict((name, median) for name, median, _ in found)
    assert list(values) == [
        "every draft stands, drafts are free", "0.5 of a token stands, drafts are free",
        "0.5 of a token stands, it is foreseen which", "0.5 of a token stands, best length for so many requests",
        "0.5 of a token stands, best single length", "measured, eagle:1",
    ]  # fmt: skip
    assert [*values.values()] == [
        2.0, pytest.approx(1.5, abs=0.05), pytest.approx(3 / (1 + 1.25), abs=0.05), pytest.approx(1.2, abs=0.05),
        pytest.approx(1.2, abs=0.05), 4000 / 5,
    ]  # fmt: skip
    dear = rows(recording("eagle:1", length=4001), **alike, pass_s=lambda size: 10.0)
    assert [median for _, median, _ in dear][2:5] == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="--pass-ms is needed"):
        rows(recording("suffix:1", length=9), **alike, pass_s=None)
