"""A drafter's attention over paged keys: vLLM's CPU kernel and the plain one agree, chunk by chunk with one pass."""

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


def test_both_kinds_agree_on_ragged_chunks():
    torch.manual_seed(0)
    blocks = torch.randperm(20).to(torch.int32)
    block_table = torch.stack([blocks[:5], blocks[5:10], blocks[10:15]])
    kinds = [
        kind(SHAPE, num_blocks=20, block_size=BLOCK, dtype=torch.float32, device="cpu")
        for kind in (CpuPagedAttention, GatheredPagedAttention)
    ]
    seen = torch.zeros(3, dtype=torch.int32)
    for query_lens in ([40, 7, 100], [1, 1, 1], [5, 33, 2], [1, 1, 1]):
        lens = torch.tensor(query_lens, dtype=torch.int32)
        index = torch.repeat_interleave(torch.arange(3), lens)
        position = torch.cat([torch.arange(a, a + n) for a, n in zip(seen.tolist(), query_lens, strict=True)])
        slots = block_table[index, position // BLOCK].long() * BLOCK + position % BLOCK
        seen = seen + lens
        q, k, v = (torch.randn(int(lens.sum()), heads, 32) for heads in (4, 2, 2))
        outputs = [
            kind.plan(block_table=block_table, query_lens=lens, seq_lens=seen, slots=slots)(q, k, v) for kind in kinds
        ]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_a_token_does_not_see_what_follows():
    kind = GatheredPagedAttention(SHAPE, num_blocks=4, block_size=BLOCK, dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    q, k, v = torch.randn(6, 4, 32), torch.randn(6, 2, 32), torch.randn(6, 2, 32)
    plan = {"block_table": torch.tensor([[2, 1]]), "slots": 2 * BLOCK + torch.arange(6)}
    whole = kind.plan(query_lens=torch.tensor([6]), seq_lens=torch.tensor([6]), **plan)(q, k, v)
    changed = kind.plan(query_lens=torch.tensor([6]), seq_lens=torch.tensor([6]), **plan)(
        q, torch.cat([k[:5], k[5:] + 1]), torch.cat([v[:5], v[5:] + 1])
    )
    assert torch.equal(whole[:5], changed[:5])
    assert not torch.equal(whole[5], changed[5])
