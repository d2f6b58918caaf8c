"""Verification: the response is plain sampling's with one-hot drafts, and has its distribution with sampled ones.

Chi-square statistics are of fixed seeds, so these tests either always pass or always fail; the bounds are the 0.001
quantile, and two lossy rules show that they can fail.
"""

import math

import numpy as np
import pytest
import torch

from tlt.spec import verification
from tlt.spec.randomness import ACCEPT, RESIDUAL, TOKEN, uniforms
from tlt.spec.verification import REJECTED, SampledDrafts, draft_rows, inverse_cdf, reject, verify

V = 6


NO_DRAFTS = torch.tensor([], dtype=torch.long)


def sampled_drafts(probs, draft_probs, drafts, counts, seeds, positions) -> SampledDrafts:
    rows = draft_rows(counts)
    accept, residual = (uniforms(seeds, positions, stream=stream)[rows] for stream in (ACCEPT, RESIDUAL))
    stands, replacement = verification.reject(probs[rows], draft_probs, drafts, accept=accept, residual=residual)
    return SampledDrafts(index=torch.arange(len(drafts)), stands=stands, replacement=replacement)


def policy(prefix: tuple[int, ...]) -> torch.Tensor:
    """Probabilities after `prefix`: any function of it will do."""
    generator = torch.Generator().manual_seed(hash(prefix) % 1000)
    return (2 * torch.randn(V, generator=generator)).softmax(0)


def drafter(prefix: tuple[int, ...]) -> torch.Tensor:
    """A drafter that is right now and then."""
    generator = torch.Generator().manual_seed(7 + hash(prefix) % 1000)
    return (policy(prefix).log() + torch.randn(V, generator=generator)).softmax(0)


def chi_square_limit(df: int) -> float:
    """0.999 quantile (Wilson and Hilferty's approximation, within 1 % for df >= 3)."""
    return df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3


def test_uniforms_are_uniform_reproducible_and_unrelated():
    seeds, positions = np.repeat(np.arange(100), 100), np.tile(np.arange(100), 100)
    first = uniforms(seeds, positions, stream=0)
    assert torch.equal(first, uniforms(seeds, positions, stream=0))
    counts = torch.histc(first.float(), bins=20, min=0, max=1)
    assert float(((counts - 500) ** 2 / 500).sum()) < chi_square_limit(19)
    table = first.view(100, 100)
    other = uniforms(seeds, positions, stream=1).view(100, 100)
    for a, b in ((table[:, 1:], table[:, :-1]), (table[1:], table[:-1]), (table, other)):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(correlation)) < 0.04  # 4 standard errors of 10,000 pairs
    assert float(uniforms([2**31 - 1], [10**6], stream=2)) < 1


def test_inverse_cdf_never_draws_a_removed_token():
    weights = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).repeat(4, 1)
    drawn = inverse_cdf(weights, torch.tensor([0.0, 0.2499, 0.2501, 1 - 2**-53], dtype=torch.float64))
    assert drawn.tolist() == [1, 1, 3, 3]


def plain(seed: int, length: int) -> tuple[int, ...]:
    """Token by token, without drafts."""
    prefix: tuple[int, ...] = ()
    while len(prefix) < length:
        drawn = inverse_cdf(policy(prefix)[None], uniforms([seed], [len(prefix)], stream=TOKEN))
        prefix += (int(verify(drawn, NO_DRAFTS, [0])[0, 0]),)
    return prefix


def speculative(seed: int, length: int, *, sampled: bool, draws: np.random.Generator) -> tuple[tuple, int, int]:
    """With drafts whose number changes every step; (tokens, drafts, drafts that stood)."""
    prefix: tuple[int, ...] = ()
    step = proposed = stood = 0
    while len(prefix) < length:
        count = (3, 0, 1, 2)[step % 4]
        step += 1
        drafts, rows, q_rows = [], [policy(prefix)], []
        for _ in range(count):
            q = drafter(prefix + tuple(drafts))
            q_rows.append(q)
            drawn = draws.choice(V, p=(q.double() / q.double().sum()).numpy())
            drafts.append(int(drawn) if sampled else int(q.argmax()))
            rows.append(policy(prefix + tuple(drafts)))
        probs, ids = torch.stack(rows), torch.tensor(drafts, dtype=torch.long)
        seeds, positions = [seed] * (count + 1), range(len(prefix), len(prefix) + count + 1)
        outcome = None
        if sampled and count:
            outcome = sampled_drafts(probs, torch.stack(q_rows), ids, [count], seeds, positions)
        tokens = verify(inverse_cdf(probs, uniforms(seeds, positions, stream=TOKEN)), ids, [count], outcome)[0]
        new = [int(token) for token in tokens if token != REJECTED]
        proposed, stood = proposed + count, stood + len(new) - 1
        prefix += tuple(new)
    return prefix[:length], proposed, stood


