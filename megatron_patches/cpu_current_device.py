"""Megatron names the device of new tensors by `torch.cuda.current_device()` in about 170 places. A build of torch
without
CUDA raises there. The CPU is the device, so it is returned. No caller on such a build can depend on the original: it
always raises.

Remove when upstream runs this on a machine without CUDA.
"""

import torch

from megatron_patches.patch import Patch


def make(original):
    def current_device() -> torch.device:
        return torch.device("cpu")  # patched: upstream raises

    return current_device


PATCH = Patch(
    name="cpu_current_device",
    distribution="torch",
    versions=">=2.13,<2.14",
    target="torch.cuda:current_device",
    source_sha256=("6e9804168a5c",),
    reason="torch.cuda.current_device, which names the device of every buffer, raises where torch has no CUDA",
    upstream="https://github.com/NVIDIA/Megatron-LM/issues",
    make=make,
)
