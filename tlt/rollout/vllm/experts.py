"""Weights of a mixture's experts inside the engine: vLLM has those of a layer in two arrays, gate and up one behind
the other, and on a CPU computes with packed copies of them.

Shapes: E experts, H hidden, F feed-forward width of an expert on this rank.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn

NAME = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
ARRAYS = {"gate": ("w13_weight", 0), "up": ("w13_weight", 1), "down": ("w2_weight", 0)}
"""Array of each matrix, and which of the parts of its rows it is."""


@dataclass(frozen=True, kw_only=True)
class ExpertWeight:
    """One matrix of one expert."""

    layer: nn.Module
    expert: int
    matrix: str

    def own_part(self, sent: torch.Tensor, *, tp_rank: int, tp_size: int) -> torch.Tensor:
        """A copy of this rank's part of the full matrix: rows of gate and up [F, H], columns of down [H, F]."""
        return sent.chunk(tp_size, dim=1 if self.matrix == "down" else 0)[tp_rank].clone()

    def holds(self, values: torch.Tensor) -> bool:
        """Whether the engine computes with this part, bit for bit."""
        array, part = ARRAYS[self.matrix]
        live = getattr(self.layer, array).data[self.expert]
        wanted = values.to(live.dtype)
        pack = packing(self.layer)
        if pack is not None:  # by blocks of rows, so that a part's own packing is a part of the array's
            wanted = pack(wanted[None].contiguous())
        num_parts = 1 if self.matrix == "down" else 2
        return torch.equal(live.flatten().chunk(num_parts)[part], wanted.flatten())


def located(model: nn.Module, name: str) -> ExpertWeight | None:
    """What a Hugging Face name of an expert's weight names; None where it names no expert's."""
    found = NAME.fullmatch(name)
    if found is None:
        return None
    layer = model.get_submodule(found[1]).routed_experts
    return ExpertWeight(layer=layer, expert=int(found[2]), matrix=found[3])


def packing(layer: nn.Module):
    """How vLLM packs an array [E, rows, columns] of a layer; None where it computes with the array itself."""
    kernels = layer.quant_method.moe_kernel.fused_experts
    if layer.w13_weight.device.type != "cpu" or kernels._use_zentorch:
        return None
    from vllm._custom_ops import cpu_prepack_moe_weight

    return lambda array: cpu_prepack_moe_weight(array, kernels.isa)


@torch.inference_mode()
def pack_again(model: nn.Module) -> None:
    """vLLM 0.32 packs experts when it loads them first, and leaves them as they come when it loads them again."""
    for layer in model.modules():
        if hasattr(layer, "w13_weight") and packing(layer) is not None:
            layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)
