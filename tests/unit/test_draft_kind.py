"""Rates at which each kind of draft stands, against draws; the choice among kinds."""

import pytest
import torch

from tlt.spec.draft_kind import COUPLED, KINDS, ONE_HOT, SAMPLED, FixedKind, MeasuredKind, kind_choice, standing_rates
from tlt.spec.race import race
from tlt.spec.randomness import TOKEN


def distributions(num_tokens: int, *, seed: int, sharpness: float) -> torch.Tensor:
    logits = torch.randn(2, num_tokens, generator=torch.Generator().manual_seed(seed))
    return (sharpness * logits).softmax(1)


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("num_drafted", [12, 8])  # of 12 tokens
def test_rates_are_those_of_draws(sharpness, num_drafted):
    p, q = distributions(12, seed=1, sharpness=sharpness)
    ids = torch.arange(12)[:num_drafted]
    q = q[:num_drafted] / q[:num_drafted].sum()
    rates = {kind: float(rate) for kind, rate in standing_rates(p[None, ids], q[None]).items()}
    count, tokens = 40_000, torch.arange(40_000)
    policy = race(p.expand(count, -1), tokens, tokens, stream=TOKEN)
    coupled = ids[race(q.expand(count, -1), tokens, tokens, stream=TOKEN, token_ids=ids)]
    error = 4.5 * 0.5 / count**0.5  # standard deviations of a share; 1e-5 in a test
    assert rates[COUPLED] == pytest.approx(float((policy == coupled).double().mean()), abs=error)
    assert rates[ONE_HOT] == pytest.approx(float((policy == ids[q.argmax()]).double().mean()), abs=error)
    drawn = torch.multinomial(q, count, replacement=True, generator=torch.Generator().manual_seed(5))
    assert rates[SAMPLED] == pytest.approx(float((p[ids] / q).clamp(max=1)[drawn].mean()), abs=error)
    assert rates[COUPLED] <= rates[SAMPLED] + 1e-9


def test_equal_distributions_always_stand_and_disjoint_ones_never():
    p = torch.tensor([[0.5, 0.5, 0.0]])
    rates = standing_rates(p, p)
    assert (float(rates[COUPLED]), float(rates[SAMPLED]), float(rates[ONE_HOT])) == pytest.approx((1, 1, 0.5))
    rates = standing_rates(p, torch.tensor([[0.0, 0.0, 1.0]]))
    assert all(float(rate) == 0 for rate in rates.values())


def test_the_kind_that_stands_most_often_is_chosen_for_each_temperature():
    choice = MeasuredKind(KINDS)
    one_hot = {COUPLED: 8.0, ONE_HOT: 9.0, SAMPLED: 8.5}
    sampled = {COUPLED: 8.0, ONE_HOT: 5.0, SAMPLED: 8.05}
    for _ in range(7):
        assert choice.choose(0.3) == COUPLED, "too little is measured"
        choice.observe(0.3, one_hot, 10)
    assert choice.choose(0.3) == ONE_HOT
    for _ in range(100):
        choice.observe(1.0, sampled, 10)
    assert choice.choose(1.0) == COUPLED, "not better by the margin"
    assert choice.choose(0.3) == ONE_HOT
    for _ in range(200):  # the head was replaced: the past is forgotten
        choice.observe(0.3, sampled, 10)
    assert choice.choose(0.3) == SAMPLED


def test_ranks_that_round_differently_never_verify_by_rejection_sampling():
    rates = {COUPLED: 5.0, ONE_HOT: 1.0, SAMPLED: 9.0}
    chosen = []
    for tp_size in (1, 2):
        choice = kind_choice("auto", tp_size=tp_size)
        for _ in range(20):
            choice.observe(1.0, rates, 10)
        chosen.append(choice.choose(1.0))
    assert chosen == [SAMPLED, COUPLED]
    assert isinstance(kind_choice("one-hot", tp_size=2), FixedKind)
