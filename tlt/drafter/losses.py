"""Losses of a drafter against its target. Shapes: N positions, H hidden, V_draft tokens that may be drafted.

The target's distribution is taken at the temperature that is sampled and over the tokens that may be drafted,
renormalised. With the mass m of these tokens under the target, no draft distribution q has sum(min(p, q)) above m, and
p / m reaches it; so nothing is lost by it, and the mass that is out of reach is the vocabulary's coverage
(`draft_vocabulary`), not the head's loss.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import smooth_l1_loss


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Of the terms, the same at every depth."""

    cross_entropy: float = 1.0
    """Soft cross-entropy on the target's distribution (EAGLE, arXiv 2401.15077; TLT, arXiv 2511.16665)."""
    total_variation: float = 0.0
    """1/2 sum |p - q|: what rejection sampling of sampled drafts loses, and bounds what coupled drafts do."""
    hidden: float = 0.1
    """Smooth L1 on the hidden state that the output stands for, mean over H (EAGLE and TLT: 1.0 beside 0.1 of the
    cross-entropy)."""


@dataclass(frozen=True, kw_only=True)
class TargetDistribution:
    """What the target would draw from, at some positions."""

    probs: torch.Tensor  # [N, V_draft]
    entropy: torch.Tensor  # [N] nats

    def __getitem__(self, rows: torch.Tensor) -> "TargetDistribution":
        return TargetDistribution(probs=self.probs[rows], entropy=self.entropy[rows])


def readout(hidden: torch.Tensor, output_weight: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """Logits [N, V_draft], float32 from here on, also where the product was one of bfloat16 (autocast)."""
    return (hidden @ output_weight.T).float() / temperature


@torch.no_grad()
def target_distribution(
    hidden: torch.Tensor, output_weight: torch.Tensor, *, temperature: float
) -> TargetDistribution:  # fmt: skip
    """From the target's hidden states [N, H] and the rows of its LM head [V_draft, H]."""
    logprobs = readout(hidden, output_weight, temperature=temperature).log_softmax(1)
    probs = logprobs.exp()
    # Where a probability is 0 its logarithm may be -inf: the product is 0 by continuity.
    return TargetDistribution(probs=probs, entropy=-(probs * logprobs.clamp(min=-1e4)).sum(1))


def drafter_loss(
    output: torch.Tensor,  # [N, H] of the head
    target_hidden: torch.Tensor,  # [N, H] what it stands for
    target: TargetDistribution,
    output_weight: torch.Tensor,  # [V_draft, H], frozen
    *,
    temperature: float,
    weights: LossWeights,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(loss [N], its parts [N] without gradient: `kl`, which is the cross-entropy less its least value, and those of
    `hidden` and `total_variation` that count)."""
    logits = readout(output, output_weight, temperature=temperature)
    kl = logits.logsumexp(1) - (target.probs * logits).sum(1) - target.entropy
    loss = weights.cross_entropy * kl
    parts = {"kl": kl.detach()}
    if weights.total_variation:
        distance = 0.5 * (target.probs - logits.softmax(1)).abs().sum(1)
        loss = loss + weights.total_variation * distance
        parts["total_variation"] = distance.detach()
    if weights.hidden:
        difference = smooth_l1_loss(output, target_hidden, reduction="none").mean(1)
        loss = loss + weights.hidden * difference
        parts["hidden"] = difference.detach()
    return loss, parts
