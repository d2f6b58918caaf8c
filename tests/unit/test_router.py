"""The router's decisions against hand-made worths and prices, its learning from verified drafts, costs, placement."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlt.drafter.calibration import Calibration, cell_centres
from tlt.drafter.router import SUFFIX, Candidate, DraftRouter, is_probe
from tlt.drafter.worth import paying_depth, take
from tlt.rollout.placement import longest_first, place_groups
from tlt.spec.cost_model import MIN_RATE_STEPS, NO_PRICES, CostModel, Curve, Prices, bin_of, rising

CHEAP = Prices(step_s=0.02, token_s=0.0001, pass_s={"eagle": 0.0005}, row_s={"eagle": 0.0001})
DEAR = Prices(step_s=0.02, token_s=0.02, pass_s={"eagle": 0.02}, row_s={"eagle": 0.01})


def candidate(name: str = "p#0", *, room: int = 8, match_length: int = 12, probs=()) -> Candidate:
    return Candidate(name=name, group="p", room=room, is_random=True, match_length=match_length, probs=np.array(probs))


def make_router(learned: list[str], *, max_draft_tokens: int) -> DraftRouter:
    router = DraftRouter(learned, max_draft_tokens=max_draft_tokens)
    router.begin({"p": "tests", "other": "tests"})
    return router


def past_probes(router: DraftRouter) -> DraftRouter:
    router.step = 32  # the next probe is at 64
    return router


def teach(router: DraftRouter, drafter: str, *, num_stood: int, confidence: float, times: int = 200) -> None:
    for _ in range(times):
        router.verified(
            drafter, request="other#0", group="other", is_random=True, match_length=12,
            confidences=np.full(4, confidence), num_stood=num_stood,
        )  # fmt: skip


def test_tokens_are_taken_while_they_are_worth_their_price():
    worth = np.array([[0.9, 0.5, 0.2, 0.1], [0.3, 0.29, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]])
    num, net, gain = take(worth, 0.25, 4)
    assert num.tolist() == [2, 2, 0]
    assert net == pytest.approx([0.9, 0.09, 0.0])
    assert gain == pytest.approx([1.4, 0.59, 0.0])
    assert take(worth, 0.25, 1)[0].tolist() == [1, 1, 0]


def test_a_head_drafts_as_deep_as_its_rows_together_pay_for():
    worth = np.array([[0.9, 0.8, 0.7], [0.9, 0.3, 0.1]])
    num = np.array([3, 2])
    assert paying_depth(worth, num, 0.1, 0.0, np.zeros(2)) == 3
    # Passes of 0.65: the first earns 1.6, the second 0.9, the third 0.6 of one row.
    assert paying_depth(worth, num, 0.1, 0.65, np.zeros(2)) == 2
    assert paying_depth(worth, num, 0.1, 2.0, np.zeros(2)) == 0
    # What the rows would be worth without the head is more than the 1.6 + 0.9 - 1.3 that it brings.
    assert paying_depth(worth, num, 0.1, 0.65, np.array([1.0, 0.3])) == 0
    assert paying_depth(worth, np.zeros(2, dtype=int), 0.1, 0.0, np.zeros(2)) == 0


def test_what_costs_more_than_it_is_worth_is_not_drafted():
    router = past_probes(make_router(["eagle"], max_draft_tokens=8))
    candidates = [candidate(f"p#{i}", probs=[0.99] * 8) for i in range(4)]
    assert router.plan(candidates, DEAR, num_running=4) == [None] * 4
    routes = router.plan(candidates, CHEAP, num_running=4)
    assert all(route.num_draft_tokens > 2 for route in routes)


def test_each_request_gets_the_drafter_that_is_worth_more():
    router = past_probes(make_router(["eagle"], max_draft_tokens=8))
    teach(router, "eagle", num_stood=2, confidence=0.9)
    teach(router, SUFFIX, num_stood=4, confidence=0.999)
    teach(router, SUFFIX, num_stood=0, confidence=0.3)
    strong, weak = candidate("p#0", probs=[0.999] * 8), candidate("p#1", probs=[0.3, 0.3])
    routes = router.plan([strong, weak], CHEAP, num_running=2)
    assert [route.drafter for route in routes] == [SUFFIX, "eagle"]
    # With nothing but strong matches no head is worth a pass.
    assert {route.drafter for route in router.plan([strong] * 3, CHEAP, num_running=3)} == {SUFFIX}


def test_no_route_is_longer_than_its_request_has_room_for():
    router = past_probes(make_router(["eagle"], max_draft_tokens=8))
    teach(router, "eagle", num_stood=4, confidence=0.99)
    candidates = [candidate("p#0", room=1, probs=[0.99] * 8), candidate("p#1", room=3)]
    counts = [route.num_draft_tokens for route in router.plan(candidates, CHEAP, num_running=2)]
    assert counts[0] == 1
    assert 1 <= counts[1] <= 3


def test_a_drafter_that_was_not_worth_it_is_tried_again_at_probes():
    router = make_router(["eagle"], max_draft_tokens=8)
    candidates = [candidate(f"p#{i}", probs=[0.5] * 8) for i in range(4)]
    steps = [router.plan(candidates, DEAR, num_running=4) for _ in range(200)]
    probed = [index + 1 for index, routes in enumerate(steps) if any(routes)]
    assert probed == [step for step in range(1, 201) if is_probe(step)]
    assert {route.drafter for index in probed for route in steps[index - 1] if route} == {SUFFIX, "eagle"}


def test_probes_take_turns_where_one_request_runs():
    router = make_router(["eagle", "eagle2"], max_draft_tokens=8)
    steps = [router.plan([candidate("p#0", probs=[0.5] * 8)], DEAR, num_running=1) for _ in range(600)]
    drafters = [steps[step - 1][0].drafter for step in range(1, 601) if is_probe(step)]
    assert drafters[:4] == [SUFFIX, "eagle2", SUFFIX, "eagle"]
    assert {drafters.count(name) for name in ("eagle", "eagle2")} <= {3, 4}
    assert drafters.count(SUFFIX) == 7


def count(router: DraftRouter, drafter: str, request: str, *, num_stood: int, times: int = 50) -> None:
    for _ in range(times):
        router.verified(
            drafter, request=request, group=request.split("#")[0], is_random=True, match_length=3,
            confidences=np.full(4, 0.9), num_stood=num_stood,
        )  # fmt: skip


def test_trust_of_a_request_begins_with_its_group_and_that_with_its_source():
    router = make_router(["eagle"], max_draft_tokens=4)
    # Names as a stream of prompts gives them: each drawing has a number of its own.
    sources = {"1:s/1": "sums", "2:s/2": "sums", "3:t/1": "stories", "9:s/9": "sums"}
    router.begin(sources)
    assert router.factor(SUFFIX, "1:s/1#0", "1:s/1") == 1
    count(router, SUFFIX, "1:s/1#1", num_stood=0)
    before = router.factor(SUFFIX, "1:s/1#0", "1:s/1")
    of_source = router.factor(SUFFIX, "2:s/2#0", "2:s/2")
    assert before < of_source < 0.8
    assert router.factor(SUFFIX, "3:t/1#0", "3:t/1") == 1
    assert router.factor("eagle", "1:s/1#0", "1:s/1") == 1
    count(router, SUFFIX, "1:s/1#0", num_stood=4)
    assert router.factor(SUFFIX, "1:s/1#0", "1:s/1") > before
    router.begin(sources)  # requests and groups are new, sources are not
    assert router.factor(SUFFIX, "1:s/1#0", "1:s/1") == router.factor(SUFFIX, "9:s/9#0", "9:s/9") != 1


def test_each_source_gets_the_head_that_knows_it():
    router = past_probes(make_router(["eagle", "eagle2"], max_draft_tokens=4))
    router.begin({f"{source}/{index}": source for source in ("sums", "stories") for index in (1, 5)})
    for head, other in (("eagle", "eagle2"), ("eagle2", "eagle")):
        source = {"eagle": "sums", "eagle2": "stories"}[head]
        count(router, head, f"{source}/1#0", num_stood=4, times=100)
        count(router, other, f"{source}/1#0", num_stood=0, times=100)
    cheap = Prices(step_s=0.02, token_s=1e-5, pass_s={"eagle": 1e-4, "eagle2": 1e-4}, row_s={"eagle": 0, "eagle2": 0})
    candidates = [
        Candidate(name=f"{source}/5#0", group=f"{source}/5", room=8, is_random=True) for source in ("sums", "stories")
    ]
    routes = router.plan(candidates * 2, cheap, num_running=4)
    assert [route.drafter for route in routes] == ["eagle", "eagle2"] * 2
    # Where a pass costs more than two rows can earn, one head drafts for those that it is worth it for.
    dear = Prices(step_s=0.02, token_s=1e-5, pass_s={"eagle": 1e-4, "eagle2": 1.0}, row_s={"eagle": 0, "eagle2": 0})
    assert {route.drafter for route in router.plan(candidates * 2, dear, num_running=4) if route} == {"eagle"}


def test_greedy_and_random_text_are_learned_apart():
    router = make_router([], max_draft_tokens=4)
    teach(router, SUFFIX, num_stood=0, confidence=0.9)
    random, greedy = (router.calibrations[SUFFIX, one].table() for one in (True, False))
    assert (random < greedy).any()
    assert np.sum(router.calibrations[SUFFIX, False].decided) == 0


def test_a_calibration_approaches_what_is_observed_and_forgets_after_a_change():
    calibration = Calibration(np.repeat(cell_centres()[None], 2, axis=0))
    kinds, confidences = np.array([0, 1, 1]), np.array([0.97, 0.97, 0.97])
    before = calibration.estimate(kinds, confidences)
    for _ in range(300):
        calibration.observe(kinds, confidences, 1)  # the first stands, the second does not, the third is not decided
    after = calibration.estimate(kinds, confidences)
    assert after[0] > 0.99
    assert after[1] < 0.05
    assert sum(calibration.decided[1]) == pytest.approx(sum(calibration.decided[0]))
    calibration.doubt(0.0)
    assert calibration.estimate(kinds, confidences) == pytest.approx(before)


def test_decisions_depend_on_the_calls_alone():
    def run() -> list:
        rng = np.random.default_rng(5)
        router, found = make_router(["eagle"], max_draft_tokens=6), []
        for _ in range(150):
            candidates = [
                candidate(f"p#{i}", probs=rng.uniform(0.2, 1, size=5), match_length=int(rng.integers(1, 20)))
                for i in range(3)
            ]
            routes = router.plan(candidates, CHEAP, num_running=3)
            found.append(routes)
            for one, route in zip(candidates, routes, strict=True):
                if route is not None:
                    router.verified(
                        route.drafter, request=one.name, group="p", is_random=True, match_length=one.match_length,
                        confidences=np.full(route.num_draft_tokens, 0.7),
                        num_stood=int(rng.integers(route.num_draft_tokens + 1)),
                    )  # fmt: skip
        return found

    assert run() == run()


def test_bins_are_apart_and_ordered():
    bins = [bin_of(size) for size in range(1, 2000)]
    assert bins == sorted(bins)
    assert len(set(bins[:15])) == 15
    assert len(set(bins)) < 80


def test_a_curve_is_the_median_of_each_size_and_rises():
    curve = Curve()
    for seconds in (0.01, 0.011, 5.0):  # one outlier
        curve.observe(1, seconds)
    for _ in range(3):
        curve.observe(9, 0.051)
        curve.observe(5, 0.009)  # noise: a larger size is not faster
    assert curve.seconds(1) == curve.seconds(5) == pytest.approx(0.010)
    assert curve.seconds(7) == pytest.approx((0.010 + 0.051) / 2)
    assert curve.seconds(13) == pytest.approx(0.051 + 4 * (0.051 - 0.010) / 8)
    assert Curve().seconds(3) == 0


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 15)), min_size=1, max_size=12))
def test_rising_values_are_the_nearest_ones(measured):
    values, weights = np.array([value for value, _ in measured]), np.array([weight for _, weight in measured])
    found = np.array(rising(values.tolist(), weights.tolist()))
    assert (np.diff(found) >= 0).all()
    # Weighted least squares over a closed convex cone: the residual is orthogonal to the fit and has no gain in any
    # direction of the cone, whose generators are the steps from each index on and the constant.
    residual = weights * (values - found)
    assert abs(residual @ found) < 1e-6
    tails = residual[::-1].cumsum()[::-1]
    assert abs(tails[0]) < 1e-6
    assert (tails < 1e-6).all()


def test_prices_are_differences_of_measured_times():
    costs = CostModel()
    assert costs.prices(4, 0, max_draft_tokens=4).step_s == 0
    for _ in range(5):
        costs.observe_step(4, 0.020)
        costs.observe_step(12, 0.036)
        costs.observe_pass("eagle", 1, 0.003)
        costs.observe_pass("eagle", 4, 0.006)
    prices = costs.prices(4, 8, max_draft_tokens=16)
    assert prices.verify_s == pytest.approx(tuple(0.020 + 0.002 * np.arange(17)))
    assert prices.rate is None
    assert (prices.step_s, prices.token_s) == pytest.approx((0.020, 0.002))
    assert prices.row_s["eagle"] == pytest.approx(0.001)
    assert prices.pass_s["eagle"] == pytest.approx(0.002)


def test_the_rate_is_that_of_steps_of_as_many_requests():
    costs = CostModel()
    for _ in range(MIN_RATE_STEPS - 1):
        costs.observe_rate(2, 6, 0.030)
    assert costs.prices(2, 0, max_draft_tokens=4).rate is None
    costs.observe_rate(2, 6, 0.030)
    costs.observe_rate(3, 1, 1.0)
    assert costs.prices(2, 0, max_draft_tokens=4).rate == pytest.approx(200)
    for _ in range(400):  # what is long past does not count
        costs.observe_rate(2, 6, 0.060)
    assert costs.prices(2, 0, max_draft_tokens=4).rate == pytest.approx(100, rel=0.01)


falling = st.lists(st.floats(0, 1), max_size=4).map(lambda worth: np.array(sorted(worth, reverse=True)))


@given(
    st.lists(st.tuples(falling, st.booleans()), min_size=1, max_size=3),
    st.lists(st.floats(0, 0.01), min_size=12, max_size=12), st.floats(1, 200),
)  # fmt: skip
def test_the_cut_keeps_what_is_worth_most_beyond_its_verification(drafts, rises, rate):
    verify_s = np.cumsum([0.02, *rises])  # rises by any steps, as matrix products do
    router = past_probes(make_router([], max_draft_tokens=4))
    prices = Prices(step_s=0.02, token_s=0.001, pass_s={}, row_s={}, verify_s=tuple(verify_s), rate=rate)
    router.plan([candidate()], prices, num_running=1)
    assert router.rate <= rate
    standings, is_fixed = [worth for worth, _ in drafts], [fixed for _, fixed in drafts]

    def gain(counts) -> float:
        return sum(worth[:count].sum() for worth, count in zip(standings, counts, strict=True))

    def net(counts) -> float:
        return gain(counts) - own_rate * verify_s[sum(counts)]

    choices = [
        range(len(worth), len(worth) + 1) if fixed else range(len(worth) + 1)
        for worth, fixed in zip(standings, is_fixed, strict=True)
    ]
    own_rate = min(router.rate, max((1 + gain(each)) / verify_s[sum(each)] for each in itertools.product(*choices)))
    counts = router.cut(standings, is_fixed)
    assert all(count in choice for count, choice in zip(counts, choices, strict=True))
    assert net(counts) == pytest.approx(max(net(each) for each in itertools.product(*choices)), abs=1e-9)


def test_a_probe_is_verified_whole_and_an_unmeasured_engine_too():
    router = make_router([], max_draft_tokens=4)
    dear = np.cumsum([0.02, 1, 1, 1, 1])
    prices = Prices(step_s=0.02, token_s=1.0, pass_s={}, row_s={}, verify_s=tuple(dear))
    for _ in range(3):
        router.plan([candidate(probs=[0.5, 0.5])], prices, num_running=1)
        assert router.cut([np.array([0.5, 0.25])], [False]) == [0]
    router.plan([candidate(probs=[0.5, 0.5])], prices, num_running=1)
    assert router.is_probe
    assert router.cut([np.array([0.5, 0.25])], [False]) == [2]
    router.plan([candidate(probs=[0.5, 0.5])], NO_PRICES, num_running=1)
    assert router.cut([np.array([0.5, 0.25])], [False]) == [2]


def test_a_poor_step_after_good_ones_still_drafts():
    def plan(rate: float | None) -> tuple[list, list[int]]:
        router = past_probes(make_router([], max_draft_tokens=4))
        prices = Prices(
            step_s=0.02, token_s=0.004, pass_s={}, row_s={}, verify_s=tuple(0.02 + 0.004 * np.arange(9)), rate=rate
        )  # fmt: skip
        routes = router.plan([candidate(f"p#{i}", probs=[0.999] * 4) for i in range(2)], prices, num_running=2)
        return routes, router.cut([np.array([0.9, 0.8, 0.7, 0.6])] * 2, [False] * 2)

    routes, counts = plan(None)
    assert all(counts)
    assert plan(10_000.0) == (routes, counts)  # no step of these can come to that


def test_long_groups_are_spread_and_unknown_ones_dealt_in_turn():
    assert place_groups([0.0] * 5, 2) == [0, 1, 0, 1, 0]
    assert place_groups([100, 1, 1, 100], 2) == [0, 0, 1, 1]
    assert place_groups([10, 9, 8, 1, 1, 1], 2) == [0, 1, 1, 0, 0, 1]
    counts = np.bincount(place_groups(list(np.random.default_rng(0).lognormal(4, 1, size=37)), 4))
    assert sorted(counts) == [9, 9, 9, 10]
    assert longest_first([1, 3, 2, 3]) == [1, 3, 2, 0]
