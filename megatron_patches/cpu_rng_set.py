"""Activation recomputation restores the state of the CUDA generator around the layers that are run again, which raises
without CUDA. Nothing is drawn there (dropout is 0), so there is no state to restore.

Remove when upstream runs this on a machine without CUDA.
"""

import torch

from megatron_patches.patch import Patch


def make(original):
    def set_cuda_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        assert new_state.numel() == 0, "the state that cpu_rng_get gave"  # patched: upstream sets the generator

    return set_cuda_rng_state


PATCH = Patch(
    name="cpu_rng_set",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.tensor_parallel.random:_set_cuda_rng_state",
    source_sha256=("b179c9d95438",),
    reason="activation recomputation restores the state of a CUDA generator",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/tensor_parallel/random.py",
    make=make,
)
