"""The compiled pass of a head over few rows is the head's own pass."""

import numpy as np
import pytest
import torch
from numba import njit

from tlt.drafter.arrays import floats_of, memory_of
from tlt.drafter.head_kernel import narrowed, read_out, widened
from tlt.drafter.model import EagleHead, HeadShape, initialize
from tlt.rollout.vllm.head_passes import FEW_ROWS, CpuPasses, TorchPasses, matrix_of
from tlt.rollout.vllm.paged_attention import CpuPagedAttention, GatheredPagedAttention

SHAPE = HeadShape(
    hidden_size=96, intermediate_size=160, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
    rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, max_position_embeddings=128,
)  # fmt: skip
BLOCK, NUM_BLOCKS = 8, 20


@njit
def through_bits(values):
    """float32 [N] -> bits of the nearest bfloat16 and their values."""
    bits, back = np.empty(len(values), np.uint16), np.empty(len(values), np.float32)
    for index in range(len(values)):
        bits[index] = narrowed(values[index], np.uint16(0))
        back[index] = widened(bits[index])
    return bits, back


def test_bits_are_those_of_torch():
    values = torch.cat([torch.randn(5000) * 10.0 ** torch.randint(-30, 30, (5000,)), torch.tensor([0.0, -0.0, 1.0])])
    halfway = (torch.randint(0, 2**15, (2000,), dtype=torch.int32) * 2**16 + 2**15).view(torch.float32)  # ties
    values = torch.cat([values, halfway[halfway < 3e38]])
    bits, back = through_bits(values.numpy())
    assert np.array_equal(bits, memory_of(values.bfloat16()))
    assert np.array_equal(back, floats_of(values.bfloat16()))


def make_head(dtype: torch.dtype) -> EagleHead:
    head = EagleHead(SHAPE)
    initialize(head, seed=3)
    with torch.no_grad():
        head.layers[0].post_attention_layernorm.weight.copy_(torch.linspace(0.5, 1.5, 96))
    return head.to(dtype).requires_grad_(False)


def make_passes(kind: type, attention: type, dtype: torch.dtype) -> TorchPasses:
    cache = attention(SHAPE, num_blocks=NUM_BLOCKS, block_size=BLOCK, dtype=dtype, device="cpu")
    return kind(make_head(dtype), cache, lambda hidden: hidden)


@pytest.mark.engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_are_those_of_the_head(dtype):
    """Ragged rows first, as a head that catches up, then one row a sequence, as one that drafts."""
    torch.manual_seed(0)
    exact = make_passes(TorchPasses, GatheredPagedAttention, torch.float32)
    exact.head.load_state_dict(make_head(dtype).state_dict())  # what is rounded, computed in float32
    ours = make_passes(CpuPasses, CpuPagedAttention, dtype)
    block_table = torch.randperm(15).view(3, 5).int() + 1
    seen, ways = torch.zeros(3, dtype=torch.int64), set()
    for counts in ([3, 1, 2], [1, 1, 1], [30, 7, 2], [2, 3, 3], [1, 1, 1]):
        lens = torch.tensor(counts)
        index = torch.repeat_interleave(torch.arange(3), lens)
        position = torch.cat([torch.arange(a, a + n) for a, n in zip(seen.tolist(), counts, strict=True)])
        slots = block_table[index, position // BLOCK].long() * BLOCK + position % BLOCK
        seen = seen + lens
        embeddings, hidden = torch.randn(2, len(index), SHAPE.hidden_size).to(dtype)
        rows = None if max(counts) == 1 else lens.cumsum(0) - 1
        inputs = position, slots, block_table, seen.int(), rows
        wanted = exact.forward(embeddings.float(), hidden.float(), *inputs)
        found = ours.forward(embeddings, hidden, *inputs)
        assert found.dtype == dtype
        ways.add(len(index) > FEW_ROWS)
        tolerance = 1e-4 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)
    assert ways == {True, False}


@pytest.mark.engine
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_new_weights_are_followed(dtype, tolerance):
    ours = make_passes(CpuPasses, CpuPagedAttention, dtype)
    one = torch.zeros(1, dtype=torch.int64)
    embeddings, hidden = (torch.randn(1, 96, dtype=dtype) for _ in range(2))
    inputs = embeddings, hidden, one, one, one[None].int(), one.int() + 1, None
    before = ours.forward(*inputs)
    with torch.no_grad():
        for parameter in ours.head.parameters():
            parameter.mul_(1.5)
    ours.weights_changed()
    after = ours.forward(*inputs)
    many = [torch.cat([x] * 9) for x in inputs[:4]]
    more = ours.forward(*many, one[None].int().expand(9, 1).contiguous(), torch.ones(9, dtype=torch.int32), None)
    assert (before - after).abs().max() > 5 * tolerance
    torch.testing.assert_close(more[:1], after, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_and_many_rows_are_read_out_with_the_latest_output_layer(dtype):
    ours = make_passes(CpuPasses, CpuPagedAttention, dtype)
    torch.manual_seed(4)
    hidden = torch.randn(5, 96, dtype=dtype)
    for _ in range(2):
        weight = torch.randn(40, 96, dtype=dtype)
        ours.output_changed(weight)
        wanted = (hidden.float() @ weight.float().T).softmax(1)
        for count in (1, 4, 5):
            found = ours.probs(hidden[:count], [1.0] * count)
            torch.testing.assert_close(found, wanted[:count], rtol=0, atol=1e-5 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 6])
def test_probabilities_are_softmaxes_at_their_temperatures(num_rows):
    torch.manual_seed(num_rows)
    weight, hidden = torch.randn(50, 24), torch.randn(num_rows, 24)
    temperatures = torch.linspace(0.5, 1.5, num_rows)
    found = read_out(matrix_of(weight), hidden.numpy(), temperatures.numpy())
    wanted = (hidden @ weight.T / temperatures[:, None]).softmax(1)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-6)


def test_a_head_that_computes_nan_is_seen():
    hidden = torch.full((1, 24), float("nan"))
    found = read_out(matrix_of(torch.randn(50, 24)), hidden.numpy(), np.ones(1, dtype=np.float32))
    assert np.isnan(found).any()
