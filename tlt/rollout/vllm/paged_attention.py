"""Attention of a drafter over a KV cache of its own, addressed by the engine's block tables.

A position of a request has the same block and offset here as in the target's cache, so blocks are allocated, shared
and freed by vLLM alone. Shapes: B requests, T query tokens, D head dimension.
"""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from tlt.drafter.arrays import floats_of, memory_of
from tlt.drafter.model import Attend, HeadShape

MAX_SPLITS = 32
"""As vLLM's own under CUDA graphs."""


class CpuPagedAttention:
    """A compiled loop over [slots, key-value heads, D], of one query a request."""

    def __init__(self, shape: HeadShape, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: Any):
        self.block_size = block_size
        self.keys, self.values = torch.zeros(
            2, num_blocks * block_size, shape.num_key_value_heads, shape.head_dim, dtype=dtype, device=device
        )
        self.memory = memory_of(self.keys), memory_of(self.values)

    def plan(self, *, block_table: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor) -> Attend:
        """Attention of the last tokens of sequences of `seq_lens` [B] int32 tokens in the blocks of `block_table`
        [B, blocks] int32, the keys of [T] tokens to `slots` [T]."""
        from tlt.drafter.head_kernel import attend as attend_rows

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.keys[slots], self.values[slots] = k, v
            output = np.empty((len(q), q[0].numel()), dtype=np.float32)
            attend_rows(
                floats_of(q.flatten(1)), *self.memory, block_table.numpy(), self.block_size, seq_lens.numpy(), output
            )  # fmt: skip
            return torch.from_numpy(output).to(q.dtype).view_as(q)

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
        self.num_processors = torch.cuda.get_device_properties(device).multi_processor_count

    def num_splits(self, num_requests: int) -> int:
        """Parts of a sequence that are attended to side by side, so that few long ones fill the GPU; a number found by
        heuristics at each call may change under a graph. FlashAttention 2 knows none."""
        if self.version != 3:
            return 1
        return min(max(self.num_processors // (num_requests * self.shape.num_key_value_heads), 1), MAX_SPLITS)

    def plan(self, *, block_table: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor) -> Attend:
        """As `CpuPagedAttention.plan`."""
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
                fa_version=self.version, num_splits=self.num_splits(len(seq_lens)),
            )  # fmt: skip

        return attend


class GatheredPagedAttention:
    """The same in plain torch, a request at a time, on any device: the reference."""

    def __init__(self, shape: HeadShape, *, num_blocks: int, block_size: int, dtype: torch.dtype, device: Any):
        size = (num_blocks * block_size, shape.num_key_value_heads, shape.head_dim)
        self.block_size = block_size
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)

    def plan(self, *, block_table: torch.Tensor, seq_lens: torch.Tensor, slots: torch.Tensor) -> Attend:
        """As `CpuPagedAttention.plan`."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self.keys[slots], self.values[slots] = k, v
            outputs = []
            for blocks, query, seq_len in zip(block_table, q, seq_lens.tolist(), strict=True):
                position = torch.arange(seq_len, device=q.device)
                slot = blocks[position // self.block_size].long() * self.block_size + position % self.block_size
                outputs.append(
                    scaled_dot_product_attention(
                        query[None, :, None], self.keys[slot].transpose(0, 1)[None],
                        self.values[slot].transpose(0, 1)[None], enable_gqa=True,
                    )[0, :, 0]
                )  # fmt: skip
            return torch.stack(outputs)

        return attend
