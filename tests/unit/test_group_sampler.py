"""Dynamic sampling: groups of equal reward are refilled, up to the rounds allowed, in a reproducible order."""

import pytest

from tlt.config import RLConfig
from tlt.rollout.groups import GroupSampler
from tlt.types import Prompt, Rollout, RolloutGroup, SamplingConfig

SAMPLING = SamplingConfig(temperature=1.0, max_response_tokens=4)


class Numbers:
    """Prompts 0, 1, 2, ..."""

    def __init__(self):
        self.drawn = 0

    def next_batch(self, num_prompts: int) -> list[Prompt]:
        first, self.drawn = self.drawn, self.drawn + num_prompts
        return [
            Prompt(prompt_id=str(number), source="s", token_ids=(1,), text="", answer={})
            for number in range(first, self.drawn)
        ]


class Collector:
    """Scores as a table says which prompts are mixed; a round takes 2 s, its tail 1 s."""

    def __init__(self, mixed: set[int]):
        self.mixed = mixed
        self.calls: list[tuple[int, int]] = []

    def collect(self, prompts, sampling, *, group_size, seed):
        self.calls.append((len(prompts), seed))
        rollout = Rollout(token_ids=(1,), logprobs=(0.0,), text="", finish_reason="stop", policy_version=0)
        groups = [
            RolloutGroup(
                prompt=prompt,
                rollouts=(rollout,) * 2,
                rewards=(1.0, 0.0 if int(prompt.prompt_id) in self.mixed else 1.0),
            )
            for prompt in prompts
        ]
        metrics = {
            "rollout/duration_s": 2.0, "rollout/tail_s": 1.0, "rollout/idle_frac": 1.0 / len(self.calls),
            "spot/preemption_s_max": 0.1 * (len(self.calls) == 2),
        }  # fmt: skip
        return groups, metrics


def sample(mixed: set[int], **rl):
    collector = Collector(mixed)
    config = RLConfig(prompts_per_iteration=4, drop_equal_groups=True, **rl)
    groups, metrics = GroupSampler(Numbers(), collector, SAMPLING, rl=config, seed=10).sample(3)
    return collector.calls, [group.prompt.prompt_id for group in groups], metrics


def test_without_refill_there_is_one_round():
    calls, ids, metrics = sample({0})
    assert calls == [(4, 13)]
    assert ids == ["0", "1", "2", "3"]
    assert metrics["rl/sampling_rounds"] == 1


def test_as_many_prompts_are_drawn_again_as_groups_were_equal():
    calls, ids, metrics = sample({0, 2, 5, 6}, refill_rounds=5)
    assert calls == [(4, 13), (2, 13), (1, 13)]  # 0 and 2 are mixed, then 5, then 6
    assert ids == ["0", "1", "2", "3", "4", "5", "6"]
    assert metrics["rollout/duration_s"] == 6.0
    assert metrics["rollout/tail_s"] == 3.0
    assert metrics["rollout/idle_frac"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert metrics["spot/preemption_s_max"] == 0.1, "the largest of all rounds, not a mean"


def test_rounds_are_bounded():
    calls, ids, _ = sample(set(), refill_rounds=2)
    assert len(calls) == 3
    assert len(ids) == 12


def test_refill_needs_dropping():
    with pytest.raises(ValueError, match="--rl-refill-rounds"):
        RLConfig(refill_rounds=1)
