"""Walks of choices along known drafts: by hand where they can be counted, and in the order that theory demands."""

import numpy as np
import pytest

from tlt.drafter.router_replay import (
    Costs,
    Response,
    Routed,
    calibrated,
    depth_rates,
    explained,
    fixed,
    foreseen,
    rollout_s,
    routed_s,
)  # fmt: skip

EDGES = np.array([0.2, 0.4, 0.6, 0.8])
DEPTH = 6
COSTS = Costs(step_s=10 + np.arange(100.0), pass_s=np.array([0, 0.5, 0.6, 0.7, 0.8]))


def response(stands: list[list[bool]], *, fold: int = 0) -> Response:
    stands = np.array(stands, dtype=bool)
    left = np.arange(len(stands), 0, -1)
    return Response(fold=fold, stands=stands, num_left=np.minimum(left, stands.shape[1]), signals={})


def test_walks_are_those_counted_by_hand():
    # Five tokens to go; drafts of two: of the first both stand, of the one behind them none.
    one = response([[1, 1], [0, 0], [0, 0], [0, 1], [1, 1]])
    assert one.runs.tolist() == [2, 0, 0, 0, 1]
    assert rollout_s([one], fixed(0), COSTS) == 5 * 11
    # Rows 0 (two stand), 3 (none), 4 (the one that is left stands).
    counts: dict = {}
    assert rollout_s([one], fixed(2), COSTS, counts) == 3 * (13 + 2 * 0.5)
    assert counts == {1: [3 + 1 + 2, 3 * 14.0]}
    assert rollout_s([one], foreseen(2, COSTS), COSTS) == (13 + 1) + 11 + (12 + 0.5)


def test_a_rank_is_done_with_its_last_response():
    short, long = response([[0]]), response([[0]] * 3)
    assert rollout_s([short, long], fixed(1), COSTS) == (14 + 0.6) + 2 * (12 + 0.5)


@pytest.fixture(scope="module")
def groups() -> list[list[Response]]:
    """Tokens stand with a probability that differs from token to token; a sharp signal tells it, a dull one half."""
    random = np.random.default_rng(0)
    found = []
    for group in range(16):
        own = []
        for _ in range(4):
            size = int(random.integers(20, 60))
            chance = random.choice([0.3, 0.95], size=(size, DEPTH), p=[0.2, 0.8])
            dull = np.where(random.random(chance.shape) < 0.5, chance, random.choice([0.3, 0.95], size=chance.shape))
            own.append(
                Response(
                    fold=group % 4, stands=random.random(chance.shape) < chance,
                    num_left=np.minimum(np.arange(size, 0, -1), DEPTH),
                    signals={"sharp": chance, "dull": dull, "none": np.full(chance.shape, 0.5)},
                )
            )  # fmt: skip
        found.append(own)
    return found


def test_what_tells_more_explains_more_and_walks_faster(groups):
    every = [one for group in groups for one in group]
    estimates = {signal: calibrated(every, signal, EDGES) for signal in ("sharp", "dull", "none")}
    sharp, dull, none = (explained(every, estimates[signal]) for signal in ("sharp", "dull", "none"))
    assert sharp > dull + 0.05 > none + 0.1
    assert abs(none) < 0.02
    seconds = {
        signal: sum(routed_s(groups, Routed(own, depth_rates(every), DEPTH, COSTS), COSTS))
        for signal, own in estimates.items()
    }
    best = min(sum(rollout_s(group, fixed(count), COSTS) for group in groups) for count in range(DEPTH + 1))
    known = sum(rollout_s(group, foreseen(DEPTH, COSTS), COSTS) for group in groups)
    # What explains little is worth little: a length fitted to these very responses does as well.
    assert known < seconds["sharp"] < 0.97 * min(seconds["dull"], best)


def test_estimates_come_from_other_folds(groups):
    """A fold's own outcomes are turned around: its estimates stay, the others' change."""
    every = [one for group in groups for one in group]
    before = calibrated(every, "sharp", EDGES)
    turned = [
        Response(fold=one.fold, stands=~one.stands if one.fold == 0 else one.stands, num_left=one.num_left,
                 signals=one.signals)
        for one in every
    ]  # fmt: skip
    after = calibrated(turned, "sharp", EDGES)
    for old, new in zip(every, turned, strict=True):
        assert np.array_equal(before[old], after[new]) == (old.fold == 0)
