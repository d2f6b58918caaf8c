"""Saving copies tensors from the device and then calls `torch.cuda.synchronize()`, which raises without CUDA. Tensors
that are on the CPU already need no waiting for.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch


def make(original):
    return staticmethod(on_cpu(original))


PATCH = Patch(
    name="cpu_checkpoint_preload",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.preload_tensors",
    source_sha256=("df5b267188bb",),
    reason="a checkpoint's tensors are copied to the host and then waited for by torch.cuda.synchronize",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/dist_checkpointing/strategies/filesystem_async.py",
    make=make,
)
