"""The fp32 optimizer keeps a loss scale of 1 in a tensor made with `device="cuda"`, which raises without CUDA. The
same code runs with it on the CPU.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_fp32_optimizer",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.optimizer.optimizer:FP32Optimizer.__init__",
    source_sha256=("4936aab88772",),
    reason='the loss scale of the fp32 optimizer is allocated with device="cuda"',
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/optimizer/optimizer.py",
    make=on_cpu,
)
