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
    """Lay sequences end to end; per-token fields sit at the position that predicts the token.

    No sequences at all give one of two tokens without loss, so that a rank without work still takes part in every
    collective. T is filled up to a multiple of `multiple` (sequence parallelism) by one more sequence without loss.
    """
    token_ids: list[int] = []
    targets: list[int] = []
    position_ids: list[int] = []
    cu_seqlens = [0]
    fields: dict[str, list[float]] = {"mask": [], "weights": [], "advantages": [], "rollout_logprobs": []}

    def append(ids: Sequence[int], num_prompt: int, weight: float, advantage: float, logprobs: Sequence[float]) -> None:
        num_response = len(ids) - num_prompt
        before = num_prompt - 1 if num_response else len(ids)  # positions that predict a prompt token
        after = 1 if num_response else 0  # the last position predicts nothing
        token_ids.extend(ids)
        targets.extend([*ids[1:], 0])
        position_ids.extend(range(len(ids)))
        cu_seqlens.append(cu_seqlens[-1] + len(ids))
        for name, response in (
            ("mask", [1.0] * num_response),
            ("weights", [weight] * num_response),
            ("advantages", [advantage] * num_response),
            ("rollout_logprobs", logprobs),
        ):
            fields[name].extend([0.0] * before + list(response) + [0.0] * after)

    for sequence in sequences:
        append(
            sequence.token_ids, sequence.num_prompt_tokens, sequence.loss_weight, sequence.advantage,
            sequence.rollout_logprobs,
        )  # fmt: skip
    if not sequences:
        append((0, 0), 2, 0.0, 0.0, ())
    if len(token_ids) % multiple:
        num_fill = multiple - len(token_ids) % multiple
        append((0,) * num_fill, num_fill, 0.0, 0.0, ())

    def floats(name: str) -> torch.Tensor:
        return torch.tensor(fields[name], dtype=torch.float32, device=device)

    return PackedMicroBatch(
        token_ids=torch.tensor(token_ids, device=device),
        targets=torch.tensor(targets, device=device),
        position_ids=torch.tensor(position_ids, device=device),
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        response_mask=floats("mask").bool(),
        loss_weights=floats("weights"),
        advantages=floats("advantages"),
        rollout_logprobs=floats("rollout_logprobs"),
    )


def unpack_response(values_T: torch.Tensor, micro_batch: PackedMicroBatch) -> list[list[float]]:
    """Values at the positions that predict response tokens, per sequence: [R] of each."""
    bounds = micro_batch.cu_seqlens.tolist()
    mask = micro_batch.response_mask
    return [
        values_T[begin:end][mask[begin:end]].tolist() for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]
