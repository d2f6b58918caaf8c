"""How long a replica expects to decode: mean residual lengths over the present rate."""

import numpy as np
import pytest

from tests.engine.engines import make_prompts
from tlt.drafter.history import SuffixHistory
from tlt.rollout.outlook import TELL_STEPS, Outlook, expected_more, growth_rate


def test_further_tokens_are_the_mean_of_the_past_ones_that_were_longer():
    past = np.array([10, 20, 30, 100])
    assert expected_more(past, 0, scale=1.0, limit=1000) == 40
    assert expected_more(past, 20, scale=1.0, limit=1000) == (30 + 100) / 2 - 20
    assert expected_more(past, 20, scale=2.0, limit=1000) == pytest.approx((40 + 60 + 200) / 3 - 20)
    assert expected_more(past, 20, scale=1.0, limit=50) == (30 + 50) / 2 - 20
    assert expected_more(past, 100, scale=1.0, limit=1000) == 100, "as long again"
    assert expected_more(past, 100, scale=1.0, limit=120) == 20


def test_a_log_normal_tail_is_expected_to_go_on_for_longer_the_longer_it_went():
    past = np.sort(np.random.default_rng(1).lognormal(5, 1, 20_000))
    more = [expected_more(past, count, scale=1.0, limit=10**6) for count in (0, 400, 1000, 2000)]
    assert more[0] == pytest.approx(np.exp(5.5), rel=0.03)
    assert more[1:] == sorted(more[1:])


def test_the_rate_is_that_of_responses_which_decode():
    before, present = {"a": 10, "b": 20, "gone": 5}, {"a": 30, "b": 30, "waiting": 0, "new": 7}
    assert growth_rate(before, present, 2.0) == (20 + 10) / 2 / 2.0
    assert growth_rate({}, present, 2.0) == 0
    assert growth_rate(before, present, 0.0) == 0


def tells(history: SuffixHistory, growth: int) -> list[float]:
    """Of one response that grows by so many tokens in steps of 0.1 s, and one that waits."""
    told: list[float] = []
    outlook = Outlook(history, told.append)
    prompts = make_prompts(2)
    outlook.begin(prompts, max_response_tokens=500)
    for step in range(1, 4 * TELL_STEPS + 1):
        outlook.after_step(lambda step=step: {"p/0#0": growth * step, "p/1#1": 0}, 0.1 * step)
    return told


def test_the_longest_response_is_told_every_few_steps():
    history = SuffixHistory(2**20)
    for prompt, length in zip(make_prompts(2), (100, 50), strict=True):
        for _ in range(20):
            history.add(prompt.problem_key, [1] * length, policy_version=0)
    assert list(history.lengths()) == [50] * 20 + [100] * 20
    told = tells(history, growth=1)
    assert len(told) == 3, "the first rate needs two looks"
    assert told == sorted(told, reverse=True)
    # Lengths of both prompts, times 1.41 for prompt 0: 71 and 141. It has 16 tokens and gets 10 a second.
    assert told[0] == pytest.approx((106 - 16) / 10, rel=0.03)
    # With 64 tokens, at 40 a second, prompt 0 needs 42 more; prompt 1, at 35 and 71, has all 53 before it.
    assert tells(history, growth=4)[0] == pytest.approx(53 / 40, rel=0.03)


def test_nothing_is_told_of_a_first_rollout():
    assert tells(SuffixHistory(2**20), growth=1) == []
    assert tells(SuffixHistory(0), growth=1) == []
    outlook = Outlook(SuffixHistory(0), lambda seconds: None)
    outlook.begin(make_prompts(1), max_response_tokens=100)
    assert [outlook.expected_more("p/0#1", count) for count in (0, 30, 90)] == [0, 30, 10]
