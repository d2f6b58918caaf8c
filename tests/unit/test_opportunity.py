"""When idle ranks train: measured gains against their error and price, staleness, and tails that are too short."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.unit.test_spot import Alone, Counters, Engine, Watched
from tlt.config import SpotConfig
from tlt.rollout.collector import ReplicaReport, tail_metrics
from tlt.rollout.resources import own_resources
from tlt.spot.board import TailBoard
from tlt.spot.judgement import Judgement, judgement, judgement_sums
from tlt.spot.opportunity import (
    DOUBT,
    LASTING,
    MAX_INTERVAL,
    MIN_INTERVAL,
    PATIENCE_STEPS,
    SESSIONS,
    GainRecord,
    SwitchCost,
)
from tlt.spot.training import SpotTraining
from tlt.trace import NoTrace
from tlt.types import EngineStats, TailReport


def judged(live: float, gain: float, error: float = 0.001) -> Judgement:
    return Judgement(live=live, candidate=live + gain, error=error, num_judges=100)


def record_of(gains: list[float], *, error: float = 0.001, cost_frac: float | None = 0.0, **config) -> GainRecord:
    """A training for each policy version from 0 on, each of the weights that draft, none published."""
    record = GainRecord(**{"min_gain_frac": 0.002, **config})
    for version, gain in enumerate(gains):
        record.count(
            judged(1.0, gain, error), policy_version=version, cost_frac=cost_frac, num_steps=PATIENCE_STEPS
        )  # fmt: skip
        record.begun_anew()
    return record


def test_a_judgement_is_the_same_however_responses_are_spread_over_ranks():
    scores = torch.rand(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 40
    whole = judgement(judgement_sums(scores))
    parts = [judgement_sums(scores[begin:end]) for begin, end in pairwise([0, 0, 5, 11, 12])]
    spread = judgement(sum(parts))
    assert (spread.live, spread.candidate, spread.error) == pytest.approx((whole.live, whole.candidate, whole.error))
    assert whole.live == pytest.approx(float(scores[:, 0].sum() / scores[:, 2].sum()))
    assert judgement(judgement_sums(scores[:0])) is None
    assert judgement(judgement_sums(scores[:1])).error == math.inf
    assert not judgement(judgement_sums(scores[:1])).is_worse
    assert (whole.num_judges, spread.num_judges) == (12, 12)


def test_the_error_of_a_gain_is_how_far_repeated_judgements_scatter():
    generator = torch.Generator().manual_seed(2)
    gains, errors = [], []
    for _ in range(400):  # 30 responses of 20 to 200 drafts; a response's drafts gain or lose together
        drafts = torch.randint(20, 200, (30,), generator=generator).double()
        gain = 0.5 + 0.2 * torch.randn(30, generator=generator, dtype=torch.float64)
        found = judgement(judgement_sums(torch.stack([drafts, drafts * (1 + gain), drafts], dim=1)))
        gains.append(found.gain)
        errors.append(found.error)
    scatter = float(torch.tensor(gains).std())
    assert sum(errors) / len(errors) == pytest.approx(scatter, rel=0.15)
    assert sum(gains) / len(gains) == pytest.approx(0.5, abs=4 * scatter / 20)


@pytest.mark.parametrize("num_judges", [2, 3, 4, 8, 14, 40])
def test_weights_that_are_as_good_are_dropped_once_in_forty(num_judges):
    generator, trials = torch.Generator().manual_seed(3), 4000
    dropped = 0
    for differences in torch.randn(trials, num_judges, generator=generator, dtype=torch.float64):
        ones = torch.ones(num_judges, dtype=torch.float64)
        dropped += judgement(judgement_sums(torch.stack([ones, ones + differences, ones], dim=1))).is_worse
    assert dropped / trials == pytest.approx(1 / 40, abs=0.0075)  # 3 standard deviations of 0.0025


def test_gains_go_on_being_trained_for_and_nothing_gained_is_skipped_and_probed():
    assert record_of([]).is_due(0)
    assert record_of([0.0] * (SESSIONS - 1)).is_due(SESSIONS - 1), "not judged often enough"
    assert record_of([0.1] * 9).is_due(9)
    assert record_of([0.0] * 3 + [0.1] * SESSIONS).is_due(6), "only the last trainings count"
    for gains in ([0.0] * SESSIONS, [-0.1] * SESSIONS, [0.003] * SESSIONS):  # 0.003 of 2 tokens is below 0.002
        record = record_of(gains)
        last = SESSIONS - 1
        assert [record.is_due(version) for version in range(last, last + MAX_INTERVAL + 1)] == [
            *[False] * MAX_INTERVAL, True
        ]  # fmt: skip


def test_training_is_not_given_up_before_it_had_its_steps():
    record = record_of([])
    for version in range(9):
        assert record.is_due(version) == (version < 4), version
        record.count(judged(1.0, 0.0), policy_version=version, cost_frac=0.0, num_steps=PATIENCE_STEPS / 4)


def test_a_gain_must_exceed_its_error_and_its_price():
    assert record_of([0.02] * SESSIONS).is_due(SESSIONS)
    assert not record_of([0.02] * SESSIONS, error=0.05).is_due(SESSIONS), "0.02 against 0.05 / sqrt(3)"
    assert record_of([0.02] * SESSIONS, error=0.03).is_due(SESSIONS)
    assert not record_of([0.02] * SESSIONS, cost_frac=LASTING * 0.011).is_due(SESSIONS), "1 % does not pay 1.1 %"
    assert record_of([0.02] * SESSIONS, cost_frac=LASTING * 0.009).is_due(SESSIONS)
    dear = record_of([0.02] * 2, cost_frac=LASTING * 0.001)
    found = judged(1.0, 0.02)
    dear.count(found, policy_version=2, cost_frac=LASTING * 0.02, num_steps=PATIENCE_STEPS)  # a very short rollout
    assert dear.is_due(3), "the mean of three meetings is paid for"
    first = record_of([0.02], cost_frac=None)
    for version in (1, 2):
        first.count(found, policy_version=version, cost_frac=LASTING * 0.011, num_steps=PATIENCE_STEPS)
        first.begun_anew()
    assert not first.is_due(3), "a first meeting whose price is not known yet is no cheap one"
    assert record_of([0.0] * 9, error=math.inf).is_due(9), "one response tells nothing: it is no reason to skip"


def test_a_gain_that_is_not_published_is_counted_once():
    record, added = GainRecord(min_gain_frac=0.002), []

    def count(gain: float, error: float = 0.001) -> None:
        version = len(added)
        metrics = record.count(
            judged(1.0, gain, error), policy_version=version, cost_frac=0.0, num_steps=PATIENCE_STEPS
        )  # fmt: skip
        assert metrics["spot/gain"] == pytest.approx(gain)
        added.append(metrics["spot/added_gain"])

    for gain in (0.02, 0.02, 0.03, 0.02):  # the candidate carries over and learns next to nothing more
        count(gain)
    assert added == pytest.approx([0.02, 0.0, 0.01, -0.01])
    assert not record.is_due(4), "the last three gained nothing"
    record.published(judged(1.0, 0.02), policy_version=3)
    count(0.03)
    record.begun_anew()
    count(0.04)
    count(0.5, error=math.inf)  # one response tells nothing of what is carried either
    count(0.05)
    assert added[4:] == pytest.approx([0.03, 0.04, 0.46, 0.01])


def test_a_resumed_record_decides_as_the_one_that_was_saved(tmp_path):
    saved = record_of([0.02] * SESSIONS, cost_frac=LASTING * 0.011)
    saved.published(judged(1.0, 0.02), policy_version=2)
    first = judged(1.0 - 0.01, 0.03)
    saved.count(first, policy_version=4, cost_frac=None, num_steps=1)
    torch.save(saved.state_dict(), tmp_path / "gains.pt")
    resumed = GainRecord(min_gain_frac=0.002)
    resumed.load_state_dict(torch.load(tmp_path / "gains.pt", weights_only=True))
    assert resumed.state_dict() == saved.state_dict()
    for version in range(5, 40):
        assert resumed.is_due(version) == saved.is_due(version)
        assert resumed.interval == saved.interval
        found = judged(0.9 - 0.005 * version, 0.001)
        counts = [
            record.count(found, policy_version=version, cost_frac=0.1, num_steps=9) for record in (saved, resumed)
        ]
        assert counts[0] == counts[1]
        assert "spot/staleness" in counts[0]
    assert not resumed.is_due(40), "or the record was empty"


def test_the_faster_drafts_get_stale_the_sooner_they_are_trained_again():
    intervals = []
    for loss in (0.0, 0.001, 0.002, 0.1):
        record = record_of([0.0] * SESSIONS)
        record.published(judged(1.0, 0.0), policy_version=0)
        metrics = record.count(judged(1.0 - 4 * loss, 0.0), policy_version=4, cost_frac=0.0, num_steps=10)
        assert metrics["spot/staleness"] == pytest.approx(4 * loss)
        intervals.append(record.interval)
    assert intervals == [MAX_INTERVAL, 4, MIN_INTERVAL, MIN_INTERVAL]  # 0.2 % of 2 tokens over 0.001 each


def test_a_head_that_has_learned_its_policy_is_left_alone_until_the_policy_moves():
    """A head approaches the best score by half in each training; the policy takes some of it away from version 40."""
    record, live, trained = GainRecord(min_gain_frac=0.002), 0.5, []
    for version in range(80):
        live -= 0.05 * (version >= 40)
        if record.is_due(version):
            gain = (1.5 - live) / 2
            found = judged(live, gain, error=0.002)
            record.count(found, policy_version=version, cost_frac=LASTING * 0.001, num_steps=PATIENCE_STEPS)
            record.published(found, policy_version=version)
            live += gain
            trained.append(version)
    assert trained[:8] == list(range(8)), "it learns"
    still = [version for version in trained if 12 <= version < 40]
    assert 2 <= len(still) <= 4, still
    moving = [version for version in trained if version >= 48]
    assert moving == list(range(48, 80)), "within a probe's interval it trains at every chance again"


def test_a_tail_must_last_for_one_optimizer_step():
    switch = SwitchCost()
    assert switch.fits(0.0)
    for seconds in (9.0, 2.0, 2.2):
        switch.observe(seconds)
    assert switch.fits(2.2)
    assert not switch.fits(2.1)
    assert switch.fits(None), "nothing known is no reason to idle"
    for _ in range(5):
        switch.observe_none(3.0)
    assert not switch.fits(2.9)
    switch.observe_none(1.0)
    assert switch.seconds == 3.0, "a tail that was too short for a step does not make the step shorter"


def test_one_long_switch_does_not_close_all_later_tails():
    switch, tails = SwitchCost(), 0
    switch.observe(30.0)
    while not switch.fits(5.0):
        switch.skipped()
        tails += 1
    assert tails == 9, "30 s times 0.8 to the 9th is 4 s"
    switch.observe(0.5)
    switch.observe(0.5)
    assert switch.fits(1.0), "what is measured then counts"


def board_of(told_s: float | None) -> TailBoard:
    """Rank 0's; rank 1 still decodes and told so."""
    store = Counters()
    other = TailBoard(store, rank=1, world_size=2)
    other.begin()
    if told_s is not None:
        other.tell_remaining(told_s)
    return TailBoard(store, rank=0, world_size=2)


