"""Clipping asserts that every gradient is a `torch.cuda.FloatTensor` and makes a buffer with `device="cuda"`. The
same code runs with both names meaning the CPU.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_clip_grad",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32",
    source_sha256=("8edb9da53650",),
    reason="clipping asserts that gradients are of type torch.cuda.FloatTensor",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/optimizer/clip_grads.py",
    make=on_cpu,
)
