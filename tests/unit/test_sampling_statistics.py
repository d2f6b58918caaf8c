"""Logprob, entropy and largest probability of the engine's sampler against torch.distributions."""

import pytest
import torch

from tlt.rollout.vllm.sampling import statistics


@pytest.mark.parametrize("removed", [0, 37])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_statistics_of_rows(removed, offset):
    logits = 4 * torch.randn(20, 500, generator=torch.Generator().manual_seed(1)) + offset
    logits[:, :removed] = float("-inf")
    logits[0, -1] += 100  # a row without entropy
    before = logits.clone()
    log_norm, entropy, max_prob = statistics(logits, logits.softmax(1))
    expected = torch.distributions.Categorical(logits=logits[:, removed:].double())
    assert torch.allclose(entropy.double(), expected.entropy(), atol=1e-5)
    assert float(entropy[0]) == pytest.approx(0, abs=1e-6)
    assert torch.allclose(max_prob.double(), expected.probs.amax(1), atol=1e-6)
    found = (logits[:, removed:] - log_norm[:, None]).double()
    assert torch.allclose(found, expected.logits, atol=1e-4)
    assert torch.equal(logits, before)