def test_one_hot_drafts_leave_the_response_token_for_token():
    draws = np.random.default_rng(0)
    total = [0, 0]
    for seed in range(60):
        tokens, proposed, stood = speculative(seed, 12, sampled=False, draws=draws)
        assert tokens == plain(seed, 12)
        total = [total[0] + proposed, total[1] + stood]
    assert 0.2 < total[1] / total[0] < 0.9, "some drafts stood and some fell"


def joint_chi_square(samples: list[tuple[int, ...]]) -> tuple[float, int]:
    """Of the first three tokens against the policy's own probabilities; cells pooled to 5 expected."""
    expected = {}
    for a in range(V):
        for b in range(V):
            for c in range(V):
                expected[a, b, c] = float(policy(())[a] * policy((a,))[b] * policy((a, b))[c]) * len(samples)
    counts = dict.fromkeys(expected, 0)
    for sample in samples:
        counts[sample] += 1
    statistic, cells, rest = 0.0, 0, [0.0, 0.0]
    for cell, value in expected.items():
        if value < 5:
            rest = [rest[0] + value, rest[1] + counts[cell]]
        else:
            statistic += (counts[cell] - value) ** 2 / value
            cells += 1
    if rest[0] > 0:
        statistic += (rest[1] - rest[0]) ** 2 / rest[0]
        cells += 1
    return statistic, cells - 1


@pytest.mark.parametrize("sampled", [False, True])
def test_three_tokens_have_the_policys_joint_distribution(sampled):
    draws = np.random.default_rng(1)
    samples = [speculative(seed, 3, sampled=sampled, draws=draws)[0] for seed in range(4000)]
    statistic, df = joint_chi_square(samples)
    assert statistic < chi_square_limit(df), (statistic, df)


def test_a_lossy_rule_is_noticed(monkeypatch):
    """Taking every draft whose probability is above 0.1 (typical acceptance) must fail the same test."""

    def typical(probs, draft_probs, drafts, **numbers):
        _, replacement = reject(probs, draft_probs, drafts, **numbers)
        return probs.gather(1, drafts[:, None]).squeeze(1) > 0.1, replacement

    monkeypatch.setattr(verification, "reject", typical)
    draws = np.random.default_rng(1)
    samples = [speculative(seed, 3, sampled=True, draws=draws)[0] for seed in range(4000)]
    statistic, df = joint_chi_square(samples)
    assert statistic > 3 * chi_square_limit(df)


def test_sampled_drafts_stand_with_probability_one_minus_total_variation():
    p, q = policy((1,)), drafter((1,))
    draws = np.random.default_rng(2)
    drafts = torch.tensor(draws.choice(V, size=20_000, p=(q.double() / q.double().sum()).numpy()))
    accept = uniforms(range(20_000), range(20_000), stream=ACCEPT)
    accepted, _ = reject(p.expand(20_000, V), q.expand(20_000, V), drafts, accept=accept, residual=accept)
    expected = 1 - float((p - q).abs().sum()) / 2
    assert float(accepted.double().mean()) == pytest.approx(expected, abs=0.011)  # 3 standard errors


def test_both_kinds_of_drafts_share_one_step():
    drawn = torch.tensor([0, 1, 2, 3, 4])  # rows 0-2 are of request a, 3-4 of request b
    outcome = SampledDrafts(
        index=torch.tensor([1, 2]), stands=torch.tensor([True, False]), replacement=torch.tensor([9, 7])
    )
    assert verify(drawn, torch.tensor([0, 5, 3]), [2, 1]).tolist() == [[0, 1, REJECTED], [3, 4, REJECTED]]
    assert verify(drawn, torch.tensor([0, 5, 3]), [2, 1], outcome).tolist() == [[0, 5, 2], [7, REJECTED, REJECTED]]
    assert verify(drawn, torch.tensor([8, 5, 3]), [2, 1], outcome).tolist() == [
        [0, REJECTED, REJECTED],  # a one-hot draft fell before the sampled one
        [7, REJECTED, REJECTED],
    ]
    assert draft_rows([2, 0, 1]) == [0, 1, 4]


def test_a_step_without_drafts_is_plain_sampling():
    assert verify(torch.tensor([3, 1]), NO_DRAFTS, [0, 0]).tolist() == [[3], [1]]
    assert verify(torch.tensor([3, 1, 5]), torch.tensor([3]), [1, 0]).tolist() == [[3, 1], [5, REJECTED]]
