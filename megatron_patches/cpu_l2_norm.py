"""Where neither Transformer Engine nor Apex is installed, the L2 norm of a list of tensors is computed by a fallback
that returns a tensor made with `device="cuda"`. The same code runs with it on the CPU.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_l2_norm",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.optimizer.clip_grads:l2_norm_impl",
    source_sha256=("01526c55444a",),
    reason='the fallback of the fused L2 norm returns a tensor made with device="cuda"',
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/utils.py",
    make=on_cpu,
)
