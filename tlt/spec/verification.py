"""Verification of drafts: which of them stand, and which token follows. Lossless, whatever the drafts are.

Shapes: B requests; request b has n_b drafts and n_b + 1 rows of the policy's probabilities; T = sum(n_b + 1) rows, D =
sum(n_b) drafts, V vocabulary.

One-hot drafts: every row's token is drawn from the policy, with a number that belongs to its position, and drafts
stand as long as they are what was drawn. A draft d stands with probability p(d), as in rejection sampling of a one-hot
draft, and the response is token for token the one that plain sampling draws.

Sampled drafts, drawn from q: rejection sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): d stands with
probability min(1, p(d) / q(d)), otherwise a token of max(p - q, 0), normalised, takes its place. Mean 1 - TV(p, q).
The response has the policy's distribution, but is another draw than plain sampling's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

REJECTED = -1
"""Fills rows of tokens behind the last one."""


@dataclass(frozen=True, kw_only=True)
class SampledDrafts:
    """Outcome of rejection sampling at those drafts that were drawn from a q."""

    index: torch.Tensor  # [D'] which of the D drafts
    stands: torch.Tensor  # [D'] bool
    replacement: torch.Tensor  # [D'] the token that follows where the draft does not stand


def verify(
    drawn: torch.Tensor,  # [T] tokens drawn from the policy, a request's rows one after another
    draft_token_ids: torch.Tensor,  # [D]
    num_draft_tokens: Sequence[int],  # [B]
    sampled: SampledDrafts | None = None,
) -> torch.Tensor:
    """[B, max(n_b) + 1] tokens: the drafts that stand, the token that follows, then REJECTED."""
    counts = torch.tensor(num_draft_tokens, device=drawn.device)
    width = max(num_draft_tokens) + 1
    if width == 1:
        return drawn[:, None]
    step = torch.arange(width, device=drawn.device)
    is_draft = step < counts[:, None]  # [B, width]
    # Row and draft of request b at each step; steps behind its last row repeat it and are cut off below.
    row = (torch.cumsum(counts + 1, 0) - counts - 1)[:, None] + torch.minimum(step, counts[:, None])
    draft = ((torch.cumsum(counts, 0) - counts)[:, None] + step).clamp(max=len(draft_token_ids) - 1)
    tokens = drawn[row]
    stands = (draft_token_ids[draft] == tokens) & is_draft
    if sampled is not None:
        of_draft = draft_token_ids.clone()
        of_draft[sampled.index] = torch.where(sampled.stands, draft_token_ids[sampled.index], sampled.replacement)
        is_sampled, has_stood = torch.zeros(2, len(draft_token_ids), dtype=torch.bool, device=drawn.device)
        is_sampled[sampled.index], has_stood[sampled.index] = True, sampled.stands
        here = is_sampled[draft] & is_draft
        tokens = torch.where(here, of_draft[draft], tokens)
        stands = torch.where(here, has_stood[draft], stands)
    num_standing = stands.long().cumprod(1).sum(1, keepdim=True)
    return tokens.masked_fill(step > num_standing, REJECTED)


def draft_rows(num_draft_tokens: Sequence[int]) -> list[int]:
    """[D] row whose probabilities decide on each draft."""
    rows, row = [], 0
    for count in num_draft_tokens:
        rows.extend(range(row, row + count))
        row += count + 1
    return rows


def reject(
    probs: torch.Tensor,  # [D', V] p at each sampled draft
    draft_probs: torch.Tensor,  # [D', V] q
    drafts: torch.Tensor,  # [D']
    *,
    accept: torch.Tensor,  # [D'] uniform numbers
    residual: torch.Tensor,  # [D'] uniform numbers
) -> tuple[torch.Tensor, torch.Tensor]:
    """([D'] whether each draft stands, [D'] the token that replaces it if not)."""
    p = probs.gather(1, drafts[:, None]).squeeze(1).double()
    q = draft_probs.gather(1, drafts[:, None]).squeeze(1).double()
    weights = (probs - draft_probs).clamp_(min=0)
    # p = q up to rounding leaves no residual; then nothing is rejected but by rounding, and p itself is as right.
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, probs)
    return accept * q < p, inverse_cdf(weights, residual)


def inverse_cdf(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """[T] index drawn from each row of unnormalised weights [T, V] with the number of its row; never one of weight 0.

    Sums are in float64: a token of probability 1e-9 keeps its share of a vocabulary of 10^5.
    """
    cdf = weights.cumsum(1, dtype=torch.float64)
    # First index whose cumulative weight exceeds the target; rounding up to the total must not run over the end.
    index = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())  # first index that reaches the total: of positive weight
    return torch.minimum(index, last).squeeze(1)
