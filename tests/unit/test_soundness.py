"""Rollouts that cannot be trained on: of other weights, or with probabilities that are no numbers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.unit.drafter_cases import PIECES, SAMPLES, make_trainer, with_aux_states
from tlt.config import RLConfig
from tlt.drafter.buffer import HiddenStateBuffer
from tlt.rl.train_batch import build_train_batch
from tlt.rollout.collector import check_versions
from tlt.rollout.resources import give_back_memory, own_resources, resource_metrics
from tlt.types import Prompt, Rollout, RolloutGroup


def group(name: str, *logprobs: float) -> RolloutGroup:
    """One response of one token for each logprob."""
    prompt = Prompt(prompt_id=name, source="s", token_ids=(1,), text="", answer={})
    rollouts = tuple(
        Rollout(token_ids=(1,), logprobs=(value,), text="", finish_reason="stop", policy_version=4, sample_index=index)
        for index, value in enumerate(logprobs)
    )
    return RolloutGroup(
        prompt=prompt, rollouts=rollouts, rewards=tuple(float(index) for index in range(len(rollouts)))
    )


def test_a_stale_response_is_named():
    groups = [group("a", -1.0), group("b", -1.0, -1.0)]
    check_versions(groups, policy_version=4)
    stale = replace(groups[1].rollouts[1], policy_version=3, replica=2)
    groups[1] = replace(groups[1], rollouts=(groups[1].rollouts[0], stale))
    with pytest.raises(
        RuntimeError, match=r"response 1 of b \(replica 2\) is of policy version 3, the policy is at 4"
    ):
        check_versions(groups, policy_version=4)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_group_without_probabilities_is_left_out_and_counted(bad, caplog):
    groups = [group("a", -1.0, -2.0), group("b", -1.0, bad), group("c", -3.0, -1.0)]
    batch = build_train_batch(groups, rl=RLConfig(), max_response_tokens=4)
    assert batch.metrics["rl/unsound_groups"] == 1
    assert [len(step) for step in batch.optimizer_steps] == [4]
    assert "prompt b is left out" in caplog.text
    assert "[1]" in caplog.text
    assert build_train_batch(groups[:1], rl=RLConfig(), max_response_tokens=4).metrics["rl/unsound_groups"] == 0
    with pytest.raises(RuntimeError, match="not finite in 2 of 3 groups"):
        build_train_batch([groups[0], groups[1], replace(groups[1])], rl=RLConfig(), max_response_tokens=4)


@pytest.mark.parametrize("field", ["last_hidden_states", "aux_hidden_states"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_states_that_are_no_numbers_never_enter_the_buffer(field, bad):
    buffer = HiddenStateBuffer(10**6)
    sample = with_aux_states(SAMPLES[0])
    states = getattr(sample, field).clone()
    states[3, 7] = bad
    buffer.add(replace(sample, **{field: states}))
    assert (len(buffer), buffer.num_bytes, buffer.num_unsound) == (0, 0, 1)
    buffer.add(sample)
    assert (len(buffer), buffer.num_unsound) == (1, 1)


def test_a_buffer_forgets_policies_of_which_it_holds_nothing():
    sample = SAMPLES[1]
    buffer = HiddenStateBuffer(
        3 * sum(each.nbytes for each in vars(sample).values() if isinstance(each, torch.Tensor))
    )
    for version in range(50):
        for _ in range(2):
            buffer.add(replace(sample, policy_version=version))
    assert [each.policy_version for each in buffer] == [48, 49, 49]
    assert sorted(buffer.state_dict()["lengths"]) == [48, 49]
    assert len(buffer.training_samples(seed=0)) == 2


def test_a_drafter_step_without_finite_gradients_changes_nothing():
    trainer = make_trainer()
    trainer.step(PIECES)
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    broken = replace(
        PIECES[1].sample, last_hidden_states=torch.full_like(PIECES[1].sample.last_hidden_states, math.nan)
    )
    with pytest.raises(FloatingPointError, match="not finite in step 2"):
        trainer.step([replace(PIECES[1], sample=broken)])
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.parameters.items())
    assert trainer.num_steps == 1
    assert trainer.step(PIECES)["grad_norm"] > 0, "and the next step is as good as ever"


def test_resources_are_those_of_this_process():
    own = own_resources(history_bytes=2**20)
    kept = bytearray(64 * 2**20)
    kept[::4096] = b"x" * len(kept[::4096])
    with open("/dev/null") as file:
        more = own_resources(history_bytes=0)
        assert file.readable()
    assert more.rss_bytes - own.rss_bytes > 50 * 2**20
    assert more.num_files == own.num_files + 1
    metrics = resource_metrics([own, more])
    assert metrics["host/rss_mib_max"] == more.rss_bytes / 2**20
    assert metrics["host/history_mib"] == 1


def test_unused_memory_between_things_that_live_on_goes_back():
    pairs = [(np.ones(2**13), np.ones(2**7)) for _ in range(3200)]  # 64 and 1 KiB, one after the other
    kept = [small for _, small in pairs]
    full = own_resources(history_bytes=0).rss_bytes
    del pairs
    give_back_memory()
    assert full - own_resources(history_bytes=0).rss_bytes > 100 * 2**20
    assert len(kept) == 3200
