"""Sequences -> packed micro-batches, balanced over data-parallel ranks; no sequence is split and none is padded.

Shapes: T packed tokens of one micro-batch, B its sequences.
"""

from collections.abc import Sequence

import torch

from tlt.types import PackedMicroBatch, TrainSequence


def balanced_bins(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Indices of `sizes` in `num_bins` bins of nearly equal sum: longest first into the emptiest bin (LPT).

    Deterministic: ties go to the lower index. Bins list their indices in ascending order.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    sums = [0] * num_bins
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        emptiest = min(range(num_bins), key=lambda b: (sums[b], b))
        bins[emptiest].append(index)
        sums[emptiest] += sizes[index]
    return [sorted(contents) for contents in bins]


def pack_train_step(sequences: Sequence[TrainSequence], *, dp_size: int, max_tokens: int) -> list[list[list[int]]]:
    """Sequence indices as [data-parallel rank][micro-batch][sequence].

    Every rank has the same number of micro-batches, the fewest for which none exceeds max(max_tokens, longest
    sequence) tokens. Where there are fewer sequences than ranks some micro-batches are empty.
    """
    sizes = [len(sequence.token_ids) for sequence in sequences]
    limit = max(max_tokens, max(sizes, default=0))
    per_rank = max(1, -(-sum(sizes) // (dp_size * limit)))
    while True:
        bins = balanced_bins(sizes, dp_size * per_rank)
        if all(sum(sizes[i] for i in contents) <= limit for contents in bins):
            break
        per_rank += 1
    # Bins of one rank are dealt by size, so that ranks are equal although bins differ a little.
    order = sorted(range(len(bins)), key=lambda b: (-sum(sizes[i] for i in bins[b]), b))
    ranks: list[list[list[int]]] = [[] for _ in range(dp_size)]
    for turn in range(per_rank):
        row = order[turn * dp_size : (turn + 1) * dp_size]
        for rank, b in enumerate(row if turn % 2 == 0 else reversed(row)):
            ranks[rank].append(bins[b])
    return ranks


def pack(
    sequences: Sequence[TrainSequence], *, device: torch.device | str = "cpu", multiple: int = 1
) -> PackedMicroBatch:
    """Lay sequences end to end.

    No sequences at all give one of two tokens without response, so that a rank without work still takes part in every
    collective. T is filled up to a multiple of `multiple` (sequence parallelism) by one more sequence without
    response.
    """
    token_ids: list[int] = []
    cu_seqlens, predicting, targets = [0], [], []
    loss_weights, advantages, rollout_logprobs = [], [], []
    for sequence in sequences:
        num_response = sequence.num_response_tokens
        first = len(token_ids) + sequence.num_prompt_tokens - 1
        predicting.extend(range(first, first + num_response))
        targets.extend(sequence.token_ids[sequence.num_prompt_tokens :])
        loss_weights.extend([sequence.loss_weight] * num_response)
        advantages.extend([sequence.advantage] * num_response)
        rollout_logprobs.extend(sequence.rollout_logprobs)
        token_ids.extend(sequence.token_ids)
        cu_seqlens.append(len(token_ids))
    num_fill = 2 if not sequences else 0
    num_fill += -(len(token_ids) + num_fill) % multiple
    if num_fill:
        token_ids.extend([0] * num_fill)
        cu_seqlens.append(len(token_ids))

    def floats(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    lengths = [end - begin for begin, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)]
    return PackedMicroBatch(
        token_ids=integers(token_ids),
        position_ids=torch.cat([torch.arange(length, device=device) for length in lengths]),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        predicting=integers(predicting),
        targets=integers(targets),
        loss_weights=floats(loss_weights),
        advantages=floats(advantages),
        rollout_logprobs=floats(rollout_logprobs),
    )
