"""Saving a distributed optimizer gathers its shards on the first data-parallel rank through `tensor.cuda()`, unless
the ranks talk over gloo anyway by its own groups; without CUDA that raises. During this call `Tensor.cuda` returns the
tensor itself.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import with_cuda_as_identity
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_distributed_checkpoint",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero",
    source_sha256=("812c52ea4568",),
    reason="a distributed optimizer's shards are gathered for a checkpoint through Tensor.cuda()",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/optimizer/distrib_optimizer.py",
    make=with_cuda_as_identity,
)
