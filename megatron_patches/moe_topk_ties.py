"""Of experts with equal logits the router takes those that `torch.topk` happens to name first, which no one defines;
vLLM's CUDA kernel takes the lower numbers. In bfloat16 the last chosen of 8 in 128 experts equals the next one in some
6 % of a layer's tokens (of Gaussian logits), so over all layers most tokens would be computed by other experts than
they were sampled with. The function is copied with a stable sort in the place of `torch.topk`. On a CPU vLLM asks
`torch.topk` too, and both agree as they are.

Remove when upstream breaks ties by number, or when responses bring their experts along.
"""

import functools

import torch

from megatron_patches.patch import Patch, TorchStandIn, rebound


def stable_topk(scores: torch.Tensor, k: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest in falling order; of equal ones the first."""
    order = torch.sort(scores.detach(), dim=dim, descending=True, stable=True).indices
    indices = order.narrow(dim, 0, k).contiguous()  # the backward pass keeps them, and not the rest
    return scores.gather(dim, indices), indices


STABLE_TORCH = TorchStandIn()
STABLE_TORCH.topk = stable_topk


def make(original):
    return functools.update_wrapper(rebound(original, STABLE_TORCH), original)


PATCH = Patch(
    name="moe_topk_ties",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.transformer.moe.router:topk_routing_with_score_function",
    source_sha256=("ec2b620945b9",),
    reason="experts with equal logits are chosen otherwise than by the engine that sampled",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/transformer/moe/moe_utils.py",
    make=make,
)