def test_what_ranks_tell_is_read_until_they_end():
    store = Counters()
    boards = [TailBoard(store, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(2):
        for board in boards:
            board.begin()
        assert boards[0].remaining_s() is None
        boards[1].tell_remaining(7.0)
        boards[2].tell_remaining(3.5)
        boards[1].tell_remaining(4.0)
        assert [board.remaining_s() for board in boards] == [4.0] * 3
        boards[1].ended()
        assert boards[0].remaining_s() == 3.5
        boards[2].tell_remaining(0.0)
        assert boards[0].remaining_s() == 0.001
        boards[2].ended()
        assert boards[0].remaining_s() is None


def test_a_replica_has_ended_with_the_first_of_its_ranks():
    store = Counters()
    boards = [TailBoard(store, rank=rank, world_size=6, replica_size=2) for rank in range(6)]
    for _ in range(2):
        for board in boards:
            board.begin()
        for rank in (5, 4, 0):
            boards[rank].ended()
            assert not boards[rank].all_ended(), "ranks 2 and 3 decode"
        boards[2].ended()
        assert all(board.all_ended() for board in boards), "ranks 1 and 3 are about to say so"
        for rank in (1, 3):
            boards[rank].ended()
            assert boards[rank].all_ended()


class Looks:
    """Told to stop after so many questions."""

    def __init__(self, count: int):
        self.count = count

    def __call__(self) -> bool:
        self.count -= 1
        return self.count < 0


@pytest.mark.parametrize(("told_s", "trains"), [(None, True), (5.0, True), (0.5, False)])
def test_a_rank_trains_in_tails_that_are_long_enough(told_s, trains):
    engine, learner = Engine(max_bytes=230_000), Watched()
    engine.rollout(1, range(8, 48))
    spot = SpotTraining(
        learner, engine, board_of(told_s), Alone(), config=SpotConfig(), is_stopped=Looks(4), trace=NoTrace()
    )
    spot.switch.observe(2.0)
    spot.begin()
    report = spot.use_tail()
    assert bool(learner.trained) == trains == (report.num_steps > 0)
    assert report.was_too_short == (not trains)
    assert report.expected_s == (told_s or 0.0)
    if trains:
        assert spot.switch.seconds == pytest.approx(1.0, abs=0.1), "the median of 2 s and nearly nothing"
    else:
        assert spot.switch.seconds == pytest.approx(2.0 * DOUBT)


class Drained(Watched):
    """Told to stop before its first optimizer step."""

    def train(self, samples, *, should_stop, on_step) -> None:
        self.trained += samples


def test_a_training_without_a_step_counts_for_how_late_ranks_come_back():
    engine = Engine(max_bytes=230_000)
    engine.rollout(1, range(8, 48))
    spot = SpotTraining(
        Drained(), engine, board_of(5.0), Alone(), config=SpotConfig(), is_stopped=Looks(4), trace=NoTrace()
    )
    spot.begin()
    report = spot.use_tail()
    assert (report.did_train, report.num_steps) == (True, 0)

    def metrics(*tails: TailReport) -> dict[str, float]:
        own = {
            "groups": [], "stats": EngineStats(), "begin_s": 0.0, "end_s": 9.0, "reward_stats": {},
            "interrupted": False, "resources": own_resources(history_bytes=0),
        }  # fmt: skip
        return tail_metrics([ReplicaReport(tail=tail, **own) for tail in tails], end_s=9.0, idle_s=4.0)

    drained = replace(report, back_s=9.25, expected_s=0.0)
    stepped = TailReport(did_train=True, num_steps=2, train_s=3.0, back_s=9.125)
    waited = TailReport(back_s=9.75, expected_s=2.0)
    assert metrics(drained, stepped, waited)["spot/preemption_s_max"] == 0.25
    assert metrics(drained)["spot/preemption_s_max"] == 0.25
    assert metrics(stepped, waited)["spot/preemption_s_max"] == 0.125
    assert "spot/preemption_s_max" not in metrics(waited), "one that waits is late for nothing"


def test_a_rank_that_is_not_due_waits_where_ranks_meet():
    engine, learner = Engine(max_bytes=230_000), Watched()
    engine.rollout(SESSIONS, range(8, 48))
    spot = SpotTraining(
        learner, engine, board_of(9.0), Alone(), config=SpotConfig(),
        is_stopped=lambda: pytest.fail("it looks at nothing"), trace=NoTrace(),
    )  # fmt: skip
    spot.gains = record_of([0.0] * SESSIONS)
    spot.begin()
    report = spot.use_tail()
    assert not learner.trained
    assert (report.num_steps, report.was_too_short) == (0, False)
    assert spot.publish()["spot/due"] == 0
