"""Tensors in a CPU's memory as the arrays that compiled loops read."""

import numpy as np
import torch


def memory_of(tensor: torch.Tensor) -> np.ndarray:
    """The same memory: float32 as it is, bfloat16 as its bits, uint16."""
    tensor = tensor.detach()
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def floats_of(tensor: torch.Tensor) -> np.ndarray:
    """The values in float32."""
    return tensor.detach().float().numpy()
