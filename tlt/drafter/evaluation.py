"""What an engine would accept of a head's drafts, from sampled texts alone, without an engine.

A draft's deeper tokens are of use only where all before them are the sampled text's, so drafts of all starts are made
at once along the text (tlt/drafter/unroll.py), and then the response is walked as an engine walks it: from a verified
position as many tokens on as stood, and one more. For one-hot and coupled drafts this is an engine's own count; only
of a response's last verification an engine may count drafts behind the end of the text, which are unknown here.

Shapes: N starts of a sample, K draft tokens, V_draft tokens that may be drafted.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from tlt.drafter.batch import pack, whole
from tlt.drafter.losses import readout, target_distribution
from tlt.drafter.model import EagleHead
from tlt.drafter.trainer import Target
from tlt.drafter.unroll import unroll
from tlt.spec.acceptance import AcceptanceStats
from tlt.spec.race import race
from tlt.spec.randomness import TOKEN
from tlt.types import HiddenStateSample


@dataclass(frozen=True, kw_only=True)
class SampledText:
    """A response as its engine drew it."""

    sample: HiddenStateSample
    seed: int | None = None
    """Of the request: coupled drafts race with the numbers that drew the text; None leaves them out."""


@dataclass(kw_only=True)
class HeldOutAcceptance:
    """Of drafts of K tokens on texts that the head was not trained on."""

    one_hot: AcceptanceStats = field(default_factory=AcceptanceStats)
    coupled: AcceptanceStats = field(default_factory=AcceptanceStats)
    num_starts: list[int] = field(default_factory=list)  # [K] with a target at this depth
    overlap_sum: list[float] = field(default_factory=list)  # [K]
    standing_sum: list[float] = field(default_factory=list)  # [K]
    num_texts: int = 0

    def add(self, other: "HeldOutAcceptance") -> None:
        """Other texts."""
        self.one_hot.add(other.one_hot)
        self.coupled.add(other.coupled)
        for name in ("num_starts", "overlap_sum", "standing_sum"):
            sums = [a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True)]
            setattr(self, name, sums)
        self.num_texts += other.num_texts

    def report(self) -> dict[str, dict]:
        """Acceptance length, and the share of drafts of which at least the first d tokens stand, of each kind."""
        walked = {
            name: {"length": stats.acceptance_length, "rates": [n / max(stats.num_drafts, 1) for n in stats.accepted]}
            for name, stats in (("one-hot", self.one_hot), ("coupled", self.coupled))
        }
        sampled = {"length": self.sampled_length, "rates": self.sampled_rates(), "overlap": self.overlap()}
        return {**walked, "sampled": sampled}

    def overlap(self) -> list[float]:
        """[K] 1 - TV(p, q) at each depth, all tokens before being the text's: E[min(1, q / p)] over the text.

        p is renormalised over the tokens that may be drafted, so this is a lower bound, tight as they cover all.
        """
        return [total / max(count, 1) for total, count in zip(self.overlap_sum, self.num_starts, strict=True)]

    def sampled_rates(self) -> list[float]:
        """[K] share of independently sampled drafts whose first d tokens stand, averaged over all starts.

        A chain stands with sum over x of prod min(p, q)(x_j), which is the text's mean of prod min(1, q / p)(x_j).
        """
        return [total / max(self.num_starts[0], 1) for total in self.standing_sum]

    @property
    def sampled_length(self) -> float:
        """Acceptance length of independently sampled drafts (a lower bound, as `overlap`)."""
        return 1 + sum(self.sampled_rates())


@torch.no_grad()
def evaluate(
    head: EagleHead, texts: Iterable[SampledText], *, target: Target, num_draft_tokens: int,
    max_response_tokens: int | None = None,
) -> HeldOutAcceptance:  # fmt: skip
    """Acceptance over whole texts. An engine drafts no further than `max_response_tokens`; None: the text's end."""
    found = HeldOutAcceptance(
        num_starts=[0] * num_draft_tokens, overlap_sum=[0.0] * num_draft_tokens, standing_sum=[0.0] * num_draft_tokens
    )
    for text in texts:
        piece = whole(text.sample)
        found.num_texts += 1
        if piece.num_starts == 0:
            continue
        drafts = _Drafts(head, text, target=target, num_draft_tokens=num_draft_tokens)
        for depth in range(num_draft_tokens):
            found.num_starts[depth] += drafts.num_starts[depth]
            found.overlap_sum[depth] += float(drafts.ratios[depth].sum())
            found.standing_sum[depth] += float(drafts.ratios[: depth + 1].prod(0).sum())
        num_tokens = len(text.sample.token_ids)
        cap = num_tokens if max_response_tokens is None else text.sample.num_prompt_tokens + max_response_tokens
        kinds = [(found.one_hot, drafts.one_hot)]
        if text.seed is not None:
            kinds.append((found.coupled, drafts.coupled))
        for stats, stands in kinds:
            walk(stats, stands, first=piece.first + 2, num_tokens=num_tokens, cap=cap)
    return found


