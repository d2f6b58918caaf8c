"""Numbers gone wrong never reach the weights: on real Megatron, on all ranks alike, whichever rank saw them."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.trainer_cases import make_batch, make_trainer
from tlt.config import OptimizerConfig, RLConfig
from tlt.types import TrainBatch, TrainSequence

pytestmark = pytest.mark.megatron


def changed(batch: TrainBatch, change: Callable[[TrainSequence], TrainSequence]) -> TrainBatch:
    """The batch with its very first sequence changed: one rank's."""
    (first, *rest), *steps = batch.optimizer_steps
    return replace(batch, optimizer_steps=((change(first), *rest), *steps))


def nan_rollout_logprob(sequence: TrainSequence) -> TrainSequence:
    return replace(sequence, rollout_logprobs=(math.nan, *sequence.rollout_logprobs[1:]))


def infinite_rollout_logprob(sequence: TrainSequence) -> TrainSequence:
    return replace(sequence, rollout_logprobs=(-math.inf, *sequence.rollout_logprobs[1:]))


def infinite_advantage(sequence: TrainSequence) -> TrainSequence:
    return replace(sequence, advantage=math.inf)


def nan_weight(sequence: TrainSequence) -> TrainSequence:
    return replace(sequence, loss_weight=math.nan)


def another_policys(sequence: TrainSequence) -> TrainSequence:
    """Finite all through, and far from what the trainer says: 1,000 nats over some 60 tokens."""
    return replace(sequence, rollout_logprobs=(-1000.0, *sequence.rollout_logprobs[1:]))


def _refused(rank: int, world_size: int, folder: Path, layout: dict) -> None:
    trainer = make_trainer(
        folder, rl=RLConfig(max_logprob_diff=3.0, importance_sampling_cap=None),
        optimizer=OptimizerConfig(lr=1e-3, max_skipped_steps=2), **layout,
    )  # fmt: skip
    good = make_batch(num_steps=1)

    def weights() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in trainer.named_hf_tensors()}

    before, lr_steps = weights(), trainer.scheduler.num_steps
    for change in (nan_rollout_logprob, infinite_advantage, nan_weight, infinite_rollout_logprob, another_policys):
        trainer.refusal.num_in_a_row = 0
        metrics = trainer.train_step(changed(good, change))
        assert metrics["policy/skipped_steps"] == 1, change.__name__
        after = weights()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), change.__name__
        assert trainer.scheduler.num_steps == lr_steps
    assert metrics["policy/logprob_diff_mean"] > 3

    metrics = trainer.train_step(good)
    assert metrics["policy/skipped_steps"] == 0
    after = weights()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items()), "and it goes on"

    bad = changed(good, nan_weight)
    assert [trainer.train_step(bad)["policy/skipped_steps"] for _ in range(2)] == [1, 1]
    with pytest.raises(RuntimeError, match=r"3 optimizer steps in a row .*--max-skipped-steps 2.*not finite"):
        trainer.train_step(bad)
    assert all(torch.equal(weights()[name], tensor) for name, tensor in after.items())


@pytest.mark.parametrize("layout", [{}, {"pp": 2}])
def test_a_step_that_is_not_sound_is_skipped_on_all_ranks(tiny_models, layout):
    run_ranks(_refused, 2, tiny_models["llama"], layout)
