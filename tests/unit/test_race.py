"""The race draws from the distribution, never a removed token, and couples two distributions as far as they agree.

Chi-square statistics are of fixed seeds: these tests either always pass or always fail.
"""

import numpy as np
import pytest
import torch

from tests.unit.test_verification import chi_square_limit
from tlt.spec.race import RARE, arrival_times, race, race_with_leads, tensor_race
from tlt.spec.randomness import DRAFT, TOKEN


def draws(probs: torch.Tensor, num: int, *, stream: int = TOKEN, first_seed: int = 0, **kwargs) -> torch.Tensor:
    seeds, positions = np.arange(first_seed, first_seed + num), np.arange(num) % 97
    return race(probs.expand(num, -1), seeds, positions, stream=stream, **kwargs)


def mixture_with_rare_tokens() -> torch.Tensor:
    """Few large tokens, 3,000 rare ones with a fifth of the mass, some removed."""
    generator = torch.Generator().manual_seed(3)
    rare = torch.rand(3000, generator=generator)
    rare[::7] = 0
    large = torch.tensor([0.4, 0.25, 0.1, 0.04, 0.01])
    probs = torch.cat([rare[:1000], large, rare[1000:]])
    probs[1000:1005] = 0.8 * large / large.sum()
    rest = torch.ones(len(probs), dtype=torch.bool)
    rest[1000:1005] = False
    probs[rest] *= 0.2 / probs[rest].sum()
    return probs


@pytest.mark.parametrize("first_seed", [0, 10**6, 10**9])
def test_draws_have_the_distribution_rare_tokens_too(first_seed):
    probs, num = mixture_with_rare_tokens(), 40_000
    assert float(probs[:1000].max()) < RARE
    drawn = draws(probs, num, first_seed=first_seed)
    assert bool((probs[drawn] > 0).all())
    # Cells: the five large tokens, and the rare ones in twenty blocks.
    cells = torch.cat([torch.arange(1000) // 150, 100 + torch.arange(5), 20 + torch.arange(2000) // 150])
    names, index = cells.unique(return_inverse=True)
    expected = num * torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, probs.double())
    found = torch.bincount(index[drawn], minlength=len(names)).double()
    assert float(expected.min()) > 5
    assert float(((found - expected) ** 2 / expected).sum()) < chi_square_limit(len(names) - 1)


def test_a_token_without_probability_is_never_drawn():
    probs = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]).repeat(2000, 1)
    drawn = race(probs, np.arange(4000), np.zeros(4000, dtype=int), stream=TOKEN).view(-1, 2)
    assert set(drawn[:, 0].tolist()) == {1}
    assert set(drawn[:, 1].tolist()) == {0, 2}


def test_the_draw_depends_on_its_own_row_only():
    probs = torch.softmax(2 * torch.randn(50, 600, generator=torch.Generator().manual_seed(0)), 1)
    seeds, positions = np.arange(50) * 31, np.arange(50)
    together = race(probs, seeds, positions, stream=TOKEN)
    alone = [int(race(probs[i : i + 1], seeds[i : i + 1], positions[i : i + 1], stream=TOKEN)) for i in range(50)]
    assert together.tolist() == alone
    assert together.tolist() != race(probs, seeds + 1, positions, stream=TOKEN).tolist()
    assert together.tolist() != race(probs, seeds, positions, stream=DRAFT).tolist()


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5, 2.0])
def test_a_drafter_that_races_with_the_same_numbers_agrees_beyond_the_bound(noise):
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(40, generator=generator)
    target = logits.softmax(0)
    draft = (logits + noise * torch.randn(40, generator=generator)).softmax(0)
    distance = 0.5 * float((target - draft).abs().sum())
    num = 20_000
    agreed = float((draws(target, num) == draws(draft, num)).double().mean())
    standard_error = 0.5 / num**0.5
    assert agreed >= (1 - distance) / (1 + distance) - 4 * standard_error
    assert agreed <= 1 - distance + 4 * standard_error
    if noise == 0:
        assert agreed == 1
    unrelated = float((draws(target, num) == draws(draft, num, stream=DRAFT)).double().mean())
    assert unrelated < agreed - 4 * standard_error