def walk(stats: AcceptanceStats, stands: torch.Tensor, *, first: int, num_tokens: int, cap: int) -> None:
    """Count the verifications of one response as an engine makes them.

    `stands` [N, K]: the d-th token of the draft that begins with `first` + n known tokens is the text's. A request of
    n tokens is given at most `cap` - n - 1 drafts: one more token always follows.
    """
    num_standing = stands.long().cumprod(1).sum(1).tolist()
    known = first
    while known < num_tokens:
        num_drafted = min(stands.shape[1], cap - known - 1)
        # The text may end before the drafts do: nothing is known to stand behind its end.
        accepted = min(num_standing[known - first], num_drafted) if num_drafted > 0 else 0
        if num_drafted > 0:
            stats.count(num_drafted, accepted, 0.0)
        known += accepted + 1


class _Drafts:
    """Of all starts of one text: whether each token is the text's, and min(1, q / p) of the text's token."""

    def __init__(self, head: EagleHead, text: SampledText, *, target: Target, num_draft_tokens: int):
        weight, temperature = target.output_weight, target.temperature
        batch = pack([whole(text.sample)], num_depths=num_draft_tokens, reads=head.reads, device=weight.device)
        num_starts = len(batch.starts)
        self.one_hot, self.coupled = torch.zeros(2, num_starts, num_draft_tokens, dtype=torch.bool)
        self.ratios = torch.zeros(num_draft_tokens, num_starts)
        self.num_starts = [0] * num_draft_tokens
        target_probs = target_distribution(batch.target_hidden_states, weight, temperature=temperature).probs
        ids = torch.arange(len(weight)) if head.draft_token_ids is None else head.draft_token_ids
        ids, token_ids = ids.to(weight.device), text.sample.token_ids.long().to(weight.device)
        for index, depth in enumerate(unroll(head, batch, target.embedding, num_depths=num_draft_tokens)):
            probs = readout(depth.output, weight, temperature=temperature).softmax(1)
            position = batch.row_position_ids[depth.rows] + 2  # of the token that is drafted
            token, starts = token_ids[position], depth.starts.cpu()
            self.one_hot[starts, index] = (ids[probs.argmax(1)] == token).cpu()
            if text.seed is not None:
                drawn = race(probs, [text.seed] * len(position), position.tolist(), stream=TOKEN, token_ids=ids)
                self.coupled[starts, index] = (ids[drawn] == token).cpu()
            column = torch.searchsorted(ids, token).clamp(max=len(ids) - 1)
            q, p = (x.gather(1, column[:, None]).squeeze(1) for x in (probs, target_probs[depth.rows]))
            ratio = (q / p.clamp(min=1e-12)).clamp(max=1)
            self.ratios[index, starts] = torch.where(ids[column] == token, ratio, 0.0).cpu()
            self.num_starts[index] = len(depth.starts)
