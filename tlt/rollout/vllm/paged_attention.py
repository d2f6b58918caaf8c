"""Attention of a drafter over a KV cache of its own, addressed by the engine's block tables.

A position of a request has the same block and offset here as in the target's cache, so blocks are allocated, shared
and freed by vLLM alone. Shapes: B requests, T query tokens, D head dimension.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from tlt.drafter.model import Attend, HeadShape


class CpuPagedAttention:
    """vLLM's CPU kernel on [blocks, key-value heads, block size, 2 D]."""

    def __init__(self, shape: HeadShape, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: Any):
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.shape = shape
        self.dtype = dtype
        self.isa = _get_attn_isa(dtype, block_size, shape.head_dim)
        cache = torch.zeros(num_blocks, shape.num_key_value_heads, 2 * block_size, shape.head_dim, dtype=dtype)
        self.key_cache, self.value_cache = cache.chunk(2, dim=2)

    def plan(
        self, *, block_table: torch.Tensor, query_lens: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor
    ) -> Attend:
        """Attention of the last `query_lens` [B] tokens of sequences of `seq_lens` [B], their keys to `slots` [T]."""
        from vllm import _custom_ops as ops
        from vllm import envs

        starts = torch.zeros(len(query_lens) + 1, dtype=torch.int32)
        torch.cumsum(query_lens, 0, out=starts[1:])
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens), num_heads=self.shape.num_attention_heads,
            num_kv_heads=self.shape.num_key_value_heads, head_dim=self.shape.head_dim, seq_lens=seq_lens,
            dtype=self.dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )  # fmt: skip

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            ops.cpu_attn_reshape_and_cache(k, v, self.key_cache, self.value_cache, slots, self.isa)
            output = torch.empty_like(q)
            ops.cpu_attention_with_kv_cache(
                query=q, key_cache=self.key_cache, value_cache=self.value_cache, output=output,
                query_start_loc=starts, seq_lens=seq_lens, scale=self.shape.head_dim**-0.5, causal=True,
                alibi_slopes=None, sliding_window=-1, block_table=block_table, softcap=0.0,
                scheduler_metadata=metadata, s_aux=None,
            )  # fmt: skip
            return output

        return attend


class FlashPagedAttention:
    """vLLM's FlashAttention on [blocks, block size, key-value heads, D], of one query a request; may be captured."""

    def __init__(self, shape: HeadShape, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: Any):
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        self.shape = shape
        self.version = get_flash_attn_version(head_size=shape.head_dim)
        self.block_size = block_size
        self.keys, self.values = torch.zeros(
            2, num_blocks, block_size, shape.num_key_value_heads, shape.head_dim, dtype=dtype, device=device
        )
        self.scale = torch.ones((), device=device)

    def plan(
        self, *, block_table: torch.Tensor, query_lens: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor
    ) -> Attend:
        """As `CpuPagedAttention.plan`; `query_lens` must be ones."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, reshape_and_cache_flash

        device = self.keys.device
        seq_lens = seq_lens.to(device)
        starts = torch.arange(len(seq_lens) + 1, dtype=torch.int32, device=device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            reshape_and_cache_flash(k, v, self.keys, self.values, slots, "auto", self.scale, self.scale)
            return flash_attn_varlen_func(
                q=q, k=self.keys, v=self.values, max_seqlen_q=1, cu_seqlens_q=starts,
                max_seqlen_k=block_table.shape[1] * self.block_size, seqused_k=seq_lens,
                softmax_scale=self.shape.head_dim**-0.5, causal=True, block_table=block_table,
                fa_version=self.version, num_splits=1,  # a number found by heuristics may change under a graph
            )  # fmt: skip

        return attend


class GatheredPagedAttention:
    """The same in plain torch, a request at a time, on any device: the reference."""

    def __init__(self, shape: HeadShape, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: Any):
        size = (num_blocks * block_size, shape.num_key_value_heads, shape.head_dim)
        self.block_size = block_size
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)

    def plan(
        self, *, block_table: torch.Tensor, query_lens: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor
    ) -> Attend:
        """As `CpuPagedAttention.plan`."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.keys[slots], self.values[slots] = k, v
            outputs = []
            sizes = query_lens.tolist()
            for blocks, query, seq_len in zip(block_table, q.split(sizes), seq_lens.tolist(), strict=True):
                position = torch.arange(seq_len, device=q.device)
                slot = blocks[position // self.block_size].long() * self.block_size + position % self.block_size
                is_past = position <= position[seq_len - len(query) :, None]
                outputs.append(
                    scaled_dot_product_attention(
                        query.transpose(0, 1)[None], self.keys[slot].transpose(0, 1)[None],
                        self.values[slot].transpose(0, 1)[None], attn_mask=is_past, enable_gqa=True,
                    )[0].transpose(0, 1)
                )  # fmt: skip
            return torch.cat(outputs)

        return attend
