"""The optimizer with fp32 master weights sorts parameters by the names of CUDA's tensor types and raises TypeError
for any other. The same code runs with those names meaning the CPU's types.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_master_weights",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.__init__",
    source_sha256=("1d470dedcf8e",),
    reason="the optimizer with fp32 master weights accepts only parameters of torch.cuda tensor types",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/optimizer/optimizer.py",
    make=on_cpu,
)
