"""The policy's tensors in Megatron's torch_dist format, which loads at any parallel layout."""

from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import MegatronModule

from tlt.policy.metadata import check_metadata

OPTIMIZER_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True,
}  # fmt: skip
"""Layout of a distributed optimizer's state that does not depend on the number of data-parallel ranks. It is gathered
on the first of them, through host memory; else all would hold all of it, and twice as much on their devices."""
EXTRA_STATE = "_extra_state"
"""How the last part of a name begins that is no tensor's (a grouped layer numbers them): torch would unpickle it as it
stands. Without FP8 it holds nothing, and which modules have one differs between Megatron's layers and Transformer
Engine's."""
OPTIMIZER = "optimizer_class"


def save_policy(
    folder: Path, model: MegatronModule, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> None:
    """Write model, optimizer and schedule to an empty folder. Collective over all ranks; all must call."""
    model_state = stored_tensors(model)
    state = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, metadata=OPTIMIZER_SHARDING),
        OPTIMIZER: optimizer_class(optimizer),
        "scheduler": scheduler.state_dict(),
    }
    dist_checkpointing.save(
        state, str(folder), content_metadata=OPTIMIZER_SHARDING, preprocess_common_before_consistancy_check=_common
    )  # fmt: skip


def load_policy(
    folder: Path, model: MegatronModule, optimizer: MegatronOptimizer, scheduler: OptimizerParamScheduler
) -> None:
    """Read what `save_policy` wrote, at this layout. ValueError for a folder that may not be read, or of another
    optimizer. Collective over all ranks; all must call."""
    check_metadata(folder)
    stored, own = load_common_state_dict(str(folder)).get(OPTIMIZER), optimizer_class(optimizer)
    if stored not in (None, own):  # None: of before it was written
        raise ValueError(
            f"{folder} has the state of the optimizer {stored}, this run has {own}: resume where Transformer Engine "
            "and apex are installed as they were, or begin from the weights (tools/convert_mcore_to_hf.py)"
        )
    _begin_adam_state(optimizer)
    model_state = stored_tensors(model)
    state = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=True, metadata=OPTIMIZER_SHARDING),
        "scheduler": scheduler.state_dict(),
    }
    state = dist_checkpointing.load(state, str(folder))
    found = model.load_state_dict(state["model"], strict=False)
    wrong = [name for name in (*found.missing_keys, *found.unexpected_keys) if not is_extra_state(name)]
    if wrong:
        raise ValueError(f"{folder} lacks weights of the policy, or has others: {', '.join(wrong)}")
    optimizer.load_state_dict(state["optimizer"])
    _own_adam_steps(optimizer)
    scheduler.load_state_dict(state["scheduler"])


def stored_tensors(model: MegatronModule) -> dict:
    """Of a model, what a checkpoint holds: its tensors, by name."""
    return {name: each for name, each in model.sharded_state_dict().items() if not is_extra_state(name)}


def is_extra_state(name: str) -> bool:
    """Whether a model's entry is no tensor."""
    return name.rpartition(".")[2].startswith(EXTRA_STATE)


def _common(state: dict) -> dict:
    """What all ranks hold alike of what is no tensor: those that gathered nothing say so by a None."""
    return {
        name: _common(each) if isinstance(each, dict) else each
        for name, each in state.items() if not (name == "param_state" and each is None)
    }  # fmt: skip


def optimizer_class(optimizer: MegatronOptimizer) -> str:
    """Name of what computes the updates: torch's AdamW and fused ones, which Megatron takes where they are installed,
    do not read each other's state."""
    return ", ".join(sorted({type(part.optimizer).__name__ for part in optimizer.chained_optimizers}))


def _adam_states(optimizer: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, dict]]:
    """(parameter, state) of torch's AdamW inside a distributed optimizer; nothing where a fused one is installed."""
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if isinstance(part, DistributedOptimizer) and isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
            for group in inner.param_groups:
                yield from ((parameter, inner.state[parameter]) for parameter in group["params"])


def _begin_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give AdamW the state of step 0, which the distributed optimizer asks for before it loads another."""
    for parameter, state in _adam_states(optimizer):
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)


def _own_adam_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter a step count of its own again: loading leaves one tensor in all of them, which every
    parameter's update would then advance."""
    for _, state in _adam_states(optimizer):
        state["step"] = state["step"].clone()
