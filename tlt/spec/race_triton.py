"""The race of tlt/spec/race.py as one Triton kernel, for rows on a GPU: no copy to the host, no number made there.

Seeds and positions may be tensors on the device, so that a CUDA graph can draw (tlt/rollout/vllm/draft_graphs.py).
Without it a draw takes some twenty kernels and waits for the device twice, to hash on the host.
"""

import torch
import triton
import triton.language as tl

from tlt.spec import race, randomness

NO_TOKEN = -1
"""Drawn in a row without any probability, such as NaN: it stands for the error of the CPU's race."""
BLOCK = 1024
"""Columns looked at together."""
FAR = tl.constexpr(2**31 - 1)
GOLDEN, MIX1, MIX2 = (tl.constexpr(int(n)) for n in (randomness.GOLDEN, randomness.MIX1, randomness.MIX2))
RARE, NOTHING, REST = (tl.constexpr(value) for value in (race.RARE, race.NOTHING, race.REST))
RARE_TOKEN = tl.constexpr(randomness.RARE_TOKEN)
UNIT = tl.constexpr(2.0**-53)


@triton.jit
def mix(value):
    """`randomness._mix` of uint64 numbers."""
    value = (value ^ (value >> 30)) * MIX1
    value = (value ^ (value >> 27)) * MIX2
    return value ^ (value >> 31)


@triton.jit
def stream_state(seed, position, stream):
    """`randomness.hashes` of uint64 numbers."""
    return mix(mix(mix(seed + GOLDEN) + position * GOLDEN) + (stream + 1) * GOLDEN)


@triton.jit
def uniform(state):
    """In [0, 1): the number that a state stands for."""
    return (state >> 11).to(tl.float64) * UNIT


@triton.jit
def arrival(state, item, mass):
    """Time of each item's entry. 1 - u has no rounding, u being a multiple of 2**-53 below 1."""
    return -tl.log(1.0 - uniform(mix(state + (item + 1) * GOLDEN))) / mass


@triton.jit
def race_kernel(
    probs, row_stride, seeds, positions, streams, token_ids, drawn,
    num_columns: tl.constexpr, has_names: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One row: the first entry to arrive; if that is the one of all rare tokens, inverse CDF among them."""
    row = tl.program_id(0).to(tl.int64)  # rows x columns may exceed 2**31
    seed = tl.load(seeds + row).to(tl.uint64, bitcast=True)
    position = tl.load(positions + row).to(tl.uint64, bitcast=True)
    stream = tl.load(streams + row).to(tl.uint64, bitcast=True)
    state = stream_state(seed, position, stream)
    probs += row * row_stride
    rest = tl.full((), 0.0, tl.float64)
    first = tl.full((), float("inf"), tl.float64)
    best = tl.full((), -1, tl.int32)
    for start in range(0, num_columns, block):
        column = start + tl.arange(0, block)
        mass = tl.load(probs + column, mask=column < num_columns, other=0.0).to(tl.float64)
        is_common = mass >= RARE
        rest += tl.sum(tl.where(mass < RARE, mass, 0.0))
        if tl.max(is_common.to(tl.int32)) > 0:
            if has_names:
                names = tl.load(token_ids + column, mask=column < num_columns, other=0)
            else:
                names = column.to(tl.int64)
            mass = tl.where(is_common, mass, 1.0)
            times = tl.where(is_common, arrival(state, names.to(tl.uint64, bitcast=True), mass), float("inf"))
            soonest = tl.min(times)
            if soonest <= first:
                first = soonest
                best = tl.max(tl.where(times == soonest, column, -1))
    if rest > NOTHING:
        name = tl.full((), REST, tl.int64).to(tl.uint64, bitcast=True)
        if arrival(state, name, rest) < first:
            target = uniform(stream_state(seed, position, stream + RARE_TOKEN)) * rest
            total = tl.full((), 0.0, tl.float64)
            found = tl.full((), FAR, tl.int32)
            last = tl.full((), -1, tl.int32)
            for start in range(0, num_columns, block):
                column = start + tl.arange(0, block)
                mass = tl.load(probs + column, mask=column < num_columns, other=0.0).to(tl.float64)
                is_rare = (mass > 0.0) & (mass < RARE)
                mass = tl.where(is_rare, mass, 0.0)
                reached = total + tl.cumsum(mass, 0)
                found = tl.minimum(found, tl.min(tl.where(is_rare & (reached > target), column, FAR)))
                last = tl.maximum(last, tl.max(tl.where(is_rare, column, -1)))
                total += tl.sum(mass)
            best = tl.where(found < FAR, found, last)  # rounding up to the total must not run over the end
    tl.store(drawn + row, best.to(tl.int64))


def triton_race(
    probs: torch.Tensor,  # [T, V] float, each row a distribution, columns contiguous
    seeds: torch.Tensor,  # [T] int64
    positions: torch.Tensor,  # [T] int64
    streams: torch.Tensor,  # [T] int64
    *,
    token_ids: torch.Tensor | None = None,  # [V] int64 on the device
) -> torch.Tensor:
    """[T] int64 column drawn in each row, NO_TOKEN in one without any probability."""
    drawn = torch.empty(len(probs), dtype=torch.int64, device=probs.device)
    is_part = token_ids is not None
    race_kernel[(len(probs),)](
        probs, probs.stride(0), seeds, positions, streams, token_ids if is_part else drawn, drawn,
        num_columns=probs.shape[1], has_names=is_part, block=BLOCK,
    )  # fmt: skip
    return drawn
