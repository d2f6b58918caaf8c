"""Clipping asserts that every gradient is a `torch.cuda.FloatTensor` and scales them by a fused kernel with a CUDA buffer.
The replacement scales by the same coefficient, max_norm / (total_norm + 1e-6) where below 1, with plain tensor code.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.patch import Patch


def make(original):
    def clip_grad_by_total_norm_fp32(parameters, max_norm, total_norm, use_decoupled_grad: bool = False) -> None:
        coefficient = max_norm / (total_norm + 1.0e-6)
        if coefficient >= 1.0:
            return
        name = "decoupled_grad" if use_decoupled_grad else "grad"
        for parameter in parameters:
            gradient = getattr(parameter, name, None)
            if gradient is not None:
                gradient.mul_(coefficient)  # patched: upstream asserts a CUDA tensor

    return clip_grad_by_total_norm_fp32

PATCH = Patch(
    name="cpu_clip_grad",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32",
    source_sha256=("8edb9da53650",),
    reason='clipping asserts that gradients are of type torch.cuda.FloatTensor',
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/optimizer/clip_grads.py",
    make=make,
)
