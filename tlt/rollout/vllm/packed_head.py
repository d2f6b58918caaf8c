"""A head's linear layers as vLLM computes its own on a CPU: from weights packed for its matrix kernels.

Torch packs them anew at every call: 0.48 ms instead of 0.22 ms for the layers of a head of 4.2 M parameters, one row.
"""

import copy

import torch
from torch import nn

from tlt.drafter.model import EagleHead


class PackedLinear(nn.Module):
    """A frozen matrix [N, K] applied to rows [T, K]; a new one is made where the weights change."""

    def __init__(self, weight: torch.Tensor):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        dispatch_cpu_unquantized_gemm(self, remove_weight=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cpu_linear(x, self.weight, None)


def packed(head: EagleHead) -> EagleHead:
    """A copy that computes with packed weights, of the head's as they are now."""
    copied = copy.deepcopy(head)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child.weight))
    return copied
