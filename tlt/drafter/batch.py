"""Training batches of a drafter: hidden-state samples laid end to end, aligned as the engine feeds its drafter.

At position t of a sample the head gets the hidden state at t and the embedding of token t + 1; its output stands for
the hidden state at t + 1, so the LM head on it predicts token t + 2. An engine begins drafts at the last prompt token
and after it (the first response token comes without a draft), and the last position with a target is S - 3: these are
the starts of a sample. All positions up to a start give keys; only starts, and what follows them, cost a whole layer.

Shapes: S tokens of a sample, H hidden, T positions of a pack that give keys, N starts, R positions with a target.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from tlt.types import LAST, HiddenStateSample, Piece

GOLDEN = 0.6180339887498949
"""Multiples of it modulo 1 are spread evenly, in any stretch of them."""


@dataclass(frozen=True, kw_only=True)
class DrafterBatch:
    """Pieces of one pack. No position sees another piece (`bounds`), none is padding."""

    next_token_ids: torch.Tensor  # [T] int64: token t + 1
    hidden_states: torch.Tensor  # [T, H] or [T, 3 H] float32, at t: those that the head reads
    position_ids: torch.Tensor  # [T] int64: t
    bounds: tuple[tuple[int, int], ...]
    """Where each piece begins and ends in T."""
    starts: torch.Tensor  # [N] int64, ascending: index in T
    num_starts: tuple[int, ...]
    """Of each piece."""
    start_rows: torch.Tensor  # [N] int64: index in R of the position itself; depth d is read d - 1 rows further
    room: torch.Tensor  # [N] int64: depths that have a target
    row_token_ids: torch.Tensor  # [R] int64: token t + 1
    row_position_ids: torch.Tensor  # [R] int64: t
    target_hidden_states: torch.Tensor  # [R, H] float32, at t + 1
    weights: torch.Tensor  # [R] float32


def starts_of(sample: HiddenStateSample) -> range:
    """Positions of a sample at which an engine would begin a draft whose first token is known."""
    first = max(sample.num_prompt_tokens - 1, 0)
    return range(first, first + sample.num_starts)


def whole(sample: HiddenStateSample, *, weights: torch.Tensor | None = None) -> Piece:
    """All starts of a sample; none if it is too short."""
    starts = starts_of(sample)
    return Piece(sample=sample, first=starts.start, end=starts.stop, weights=weights)


def cut(piece: Piece, max_starts: int) -> list[Piece]:
    """The same starts in pieces of nearly equal size, none above `max_starts`; [] if there are none."""
    num = -(-piece.num_starts // max_starts)
    edges = [piece.num_starts * index // max(num, 1) for index in range(num + 1)]
    parts = [piece.starts[begin:end] for begin, end in zip(edges[:-1], edges[1:], strict=True)]
    return [replace(piece, first=part[0], end=part[-1] + 1) for part in parts]


def stretches(
    samples: Sequence[HiddenStateSample], *, size: int, num_starts: int, seed: int, step: int = 1
) -> list[Piece]:  # fmt: skip
    """Pieces of at most `size` starts, every `step`-th of its sample, that have `num_starts` together, or all there
    are: of newer policies first, else drawn by `seed`, from anywhere in any of the samples alike."""
    pieces = [piece for sample in samples for piece in cut(replace(whole(sample), step=step), size)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    order.sort(key=lambda index: -pieces[index].sample.policy_version)
    found: list[Piece] = []
    for index in order:
        if num_starts <= 0:
            break
        found.append(pieces[index])
        num_starts -= pieces[index].num_starts
    return found


def pack(
    pieces: Sequence[Piece], *, num_depths: int, reads: str = LAST, device: torch.device | str = "cpu"
) -> DrafterBatch:  # fmt: skip
    """All pieces, whole, with targets for drafts of `num_depths` tokens. ValueError without a piece.

    `reads` is the head's: the samples' field that it is given.
    """
    if not pieces:
        raise ValueError("a pack needs a piece")
    bounds, rows, room = [], [], []
    starts = [torch.arange(piece.first, piece.end, piece.step) for piece in pieces]
    for piece, own in zip(pieces, starts, strict=True):
        begin = bounds[-1][1] if bounds else 0
        bounds.append((begin, begin + piece.end))
        last = min(piece.end + num_depths - 1, len(piece.sample.token_ids) - 2)  # end of its positions with a target
        rows.append(torch.arange(piece.first, last))
        room.append((last - own).clamp(max=num_depths))
    row_begins = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)[:-1].tolist()
    samples = [piece.sample for piece in pieces]
    ends = [piece.end for piece in pieces]
    fields = {
        "next_token_ids": [s.token_ids[1 : end + 1].long() for s, end in zip(samples, ends, strict=True)],
        "hidden_states": [getattr(s, reads)[:end].float() for s, end in zip(samples, ends, strict=True)],
        "position_ids": [torch.arange(end) for end in ends],
        "starts": [begin + own for own, (begin, _) in zip(starts, bounds, strict=True)],
        "start_rows": [begin + own - own[:1] for own, begin in zip(starts, row_begins, strict=True)],
        "room": room,
        "row_token_ids": [s.token_ids[row + 1].long() for s, row in zip(samples, rows, strict=True)],
        "row_position_ids": rows,
        "target_hidden_states": [
            s.last_hidden_states[row[0] + 1 : row[-1] + 2].float() for s, row in zip(samples, rows, strict=True)
        ],
        "weights": [
            torch.ones(len(row)) if piece.weights is None else piece.weights[row].float()
            for piece, row in zip(pieces, rows, strict=True)
        ],
    }
    return DrafterBatch(
        bounds=tuple(bounds), num_starts=tuple(piece.num_starts for piece in pieces),
        **{name: torch.cat(tensors).to(device) for name, tensors in fields.items()},
    )  # fmt: skip


def shuffled_steps(pieces: Sequence[Piece], *, starts_per_step: int, seed: int) -> Iterator[list[Piece]]:
    """One pass, shuffled by `seed`: pieces of one optimizer step after another, each of at least `starts_per_step`
    starts but for the last. Nothing is left out."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [part for one in pieces for part in cut(one, starts_per_step)]
    order = torch.randperm(len(pieces), generator=generator).tolist()
    held: list[Piece] = []
    size = 0
    for index in order:
        held.append(pieces[index])
        size += pieces[index].num_starts
        if size >= starts_per_step:
            yield held
            held, size = [], 0
    if held:
        yield held


def micro_batches(
    pieces: Sequence[Piece], max_starts: int, *, max_positions: float = float("inf")
) -> Iterator[list[Piece]]:  # fmt: skip
    """Pieces in their order, cut where they are larger, together at most `max_starts` starts; and, but for one piece
    alone, at most `max_positions` that give keys."""
    held: list[Piece] = []
    size = num_positions = 0
    for piece in (part for one in pieces for part in cut(one, max_starts)):
        if held and (size + piece.num_starts > max_starts or num_positions + piece.end > max_positions):
            yield held
            held, size, num_positions = [], 0, 0
        held.append(piece)
        size += piece.num_starts
        num_positions += piece.end
    if held:
        yield held
