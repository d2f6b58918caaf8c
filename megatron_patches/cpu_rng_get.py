"""Activation recomputation saves the state of the CUDA generator around the layers that are run again, which raises
without CUDA. Nothing is drawn there (dropout is 0), so there is no state to save: an empty tensor stands for it.

Remove when upstream runs this on a machine without CUDA.
"""

import torch

from megatron_patches.patch import Patch


def make(original):
    def get_cuda_rng_state(device="cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.empty(0)  # patched: upstream asks the CUDA generator

    return get_cuda_rng_state


PATCH = Patch(
    name="cpu_rng_get",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.tensor_parallel.random:_get_cuda_rng_state",
    source_sha256=("aa26caaa069c",),
    reason="activation recomputation saves the state of a CUDA generator",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/tensor_parallel/random.py",
    make=make,
)
