"""A drafter's attention over paged keys: the compiled loop and the plain one agree, with what other passes wrote."""

import pytest
import torch

from tlt.drafter.model import HeadShape
from tlt.rollout.vllm.paged_attention import CpuPagedAttention, GatheredPagedAttention

pytestmark = pytest.mark.engine

SHAPE = HeadShape(
    hidden_size=128, intermediate_size=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-5,
    rope_parameters={}, max_position_embeddings=512,
)  # fmt: skip
BLOCK = 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_kinds_agree_on_ragged_sequences(dtype):
    torch.manual_seed(0)
    blocks = torch.randperm(20).to(torch.int32)
    block_table = torch.stack([blocks[:5], blocks[5:10], blocks[10:15]])
    kinds = [
        kind(SHAPE, num_blocks=20, block_size=BLOCK, dtype=dtype, device="cpu")
        for kind in (CpuPagedAttention, GatheredPagedAttention)
    ]
    seen = torch.zeros(3, dtype=torch.int32)
    for counts in ([40, 7, 100], [1, 1, 1], [5, 33, 2], [1, 1, 1]):
        lens = torch.tensor(counts, dtype=torch.int32)
        index = torch.repeat_interleave(torch.arange(3), lens)
        position = torch.cat([torch.arange(a, a + n) for a, n in zip(seen.tolist(), counts, strict=True)])
        slots = block_table[index, position // BLOCK].long() * BLOCK + position % BLOCK
        seen = seen + lens
        k, v = torch.randn(2, int(lens.sum()), 2, 32).to(dtype)
        q = torch.randn(3, 4, 32).to(dtype)
        outputs = [kind.plan(block_table=block_table, seq_lens=seen, slots=slots)(q, k, v) for kind in kinds]
        tolerance = 1e-4 if dtype == torch.float32 else 0.01
        torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)


def test_a_token_does_not_see_what_follows():
    """Nor the blocks of another sequence: what lies behind a sequence's end is changed."""
    for kind in (CpuPagedAttention, GatheredPagedAttention):
        attention = kind(SHAPE, num_blocks=4, block_size=BLOCK, dtype=torch.float32, device="cpu")
        torch.manual_seed(0)
        q, k, v = torch.randn(1, 4, 32), torch.randn(6, 2, 32), torch.randn(6, 2, 32)
        block_table, slots = torch.tensor([[2, 1]], dtype=torch.int32), 2 * BLOCK + torch.arange(6)

        def attended(k, v, seq_len, attention=attention, q=q, block_table=block_table, slots=slots):
            seq_lens = torch.tensor([seq_len], dtype=torch.int32)
            return attention.plan(block_table=block_table, seq_lens=seq_lens, slots=slots)(q, k, v)

        first, whole = attended(k, v, 5), attended(k, v, 6)
        k, v = torch.cat([k[:5], k[5:] + 1]), torch.cat([v[:5], v[5:] + 1])
        assert torch.equal(first, attended(k, v, 5))
        assert not torch.equal(whole, attended(k, v, 6))
