"""Core attention over packed sequences for Megatron's local layer spec, which has none of its own.

Two kernels: torch's scaled_dot_product_attention, one call for each sequence, on any device; torch's FlashAttention
over sequences of any lengths, one call for all, on a GPU in half precision.
Shapes: T packed tokens, S tokens of one sequence, D head dimension.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
MAX_DIFFERENCE = 0.05
"""Norm of the difference of two kernels in half precision by the norm of the result; an error in masks makes it 1."""


@dataclass
class HostPackedSeqParams(PackedSeqParams):
    """Bounds of sequences on the host, where every layer reads them: rotation as well as attention would each wait for
    the GPU to be told what the host knew."""

    device_cu_seqlens: torch.Tensor | None = None  # [B + 1] int32, for kernels


Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, HostPackedSeqParams, float | None],
    torch.Tensor,
]
"""(query [T, heads, D], key and value [T, key-value heads, D], bounds, scale) -> [T, heads, D]."""


def sequence_by_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: HostPackedSeqParams, scale: float | None
) -> torch.Tensor:
    """A call for each sequence."""
    sizes = bounds.cu_seqlens_q.diff().tolist()
    per_sequence = zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
    outputs = [
        scaled_dot_product_attention(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
            is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        )[0].transpose(0, 1)
        for q, k, v in per_sequence
    ]  # fmt: skip
    return torch.cat(outputs)


def all_at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: HostPackedSeqParams, scale: float | None
) -> torch.Tensor:
    """One call for all sequences (FlashAttention)."""
    from torch.nn.attention.varlen import varlen_attn

    # Not all versions of torch take fewer heads of keys than of queries here.
    heads_per_key = query.shape[1] // key.shape[1]
    if heads_per_key > 1:
        key, value = (x.repeat_interleave(heads_per_key, dim=1) for x in (key, value))
    return varlen_attn(
        query, key, value, bounds.device_cu_seqlens, bounds.device_cu_seqlens, bounds.max_seqlen_q,
        bounds.max_seqlen_kv, scale=scale, window_size=(-1, 0),  # nothing to the right: causal
    )  # fmt: skip


def fastest_kernel(config: TransformerConfig, device: torch.device) -> Kernel:
    """The kernel for all sequences at once where this machine has it and it computes what the other one does."""
    if device.type != "cuda" or config.params_dtype not in HALF:
        return sequence_by_sequence
    try:
        difference = largest_difference(all_at_once, config, device)
    except torch.cuda.OutOfMemoryError:  # says nothing of the kernel
        raise
    except (ImportError, TypeError, RuntimeError, NotImplementedError) as error:
        logger.warning("attention: a call for each sequence, since torch's for all at once fails: %s", error)
        return sequence_by_sequence
    if not difference <= MAX_DIFFERENCE:
        logger.warning("attention: a call for each sequence, from which the one for all differs by %g", difference)
        return sequence_by_sequence
    logger.info("attention: all sequences in one call, which differs by %.1e from a call for each", difference)
    return all_at_once


def largest_difference(kernel: Kernel, config: TransformerConfig, device: torch.device) -> float:
    """Of output and gradients of a kernel from `sequence_by_sequence`, by their norm, on three sequences."""
    generator = torch.Generator().manual_seed(0)
    bounds = packed_bounds(torch.tensor([0, 5, 6, 206], dtype=torch.int32), device)
    heads = config.num_attention_heads, config.num_query_groups, config.num_query_groups
    shapes = [(206, num, config.kv_channels) for num in (*heads, heads[0])]
    *inputs, slope = (torch.randn(shape, generator=generator).to(device, config.params_dtype) for shape in shapes)
    found = []
    for each in (kernel, sequence_by_sequence):
        own = [tensor.clone().requires_grad_(True) for tensor in inputs]
        output = each(*own, bounds, None)
        found.append([output, *torch.autograd.grad(output, own, slope)])
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(*found, strict=True)]
    return float(torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max())  # NaN where any is


def packed_bounds(cu_seqlens: torch.Tensor, device: torch.device) -> HostPackedSeqParams:
    """Of sequences that begin at `cu_seqlens` [B + 1] int32, on the CPU."""
    longest = int(cu_seqlens.diff().max())
    return HostPackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        device_cu_seqlens=cu_seqlens.to(device),
    )


class PackedAttention(MegatronModule):
    """Causal attention inside each sequence of a pack, none across; memory grows with T, not T squared.

    Takes the place of `DotProductAttention` in a layer spec and has its constructor, with the kernel as well.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object | None = None,
        kernel: Kernel = sequence_by_sequence,
    ):
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                f"PackedAttention is causal self-attention only, got {attn_mask_type}, {attention_type!r}"
            )
        if config.context_parallel_size != 1:
            raise ValueError("PackedAttention does not split sequences: context parallelism needs Transformer Engine")
        self.softmax_scale = softmax_scale
        self.kernel = kernel

    def forward(
        self,
        query: torch.Tensor,  # [T, heads, D]
        key: torch.Tensor,  # [T, key-value heads, D]
        value: torch.Tensor,  # [T, key-value heads, D]
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: HostPackedSeqParams | None = None,
    ) -> torch.Tensor:  # [T, heads x D]
        return self.kernel(query, key, value, packed_seq_params, self.softmax_scale).reshape(query.shape[0], -1)
