"""Drawing a token by an exponential race, so that a drafter and the policy draw the same token as often as they agree.

Token i arrives at time E_i / p_i, with E_i an exponential number that belongs to (seed, position, i); the first to
arrive is the draw, and it is i with probability p_i. A drafter that races with the same numbers and its own q draws
the same token with probability at least (1 - TV) / (1 + TV) (Daliri, Musco, Suresh, arXiv 2408.07978): no ceiling of
E[max p] as for a drafter's best token, and unlike rejection sampling the policy's token depends on no draft at all, so
the response is token for token the one of plain sampling.

Tokens below `RARE` share one entry in the race, with their total probability; if that wins, inverse CDF decides among
them. So a row takes few exponential numbers, and the distribution stays exact.

Shapes: T rows, V vocabulary, C candidates (entries of all races together).
"""

from collections.abc import Sequence

import numpy as np
import torch

from tlt.spec.randomness import RARE_TOKEN, uniforms
from tlt.spec.verification import inverse_cdf

RARE = 1 / 2048
"""Tokens of a smaller probability race as one: at most 2,047 entries a row, a few dozen as a rule."""
NOTHING = 1e-12
"""Rounding of float64 sums can leave the rare tokens of a row this mass although none is there."""
LEAD_SHARE, SURE = 0.7, 1e-4
"""Weight of the lead in `confidence`; what is nearer to 0 or 1 counts as this near."""
NO_PROBABILITY = "no token has a probability in rows {}: NaN?"
REST = 2**32 - 1
"""Token id, which no token has, of the entry that stands for the rare ones."""


def race(
    probs: torch.Tensor,  # [T, V] float, each row a distribution
    seeds: Sequence[int],  # [T]
    positions: Sequence[int],  # [T]
    *,
    stream: int,
    token_ids: torch.Tensor | None = None,  # [V] ids of the columns where they are a part of the vocabulary
) -> torch.Tensor:
    """[T] column drawn in each row; never one of probability 0. RuntimeError for a row without any, such as NaN."""
    if probs.device.type == "cpu":
        return race_with_leads(probs, seeds, positions, stream=stream, token_ids=token_ids)[0]
    return _device_race(probs, seeds, positions, stream=stream, token_ids=token_ids)


def _device_race(
    probs: torch.Tensor, seeds: Sequence[int], positions: Sequence[int], *, stream: int, token_ids: torch.Tensor | None
) -> torch.Tensor:
    from tlt.spec.race_triton import triton_race

    columns = np.stack([
        np.asarray(seeds, dtype=np.uint64).view(np.int64), np.asarray(positions, dtype=np.int64),
        np.full(len(probs), stream),
    ])  # fmt: skip
    drawn = triton_race(probs.contiguous(), *torch.from_numpy(columns).to(probs.device), token_ids=token_ids)
    if bool((drawn < 0).any()):
        raise RuntimeError(NO_PROBABILITY.format((drawn < 0).nonzero().squeeze(1).tolist()))
    return drawn


def race_with_leads(
    probs: torch.Tensor, seeds: Sequence[int], positions: Sequence[int], *, stream: int,
    token_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, np.ndarray]:  # fmt: skip
    """`race` of rows in a CPU's memory, and [T] float64 by how much each token won: t2 / (t1 + t2) of the first two
    arrivals, 1 where no other came; 0 where the rare tokens won, of which another distribution draws another one."""
    from tlt.spec.race_kernel import race_rows

    drawn, leads = np.empty(len(probs), dtype=np.int64), np.empty(len(probs))
    race_rows(
        probs.contiguous().numpy(), np.asarray(seeds, dtype=np.uint64), np.asarray(positions, dtype=np.uint64),
        np.uint64(stream), np.uint64(RARE_TOKEN + stream),
        np.empty(0, dtype=np.int64) if token_ids is None else token_ids.numpy(), RARE, NOTHING, drawn, leads,
    )  # fmt: skip
    if (drawn < 0).any():
        raise RuntimeError(NO_PROBABILITY.format(np.flatnonzero(drawn < 0).tolist()))
    return torch.from_numpy(drawn), leads


def confidence(leads: np.ndarray, probs: np.ndarray) -> np.ndarray:
    """[T] in (0, 1): how sure it is that a like distribution draws the same token, of leads and probabilities [T].

    A like distribution differs more, relatively, where a token is improbable, so equal leads are worth less there: the
    weighted mean of both, as logarithms of odds. On the reasoner it tells 1.2 times as much of what stands as leads
    alone do (docs/results/rollout_2026-11-28.md); what it means is for a calibration to learn.
    """
    odds = LEAD_SHARE * _log_odds(leads) + (1 - LEAD_SHARE) * _log_odds(probs)
    return 1 / (1 + np.exp(-odds))


def _log_odds(values: np.ndarray) -> np.ndarray:
    values = np.clip(values, SURE, 1 - SURE)
    return np.log(values / (1 - values))


def tensor_race(
    probs: torch.Tensor, seeds: Sequence[int], positions: Sequence[int], *, stream: int,
    token_ids: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`race` in tensor operations, on any device: the reference of both kernels."""
    row, column = (probs >= RARE).nonzero(as_tuple=True)  # [C], rows ascending
    mass = probs[row, column].double()
    names = column if token_ids is None else token_ids[column]
    num_rows = len(probs)
    rest = probs.sum(1, dtype=torch.float64).index_add_(0, row, -mass)
    all_rows = torch.arange(num_rows, device=probs.device)
    rows = torch.cat([row, all_rows])
    times = arrival_times(
        torch.cat([mass, rest]), rows, torch.cat([names, torch.full_like(all_rows, REST)]),
        seeds=seeds, positions=positions, stream=stream,
    )  # fmt: skip
    first = torch.full((num_rows,), float("inf"), dtype=torch.float64, device=probs.device)
    first = first.scatter_reduce_(0, rows, times, "amin", include_self=True)
    is_first = times == first[rows]
    drawn = torch.full_like(all_rows, -1)
    # Two entries of a row that arrive at the very same time: the later column stands, on every rank alike.
    won = is_first[: len(row)]
    drawn = drawn.scatter_reduce_(0, row[won], column[won], "amax", include_self=True)
    rare = (drawn < 0).nonzero().squeeze(1)
    if len(rare):
        index = rare.cpu().numpy()
        numbers = uniforms(_at(seeds, index), _at(positions, index), stream=RARE_TOKEN + stream).to(probs.device)
        weights = probs[rare]
        drawn[rare] = inverse_cdf(weights.masked_fill(weights >= RARE, 0), numbers)
    return drawn


def arrival_times(
    mass: torch.Tensor,  # [C] float64
    rows: torch.Tensor,  # [C]
    names: torch.Tensor,  # [C] token ids
    *,
    seeds: Sequence[int],
    positions: Sequence[int],
    stream: int,
) -> torch.Tensor:
    """[C] float64; infinity for an entry without mass."""
    index = rows.cpu().numpy()
    numbers = uniforms(
        _at(seeds, index), _at(positions, index), stream=stream, items=names.cpu().numpy()
    ).to(mass.device)  # fmt: skip
    exponential = -torch.log1p(-numbers)
    return torch.where(mass > NOTHING, exponential / mass.clamp(min=NOTHING), float("inf"))


def _at(values: Sequence[int], index: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=np.uint64)[index]
