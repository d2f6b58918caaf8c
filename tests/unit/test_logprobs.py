"""Log-probabilities and their gradients against plain autograd; truncation against the engine's own function."""

import pytest
import torch

from tlt.rl.logprobs import vocab_parallel_logprobs


def plain(logits, targets, temperature, kept=None):
    scaled = logits.double() / temperature
    if kept is not None:
        scaled = scaled.masked_fill(~kept, float("-inf"))
    logprobs = scaled.log_softmax(1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs.masked_fill(probs == 0, 0)).sum(1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy, probs.max(1).values


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 1030])  # 1030 is more than one chunk
def test_values_and_gradients_equal_autograd(temperature, num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    logits = (3 * torch.randn(num_rows, 37, generator=generator)).requires_grad_()
    targets = torch.randint(37, (num_rows,), generator=generator)
    upstream = torch.randn(2, num_rows, generator=generator)
    ours = vocab_parallel_logprobs(logits, targets, temperature=temperature)
    (gradient,) = torch.autograd.grad((ours.logprobs * upstream[0] + ours.entropy * upstream[1]).sum(), logits)
    logprobs, entropy, max_prob = plain(logits, targets, temperature)
    expected = torch.autograd.grad((logprobs * upstream[0] + entropy * upstream[1]).sum(), logits)[0]
    torch.testing.assert_close(ours.logprobs, logprobs.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy, entropy.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.max_prob, max_prob.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-4, atol=1e-5)


def test_the_logits_are_not_written_to():
    logits = torch.randn(4, 9)
    before = logits.clone()
    vocab_parallel_logprobs(logits, torch.zeros(4, dtype=torch.long), temperature=0.5)
    assert torch.equal(logits, before)


@pytest.mark.engine
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (5, 1.0), (5, 0.6), (1, 1.0), (0, 0.05), (100, 0.9)])
def test_truncated_distribution_is_the_engines(top_k, top_p):
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(64, 50, generator=generator)
    engine = apply_top_k_top_p_pytorch(
        logits.clone() / 0.8,
        k=torch.full((64,), top_k) if 0 < top_k < 50 else None,
        p=torch.full((64,), top_p) if top_p < 1 else None,
    )
    kept = engine > float("-inf")
    targets = kept.float().multinomial(1, generator=generator)[:, 0]
    ours = vocab_parallel_logprobs(logits, targets, temperature=0.8, top_p=top_p, top_k=top_k)
    logprobs, entropy, _ = plain(logits, targets, 0.8, kept)
    torch.testing.assert_close(ours.logprobs, logprobs.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.entropy, entropy.float(), rtol=1e-4, atol=1e-5)


def test_a_target_outside_the_kept_set_has_a_finite_logprob():
    logits = torch.tensor([[5.0, 1.0, 0.0]], requires_grad=True)
    ours = vocab_parallel_logprobs(logits, torch.tensor([2]), temperature=1.0, top_k=1)
    (ours.logprobs + ours.entropy).sum().backward()
    assert torch.isfinite(ours.logprobs).all()
    assert torch.isfinite(logits.grad).all()
