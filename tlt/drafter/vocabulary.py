"""Which tokens a drafter may draft: a small vocabulary makes its LM head, in training and in drafting, cheap."""

import torch


def draft_vocabulary(token_counts: torch.Tensor, size: int) -> tuple[torch.Tensor, float]:
    """([size] int64, ascending: the most frequent tokens; share of all counted tokens that they cover).

    Counts are of sampled tokens, so the share estimates the target's mean probability of a token that may be drafted,
    which bounds acceptance. Ties go to lower ids, so what was never seen is filled up with the lowest: byte-pair
    vocabularies are in the order of their merges, the frequent ones first.
    """
    size = min(size, len(token_counts))
    order = torch.argsort(token_counts, descending=True, stable=True)[:size]
    total = int(token_counts.sum())
    return order.sort().values, float(token_counts[order].sum()) / total if total else 1.0
