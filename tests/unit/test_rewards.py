"""Scoring is exact; whatever a scorer does, the run goes on."""

import os
import signal
import time

import pytest

from tlt.config import RewardConfig
from tlt.rewards.pool import RewardPool
from tlt.rewards.scoring import extract, score
from tlt.types import Prompt, Rollout, RolloutGroup

SUM = {
    "kind": "reasoning-gym",
    "task": "chain_sum",
    "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "seed": 3,
    "index": 5,
}  # 6 + 2


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("8", 1.0),
        ("6 + 2 = 8", 1.0),
        ("<answer>8</answer> or 9", 1.0),
        ("8 9", 0.0),
        ("0123456789 8 88", 0.0),  # partial credit: the oracle is a part of the answer
        ("-8", 0.0),
        ("", 0.0),
        ("\x00" * 10, 0.0),
    ],
)
def test_sums_are_scored_exactly(response, expected):
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("chain_sum", seed=3, **SUM["config"])
    assert dataset[5]["question"].endswith("6 + 2 =")
    assert score(SUM, response) == expected


@pytest.mark.parametrize(
    ("gold", "response", "expected"),
    [
        ("42", "The answer is $\\boxed{42}$.", 1.0),
        ("\\frac{1}{3}", "$\\frac{2}{6}$", 1.0),
        ("\\frac{1}{3}", "$0.3333$", 0.0),
        ("18", "$18", 1.0),
        ("18", "I do not know", 0.0),
    ],
)
def test_mathematical_equality(gold, response, expected):
    assert score({"kind": "math", "gold": gold}, response) == expected


def test_extraction_takes_the_last_answer():
    assert extract("a <answer>1</answer> <answer> 2 </answer>", "2") == "2"
    assert extract("1,234 and then -5,678.5", "7") == "-5678.5"
    assert extract("first\nlast line\n\n", "text") == "last line"


def scripted(answer: dict, response: str) -> float:
    if response == "hang":
        time.sleep(60)
    if response == "die":
        os._exit(3)
    if response == "signal":
        os.kill(os.getpid(), signal.SIGUSR1)
        response = "good"
    if response == "raise":
        raise ValueError("weird response")
    return float(response == "good")


def group(name: str, texts: list[str]) -> RolloutGroup:
    prompt = Prompt(prompt_id=name, source="s", token_ids=(1,), text="", answer={})
    rollouts = tuple(
        Rollout(
            token_ids=(1,), logprobs=(-1.0,), text=text, finish_reason="stop", policy_version=0, sample_index=index
        )
        for index, text in enumerate(texts)
    )
    return RolloutGroup(prompt=prompt, rollouts=rollouts)


@pytest.fixture
def pool():
    pool = RewardPool(RewardConfig(timeout_s=1.0), scorer=scripted)
    yield pool
    pool.close()


def submit(pool: RewardPool, groups: list[RolloutGroup]) -> None:
    for item in groups:
        for index, rollout in enumerate(item.rollouts):
            pool.submit(item.prompt, index, rollout)


def test_hanging_dying_and_raising_scorers_cost_one_reward_each(pool):
    groups = [group("a", ["good", "hang", "bad"]), group("b", ["die", "good", "raise"])]
    begin_s = time.monotonic()
    submit(pool, groups)
    assert time.monotonic() - begin_s < 0.5, "submit returns at once"
    scored = pool.collect(groups)
    assert [item.rewards for item in scored] == [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
    assert pool.stats()["reward/timeouts"] == 1
    assert pool.stats()["reward/errors"] == 2
    assert time.monotonic() - begin_s < 30


def test_a_signal_to_all_processes_of_a_job_costs_no_reward(pool):
    groups = [group("a", ["signal"])]
    submit(pool, groups)
    assert pool.collect(groups)[0].rewards == (1.0,)


def test_a_response_that_was_not_submitted_is_an_error(pool):
    with pytest.raises(RuntimeError, match="never submitted"):
        pool.collect([group("a", ["good"])])


def test_abandoned_responses_are_forgotten(pool):
    groups = [group("a", ["good"])]
    submit(pool, groups)
    pool.abandon()
    with pytest.raises(RuntimeError, match="never submitted"):
        pool.collect(groups)


def test_scoring_needs_no_engine_and_no_torch():
    import subprocess
    import sys

    code = "import sys, tlt.rewards.scoring; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
