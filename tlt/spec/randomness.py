"""Uniform numbers that are functions of (seed, position, stream): no generator, so nothing to rewind or keep in step.

A response's token at a position is drawn with the same number whatever was drafted before it, in whatever batch, on
whatever rank, after preemption or a restart.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

GOLDEN, MIX1, MIX2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

TOKEN, ACCEPT, RESIDUAL, DRAFT = 0, 1, 2, 3
"""Streams: the token from the policy; the acceptance of a sampled draft; the token after a rejected one; the draft."""
RARE_TOKEN = 16
"""Added to a stream: which of the rare tokens follows where a race is won by them (tlt/spec/race.py)."""


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), modulo 2**64."""
    values = (values ^ (values >> np.uint64(30))) * MIX1
    values = (values ^ (values >> np.uint64(27))) * MIX2
    return values ^ (values >> np.uint64(31))


def hashes(seeds: Sequence[int], positions: Sequence[int], *, stream: int) -> np.ndarray:
    """[T] uint64 that the numbers of each pair of seed and position are made of."""
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seeds, dtype=np.uint64) + GOLDEN)
        state = _mix(state + np.asarray(positions, dtype=np.uint64) * GOLDEN)
        return _mix(state + np.uint64(stream + 1) * GOLDEN)


def uniforms(
    seeds: Sequence[int], positions: Sequence[int], *, stream: int, items: Sequence[int] | None = None
) -> torch.Tensor:
    """[T] float64 in [0, 1), one for each pair of seed and position (and item, where given)."""
    state = hashes(seeds, positions, stream=stream)
    with np.errstate(over="ignore"):
        if items is not None:
            state = _mix(state + (np.asarray(items, dtype=np.uint64) + np.uint64(1)) * GOLDEN)
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def request_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """Seed of one response: a function of the iteration's seed, the prompt and the sample, whatever runs beside it."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample_index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
