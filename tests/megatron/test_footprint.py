"""What a dry run says of the policy's memory, held against real Megatron models: sizes exactly, activations measured.

Not covered: Transformer Engine's layers, sequence parallelism, and whatever a GPU's allocator adds.
"""

import json
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_patches import apply_patches
from tests.distributed.ranks import run_ranks
from tests.distributed.trainer_cases import make_batch, make_trainer
from tests.megatron.test_policy import lone_sequences
from tests.tiny_models import EXPERTS, write_tiny_model
from tlt.config import OptimizerConfig
from tlt.footprint import policy
from tlt.policy.model import forward_packed
from tlt.policy.trainer import MegatronPolicyTrainer
from tlt.rl.packing import pack

pytestmark = pytest.mark.megatron


def shards_of(trainer: MegatronPolicyTrainer, folder: Path, optimizer: OptimizerConfig) -> policy.PolicyShards:
    return policy.PolicyShards(
        hf_config=json.loads((folder / "config.json").read_text()), model=trainer.model_config, optimizer=optimizer,
        dp_size=trainer.parallel.dp_size,
    )  # fmt: skip


def state_bytes(trainer: MegatronPolicyTrainer, *, bf16: bool) -> int:
    """Of Adam's moments, and of fp32 master weights where there are any."""
    total = 0
    for part in trainer.optimizer.chained_optimizers:
        for parameter, state in part.optimizer.state.items():
            moments = [state["exp_avg"], state["exp_avg_sq"], *([parameter] if bf16 else [])]
            total += sum(each.numel() * each.element_size() for each in moments)
    return total


def _sizes(
    rank: int, world_size: int, folder: Path, tp: int, pp: int, bf16: bool, is_distributed: bool, ep: int = 1
) -> None:
    optimizer = OptimizerConfig(lr=1e-3, use_distributed_optimizer=is_distributed)
    trainer = make_trainer(folder, tp=tp, pp=pp, ep=ep, bf16=bf16, optimizer=optimizer)
    trainer.train_step(make_batch(num_steps=1))
    shards, stage = shards_of(trainer, folder, optimizer), trainer.parallel.pp_rank
    held = sum(each.numel() * each.element_size() for each in trainer.stage.parameters())
    assert held == policy.weight_bytes(shards, stage)
    buffers = [*trainer.ddp.buffers, *trainer.ddp.expert_parallel_buffers]
    gradients = sum(each.grad_data.numel() * each.grad_data.element_size() for each in buffers)
    padding = 4096 if is_distributed else 0  # a distributed optimizer pads its buffer so that it divides
    assert 0 <= gradients - policy.gradient_bytes(shards, stage) <= padding
    # Equal to rounding: ranks have whole parts of a padded buffer.
    assert state_bytes(trainer, bf16=bf16) == pytest.approx(policy.optimizer_bytes(shards, stage), abs=3 * padding)


@pytest.mark.parametrize(
    ("kind", "tp", "pp", "bf16", "is_distributed"),
    [
        ("llama", 1, 2, True, False),  # tied: the last stage has a copy of the embedding
        ("qwen2", 2, 1, True, False),
        ("qwen3", 1, 1, True, True),  # two data-parallel ranks share the optimizer's state
        ("qwen3", 1, 1, False, False),
    ],
)
def test_weights_gradients_and_optimizer_state_are_as_large_as_said(tiny_models, kind, tp, pp, bf16, is_distributed):
    run_ranks(_sizes, 2, tiny_models[kind], tp, pp, bf16, is_distributed)


@pytest.mark.parametrize(("pp", "ep", "is_distributed"), [(1, 2, True), (2, 2, False), (1, 4, True)])
def test_experts_take_what_was_said(tiny_models, pp, ep, is_distributed):
    run_ranks(_sizes, 4, tiny_models[EXPERTS], 1, pp, True, is_distributed, ep)


def saved_bytes(trainer: MegatronPolicyTrainer, num_tokens: int) -> int:
    """What autograd keeps of a forward pass, each storage once, parameters left out."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    trainer.ddp.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_packed(trainer.ddp, pack(lone_sequences(num_tokens)))
    own = {parameter.untyped_storage().data_ptr() for parameter in trainer.ddp.parameters()}
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


def _activations(rank: int, world_size: int, shallow: Path, deep: Path) -> None:
    apply_patches()
    num_tokens, num_layers = 200, 4
    for recompute in ("none", "full"):
        found = {}
        for folder in (shallow, deep):
            trainer = make_trainer(folder, recompute=recompute)
            found[folder] = saved_bytes(trainer, num_tokens)
            parallel_state.destroy_model_parallel()
            shards = shards_of(trainer, folder, OptimizerConfig())
        said = policy.activation_bytes(shards, 0, num_tokens=num_tokens)
        if recompute == "full":
            said -= int(num_tokens * policy.layer_token_bytes(shards))  # exists in the backward pass only
        measured = (found[deep] - found[shallow]) / (num_layers - 1) * num_layers
        if recompute == "none":  # local layers on a CPU: norms in two steps, attention's sequences laid together
            hidden, heads, dim = 128, 4, 32
            said += num_layers * num_tokens * 4 * (2 * hidden + heads * dim + heads + 2)
        assert said == pytest.approx(measured, rel=1e-3), recompute


def test_activations_are_what_autograd_keeps(tmp_path):
    shallow, deep = (write_tiny_model("qwen2", tmp_path / str(n), num_hidden_layers=n) for n in (1, 4))
    run_ranks(_activations, 1, shallow, deep)
