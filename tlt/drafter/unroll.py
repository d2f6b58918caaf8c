"""The head run on its own outputs, as it is when it drafts several tokens, for many starts of a pack at once.

A draft that begins at t reads the target's hidden state there; its second token reads the head's output in the place
of the hidden state at t + 1, and so on, and attends to the keys of verified positions up to t and to those of its own
earlier tokens. Without this in training acceptance falls from the second draft token on (training-time test: EAGLE-3,
arXiv 2503.01840; harmonised context: arXiv 2408.15766). Text is the sampled one: a deeper token is drafted only
where all before it are what was sampled, or it is of no use.

Depths after the first may be trained at a share of the starts: they cost as much each, and teach much the same.
Shapes: T positions that give keys, N starts, M of them at one depth, H hidden, h heads, g key-value heads, D size.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from tlt.drafter.batch import DrafterBatch
from tlt.drafter.model import EagleHead


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Outputs of the head at one depth."""

    output: torch.Tensor  # [M, H]
    starts: torch.Tensor  # [M] int64, ascending: which of the N starts
    rows: torch.Tensor  # [M] int64: which of the R positions with a target each output is to be compared with


def unroll(
    head: EagleHead, batch: DrafterBatch, embedding: torch.Tensor, *, num_depths: int, deep: torch.Tensor | None = None
) -> list[Depth]:
    """Depths 1, ..., `num_depths`, fewer where no start has room. `embedding` [V, H] is the target's.

    `deep` [N] bool: the starts that go on after the first depth; None means all.
    """
    attention = ChainAttention(batch)
    output = head(
        embed(embedding, batch.next_token_ids), head.fuse(batch.hidden_states), batch.position_ids, attention,
        rows=batch.starts,
    )  # fmt: skip
    starts = torch.arange(len(batch.starts), device=output.device)
    depths = [Depth(output=output, starts=starts, rows=batch.start_rows)]
    goes_on = torch.ones_like(starts, dtype=torch.bool) if deep is None else deep
    for depth in range(2, num_depths + 1):
        kept = (goes_on[starts] & (batch.room[starts] >= depth)).nonzero().squeeze(1)
        if len(kept) == 0:
            break
        starts = starts[kept]
        rows = batch.start_rows[starts] + depth - 1
        attention.go_deeper(starts, kept)
        output = head(
            embed(embedding, batch.row_token_ids[rows]), output[kept], batch.row_position_ids[rows], attention
        )
        depths.append(Depth(output=output, starts=starts, rows=rows))
    return depths


def embed(embedding: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """[T, H] float32 where the ids are, whatever dtype and device the target keeps its embedding in."""
    return embedding[token_ids.to(embedding.device)].to(token_ids.device).float()


class ChainAttention:
    """`Attend` of a head: at the first call over verified positions, at each further one a depth deeper."""

    def __init__(self, batch: DrafterBatch):
        self.batch = batch
        self.piece_of_start = torch.repeat_interleave(
            torch.arange(len(batch.bounds)), torch.tensor(batch.num_starts)
        )  # [N], on the CPU
        self.counts = batch.num_starts  # rows of each piece at this depth
        self.positions = batch.starts  # [M] index in T of each row's start
        self.verified: tuple[torch.Tensor, torch.Tensor] | None = None
        self.own: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Keys and values [M, g, D] of the drafts' own tokens so far, depth 2 first."""

    def go_deeper(self, starts: torch.Tensor, kept: torch.Tensor) -> None:
        """The next call is of these starts, which were rows `kept` of the last one."""
        found = torch.bincount(self.piece_of_start[starts.cpu()], minlength=len(self.counts))
        self.counts = tuple(found.tolist())
        self.positions = self.batch.starts[starts]
        self.own = [(key[kept], value[kept]) for key, value in self.own]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.verified is None:
            self.verified = (k, v)
        else:
            self.own.append((k, v))
        outputs, begin = [], 0
        for count, (first, end) in zip(self.counts, self.batch.bounds, strict=True):
            if count:
                outputs.append(self._piece(q[begin : begin + count], slice(begin, begin + count), first, end))
            begin += count
        return torch.cat(outputs)

    def _piece(self, q: torch.Tensor, rows: slice, first: int, end: int) -> torch.Tensor:
        """[m, h, D]: m rows of one piece, whose verified positions are first, ..., end - 1."""
        position = torch.arange(first, end, device=q.device)
        is_past = position <= self.positions[rows, None]  # [m, end - first]
        key, value = (x[first:end].transpose(0, 1) for x in self.verified)  # [g, t, D]
        if not self.own:
            return scaled_dot_product_attention(
                q.transpose(0, 1)[None], key[None], value[None], attn_mask=is_past, enable_gqa=True
            )[0].transpose(0, 1)
        size, num_heads, dim = q.shape
        groups = len(key)
        # Heads that share a key lie next to each other: [g, heads of a group x m, D].
        q = (q * dim**-0.5).transpose(0, 1).reshape(groups, -1, dim)
        scores = (q @ key.transpose(1, 2)).view(num_heads, size, -1).masked_fill(~is_past, float("-inf"))
        own = [tuple(x[rows].transpose(0, 1) for x in pair) for pair in self.own]  # [g, m, D] each
        q = q.view(groups, -1, size, dim)
        own_scores = [(q * k[:, None]).sum(-1).view(num_heads, size, 1) for k, _ in own]
        weights = torch.cat([scores, *own_scores], dim=2).softmax(2, dtype=torch.float32)
        verified = weights[..., : end - first].reshape(groups, -1, end - first)
        output = (verified @ value).view(groups, -1, size, dim)
        for index, (_, v) in enumerate(own):
            weight = weights[..., end - first + index].reshape(groups, -1, size, 1)
            output = output + weight * v[:, None]
        return output.reshape(num_heads, size, dim).transpose(0, 1)
