"""The distributed optimizer sorts parameters by the names of CUDA's tensor types and raises TypeError for any other.
The same code runs with those names meaning the CPU's types.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch


def make(original):
    return classmethod(on_cpu(original.__func__))


PATCH = Patch(
    name="cpu_distributed_optimizer",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._build_model_and_main_param_groups",
    source_sha256=("1b9f0ec06718",),
    reason="the distributed optimizer accepts only parameters of torch.cuda tensor types",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/optimizer/distrib_optimizer.py",
    make=make,
)
