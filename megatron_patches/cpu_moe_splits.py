"""How many tokens go to which expert-parallel rank reaches the collective as a numpy array, but only if it comes from
a GPU: one that is on the CPU already stays a tensor, which torch.distributed takes for no list of sizes.

Remove when upstream runs this on a machine without CUDA.
"""

import functools

import torch

from megatron_patches.patch import Patch


def make(original):
    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        found = original(tensor, as_numpy=as_numpy, record_stream=False)
        return found.numpy() if as_numpy and isinstance(found, torch.Tensor) else found

    return maybe_move_tensor_to_cpu


PATCH = Patch(
    name="cpu_moe_splits",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
    source_sha256=("8fc5847a887d",),
    reason="numbers of tokens become numpy arrays, which torch.distributed asks for, only if they come from a GPU",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/transformer/moe/moe_utils.py",
    make=make,
)
