"""Core attention over packed sequences for Megatron's local layer spec, which has none of its own.

Shapes: T packed tokens, S tokens of one sequence, D head dimension.
"""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import scaled_dot_product_attention


class PackedAttention(MegatronModule):
    """Causal attention inside each sequence of a pack, none across; memory grows with T, not T squared.

    Takes the place of `DotProductAttention` in a layer spec and has its constructor.
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
    ):
        super().__init__(config=config)
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                f"PackedAttention is causal self-attention only, got {attn_mask_type}, {attention_type!r}"
            )
        if config.context_parallel_size != 1:
            raise ValueError("PackedAttention does not split sequences: context parallelism needs Transformer Engine")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,  # [T, heads, D]
        key: torch.Tensor,  # [T, key-value heads, D]
        value: torch.Tensor,  # [T, key-value heads, D]
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:  # [T, heads x D]
        sizes = packed_seq_params.cu_seqlens_q.diff().tolist()
        per_sequence = zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
        outputs = [
            scaled_dot_product_attention(
                q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None],
                is_causal=True, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1],
            )[0].transpose(0, 1)
            for q, k, v in per_sequence
        ]  # fmt: skip
        return torch.cat(outputs).reshape(query.shape[0], -1)