def test_columns_of_a_reduced_vocabulary_race_under_their_own_names():
    probs = torch.softmax(torch.randn(30, generator=torch.Generator().manual_seed(2)), 0)
    kept = torch.arange(0, 30, 2)
    reduced = probs[kept] / probs[kept].sum()
    full, part = draws(probs, 3000), kept[draws(reduced, 3000, token_ids=kept)]
    inside = (full % 2) == 0
    # Renormalising scales all arrivals alike: where a kept token won the full race, it wins the reduced one.
    assert torch.equal(full[inside], part[inside])
    assert int(inside.sum()) > 1000


@pytest.mark.parametrize("width", [0.1, 1.0, 3.0])  # all rare, both, few that are not
@pytest.mark.parametrize("is_part", [False, True])
def test_the_compiled_race_is_the_one_in_tensor_operations(width, is_part):
    generator = torch.Generator().manual_seed(5)
    probs = (width * torch.randn(300, 4000, generator=generator)).softmax(1)
    probs[:, ::5] = 0
    ids = torch.randperm(50_000, generator=generator)[:4000] if is_part else None
    seeds, positions = np.arange(300) * 10**15, np.arange(300)[::-1]
    expected = tensor_race(probs, seeds, positions, stream=DRAFT, token_ids=ids)
    assert race(probs, seeds, positions, stream=DRAFT, token_ids=ids).tolist() == expected.tolist()


def coupled_pairs(num: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray, np.ndarray]:
    """(drawn from q, drawn from a p near it, whether both are one, lead of the first, its probability under q)."""
    generator = torch.Generator().manual_seed(8)
    sharpness = 1 + 5 * torch.rand(num, 1, generator=generator)
    logits = sharpness * torch.randn(num, 60, generator=generator)
    q, p = logits.softmax(1), (logits + 0.7 * torch.randn(num, 60, generator=generator)).softmax(1)
    seeds = np.arange(num)
    drafted, leads = race_with_leads(q, seeds, seeds, stream=TOKEN)
    drawn = race(p, seeds, seeds, stream=TOKEN)
    return drafted, drawn, (drafted == drawn).numpy(), leads, q.gather(1, drafted[:, None]).squeeze(1).numpy()


def explained(stands: np.ndarray, feature: np.ndarray) -> float:
    """Share of the variance of what stands that is explained by tenths of a feature."""
    cells = np.searchsorted(np.quantile(feature, np.arange(1, 10) / 10), feature)
    means = np.array([stands[cells == cell].mean() if (cells == cell).any() else 0.0 for cell in range(10)])
    return 1 - float(((stands - means[cells]) ** 2).mean() / stands.var())


def test_a_lead_tells_what_stands_better_than_a_probability():
    _, _, stands, leads, own = coupled_pairs(20_000)
    assert 0.7 < stands.mean() < 0.9
    assert explained(stands, leads) > 1.5 * explained(stands, own) > 0
    close, far = stands[leads < 0.6], stands[leads > 0.95]
    assert 0.4 < close.mean() < 0.65, "as likely as not"
    assert far.mean() > 0.95


def test_leads_are_those_of_arrivals():
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.7, 0.1]])
    drawn, leads = race_with_leads(probs, [3, 4, 5], [7, 8, 9], stream=TOKEN)
    for row in range(3):
        times = [
            float(arrival_times(mass[None].double(), torch.tensor([0]), torch.tensor([column]), seeds=[3 + row],
                                positions=[7 + row], stream=TOKEN)) for column, mass in enumerate(probs[row])
        ]  # fmt: skip
        first, second, _ = sorted(times)
        assert times.index(first) == drawn[row]
        assert leads[row] == pytest.approx(second / (first + second) if second < float("inf") else 1.0)
    rare = torch.full((50, 4096), 1 / 4096)  # each below RARE
    assert (race_with_leads(rare, range(50), range(50), stream=TOKEN)[1] == 0).all()


def test_a_row_of_nan_is_refused():
    probs = torch.full((3, 50), 1 / 50)
    probs[1] = float("nan")
    with pytest.raises(RuntimeError, match=r"rows \[1\]"):
        race(probs, np.arange(3), np.arange(3), stream=TOKEN)
