"""Advantages, loss weights and the split into optimizer steps, against tables computed by hand."""

import pytest

from tlt.config import RLConfig
from tlt.rl.advantages import group_advantages
from tlt.rl.train_batch import build_train_batch, shaped_rewards
from tlt.types import Prompt, Rollout, RolloutGroup


def group(name: str, lengths: list[int], rewards: list[float] | None, version: int = 0) -> RolloutGroup:
    prompt = Prompt(prompt_id=name, source="s", token_ids=(7, 8), text="", answer={})
    rollouts = tuple(
        Rollout(
            token_ids=tuple(range(10, 10 + length)),
            logprobs=(-1.0,) * length,
            text="",
            finish_reason="stop",
            policy_version=version,
        )
        for length in lengths
    )
    return RolloutGroup(prompt=prompt, rollouts=rollouts, rewards=None if rewards is None else tuple(rewards))


@pytest.mark.parametrize(
    ("rewards", "divide_by_std", "expected"),
    [
        ([1, 0, 0, 0], False, [0.75, -0.25, -0.25, -0.25]),
        # centred squares sum to 0.75; / 3 = 0.25; std 0.5
        ([1, 0, 0, 0], True, [1.5, -0.5, -0.5, -0.5]),
        ([1, 0], True, [0.5 / 0.5**0.5, -0.5 / 0.5**0.5]),
        ([0.3, 0.3, 0.3], True, [0, 0, 0]),
        ([1], True, [0]),
    ],
)
def test_advantages_are_those_of_the_table(rewards, divide_by_std, expected):
    # 1e-6 is added to the standard deviation: relative error 2e-6 at std 0.5
    assert group_advantages(rewards, divide_by_std=divide_by_std) == pytest.approx(expected, rel=5e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token-mean", [1 / 10] * 4),
        ("sequence-mean-token-mean", [1 / (4 * 1), 1 / (4 * 2), 1 / (4 * 3), 1 / (4 * 4)]),
        ("dr-grpo", [1 / (4 * 20)] * 4),
    ],
)
def test_loss_weights_are_those_of_the_table(aggregation, expected):
    rl = RLConfig(loss_aggregation=aggregation)
    batch = build_train_batch([group("a", [1, 2], [1, 0]), group("b", [3, 4], [0, 1])], rl=rl, max_response_tokens=20)
    (step,) = batch.optimizer_steps
    assert [sequence.loss_weight for sequence in step] == pytest.approx(expected)
    assert step[2].token_ids == (7, 8, 10, 11, 12)
    assert step[2].num_response_tokens == 3


def test_equal_groups_are_dropped_only_when_asked_and_always_counted():
    groups = [group("a", [1, 1], [1, 1]), group("b", [1, 1], [0, 1]), group("c", [1, 1], [0, 0])]
    kept = build_train_batch(groups, rl=RLConfig(), max_response_tokens=5)
    dropped = build_train_batch(groups, rl=RLConfig(drop_equal_groups=True), max_response_tokens=5)
    assert [len(step) for step in kept.optimizer_steps] == [6]
    assert [len(step) for step in dropped.optimizer_steps] == [2]
    assert dropped.metrics["rl/equal_groups_frac"] == kept.metrics["rl/equal_groups_frac"] == pytest.approx(2 / 3)


def test_a_batch_of_equal_groups_only_has_no_optimizer_step():
    batch = build_train_batch([group("a", [1], [1])], rl=RLConfig(drop_equal_groups=True), max_response_tokens=5)
    assert batch.optimizer_steps == ()


def test_groups_are_split_evenly_and_stay_whole():
    rl = RLConfig(optimizer_steps=3, prompts_per_iteration=5)
    batch = build_train_batch([group(str(i), [1, 1], [0, 1]) for i in range(5)], rl=rl, max_response_tokens=5)
    assert sorted(len(step) for step in batch.optimizer_steps) == [2, 4, 4]


def test_rollouts_of_another_policy_version_are_refused():
    with pytest.raises(RuntimeError, match=r"one policy version, got \[0, 1\]"):
        build_train_batch(
            [group("a", [1], [1]), group("b", [1], [1], version=1)], rl=RLConfig(), max_response_tokens=5
        )


def test_unscored_groups_are_refused():
    with pytest.raises(RuntimeError, match="is not scored"):
        build_train_batch([group("a", [1], None)], rl=RLConfig(), max_response_tokens=5)


def test_overlong_responses_lose_reward_linearly_in_the_buffer():
    # limit 20, buffer 8: nothing up to 12 tokens, half the penalty at 16, all of it at 20
    rl = RLConfig(overlong_buffer_tokens=8, overlong_penalty=0.5, advantage_std=False)
    scored = group("a", [12, 16, 20], [1, 1, 1])
    assert shaped_rewards(scored, rl=rl, max_response_tokens=20) == pytest.approx([1, 0.75, 0.5])
    batch = build_train_batch([scored], rl=rl, max_response_tokens=20)
    assert [sequence.advantage for sequence in batch.optimizer_steps[0]] == pytest.approx([0.25, 0, -0.25])
    assert batch.metrics["rl/reward"] == 1.0, "metrics are of the task's own reward"


def test_probabilities_of_the_engine_become_metrics():
    rollouts = tuple(
        Rollout(token_ids=(1,) * len(values), logprobs=(-1.0,) * len(values), text="", finish_reason="stop",
                policy_version=0, entropies=values, max_probs=tuple(1 - value for value in values))
        for values in ((0.5, 0.001), (0.2, 0.009, 0.29))
    )  # fmt: skip
    scored = RolloutGroup(prompt=group("a", [1], [1]).prompt, rollouts=rollouts, rewards=(0.0, 1.0))
    metrics = build_train_batch([scored], rl=RLConfig(), max_response_tokens=5).metrics
    assert metrics["rollout/entropy"] == pytest.approx(0.2)
    assert metrics["rollout/max_prob"] == pytest.approx(0.8)
    assert metrics["rollout/low_entropy_frac"] == pytest.approx(0.4)
