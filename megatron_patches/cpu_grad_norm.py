"""The global gradient norm is gathered in tensors made with `device="cuda"`, which raises without CUDA. The same code
runs with them on the CPU.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_grad_norm",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.optimizer.optimizer:get_grad_norm_fp32",
    source_sha256=("7fa2ba2493d4",),
    reason='the gradient norm is accumulated in tensors made with device="cuda"',
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/optimizer/clip_grads.py",
    make=on_cpu,
)
