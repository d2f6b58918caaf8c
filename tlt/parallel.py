"""Process groups: Megatron's tensor, pipeline and data parallel groups, plus one gloo control group over all ranks."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from tlt.config import ModelConfig

INITIAL_SEED = 1234
"""Of weights before they are loaded; nothing else draws from Megatron's generators: there is no dropout."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """This rank's place, and the agreements of all ranks (host data over gloo)."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    device: torch.device
    control_group: dist.ProcessGroup

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def all_gather_objects(self, value: Any) -> list[Any]:
        """The value of every rank, by rank. Collective over all ranks; all must call."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks of a tensor. Collective over all ranks; all must call."""
        total = values.clone()
        self.sum_in_place(total)
        return total

    def sum_in_place(self, values: torch.Tensor) -> None:
        """A tensor becomes its sum over all ranks; on a GPU over NCCL. Collective over all ranks; all must call."""
        dist.all_reduce(values, group=self.control_group if values.device.type == "cpu" else None)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Collective over all ranks; all must call."""
        total = torch.tensor(int(flag))
        dist.all_reduce(total, group=self.control_group)
        return bool(total)

    def barrier(self) -> None:
        """Wait for all ranks. Collective over all ranks; all must call."""
        self.any(False)


def initialize(model: ModelConfig, *, timeout: timedelta) -> Parallel:
    """Set up torch.distributed (env://, unless there is a world already) and Megatron's groups.

    Tensor-parallel ranks are neighbours, then data-parallel ones; pipeline stages are farthest apart (Megatron's
    order). Expert-parallel ranks are neighbours too, and experts are not split. Collective over all ranks; all must
    call.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        expert_model_parallel_size=model.expert_model_parallel_size,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
    )
    if on_gpu:
        model_parallel_cuda_manual_seed(INITIAL_SEED)  # layers on a GPU do not initialise without it
    return Parallel(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel_state.get_expert_model_parallel_world_size(),
        device=device,
        control_group=dist.new_group(backend="gloo", timeout=timeout),
    )
