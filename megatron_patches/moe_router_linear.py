"""Without Transformer Engine the linear layer of a mixture of experts' router asks whether a name is None that was
never bound: NameError. It is computed by torch, in the router's precision, as upstream's own fallback would.

Remove when upstream binds the name.
"""

import functools

import torch

from megatron_patches.patch import Patch


def make(original):
    if "te_general_gemm" in original.__globals__:  # Transformer Engine is installed
        return functools.wraps(original)(lambda *args: original(*args))

    @functools.wraps(original)
    def router_gating_linear(inp, weight, bias, router_dtype):
        bias = None if bias is None else bias.to(router_dtype)
        return torch.nn.functional.linear(inp.to(router_dtype), weight.to(router_dtype), bias)

    return router_gating_linear


PATCH = Patch(
    name="moe_router_linear",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.transformer.moe.router:router_gating_linear",
    source_sha256=("0f5202718b1c",),
    reason="the router of a mixture of experts raises NameError where Transformer Engine is not installed",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/transformer/moe/moe_utils.py",
    make=make,
)
