"""Who drafted what for the next verification, and what became of it.

Shapes: B requests of an engine step, D draft tokens, K draft tokens of one request, V_draft tokens that a drafter may
draft, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from tlt.spec.acceptance import AcceptanceStats
from tlt.spec.draft_kind import standing_rates
from tlt.spec.verification import REJECTED

COMPARED_ROWS = 16
"""Of the vocabulary, in float64 and sorted, whose kinds of drafts are compared at once: memory bounds it."""


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The drafts of one request."""

    drafter: str
    request_name: str
    token_ids: list[int]  # [K]
    confidences: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [K] the drafter's own
    match_length: int = 0
    """Tokens before the draft that a suffix drafter matched."""
    temperature: float = 1.0
    """Of the request."""
    is_sampled: bool = False
    """Drawn from `draft_probs` independently of the policy's draw, to be verified by rejection sampling."""
    draft_probs: torch.Tensor | None = None  # [K, V_draft] where sampled, and now and then to compare kinds of drafts
    draft_token_ids: torch.Tensor | None = None  # [V_draft] names of its columns; None: the whole vocabulary

    @property
    def is_random(self) -> bool:
        """Its request is not greedy."""
        return self.temperature > 0

    def shared(self) -> tuple:
        """What ranks of a replica have to hold alike: what is verified, and all that routers learn from it."""
        return self.drafter, self.token_ids, self.confidences.tolist(), self.match_length, self.temperature

    def first(self, count: int) -> "Proposal":
        """Its first tokens alone."""
        if count == len(self.token_ids):
            return self
        probs = None if self.draft_probs is None else self.draft_probs[:count]
        return replace(
            self, token_ids=self.token_ids[:count], confidences=self.confidences[:count], draft_probs=probs
        )  # fmt: skip


def agreed_proposal(shared: tuple, own: Proposal | None, *, request_name: str) -> Proposal:
    """A request's drafts as the replica's first rank `shared` them; this rank's `own` probabilities only as far as its
    tokens are the same, all that both have."""
    drafter, token_ids, confidences, match_length, temperature = shared
    count = len(token_ids)
    if own is not None and own.drafter == drafter and own.token_ids[:count] == token_ids[: len(own.token_ids)]:
        like = own.first(min(count, len(own.token_ids)))
    else:
        like = Proposal(drafter=drafter, request_name=request_name, token_ids=token_ids)
    return replace(
        like, token_ids=token_ids, confidences=np.array(confidences), match_length=match_length,
        temperature=temperature,
    )  # fmt: skip


@dataclass
class DraftCount:
    """Verified drafts of one request."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0

    def count(self, num_drafted: int, num_accepted: int) -> None:
        """One verification."""
        self.num_drafts += 1
        self.num_draft_tokens += num_drafted
        self.num_accepted_tokens += num_accepted


class DraftLedger:
    """Proposals of the last engine step and the statistics of all verified ones since `begin`."""

    def __init__(self) -> None:
        self.on_verified: Callable[[Proposal, int], None] = lambda proposal, num_accepted: None
        self.on_compared: Callable[[Proposal, dict[str, float], int], None] = lambda proposal, rates, count: None
        self.begin()

    def begin(self) -> None:
        """Start counting anew."""
        self.proposals: dict[str, Proposal] = {}
        self.stats: dict[str, AcceptanceStats] = defaultdict(AcceptanceStats)
        self.requests: dict[str, DraftCount] = defaultdict(DraftCount)  # by name, which vLLM's ids are not
        self.step = AcceptanceStats()  # verified since `take_step`, of all drafters
        self.plan_s = 0.0  # spent on deciding who drafts

    def take_step(self) -> AcceptanceStats:
        """What was verified since this was last asked."""
        step, self.step = self.step, AcceptanceStats()
        return step

    def forget(self, request_ids: Iterable[str]) -> None:
        """Their proposals were verified or dropped. Those of requests that vLLM held back a step stay."""
        for request_id in request_ids:
            self.proposals.pop(request_id, None)

    def draft_probs(
        self, request_ids: Sequence[str], counts: Sequence[int], vocab_size: int
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(which of the step's D drafts were sampled [D'], the q of each [D', V]); None where none was."""
        index, rows, first = [], [], 0
        for request_id, count in zip(request_ids, counts, strict=True):
            if count and (proposal := self.proposals[request_id]).is_sampled:
                index.extend(range(first, first + count))
                rows.append(spread(proposal, vocab_size)[:count])
            first += count
        return (torch.tensor(index), torch.cat(rows)) if index else None

    def verified(
        self, request_ids: Sequence[str], counts: Sequence[int], tokens: torch.Tensor, probs: torch.Tensor
    ) -> None:
        """Count a verification: tokens [B, max drafts + 1], probs [sum of counts + 1, V] of the policy."""
        if not any(counts):
            return
        standing = ((tokens != REJECTED).sum(1) - 1).tolist()
        best = probs.amax(1).tolist()  # of all rows at once: each copy from a device waits for it
        first_row = 0
        compared: dict[str, list[tuple[Proposal, torch.Tensor]]] = defaultdict(list)  # by drafter
        for request_id, count, accepted in zip(request_ids, counts, standing, strict=True):
            if count:
                rows = slice(first_row, first_row + min(accepted + 1, count))
                proposal = self.proposals[request_id]
                self._count(proposal, count, accepted, best[rows])
                if proposal.draft_probs is not None:
                    compared[proposal.drafter].append((proposal, probs[rows]))
            first_row += count + 1
        for own in compared.values():
            self._compare(own)

    def _count(self, proposal: Proposal, count: int, accepted: int, best: Sequence[float]) -> None:
        max_probs = sum(best)
        self.stats[proposal.drafter].count(count, accepted, max_probs)
        self.step.count(count, accepted, max_probs)
        self.requests[proposal.request_name].count(count, accepted)
        self.on_verified(proposal, accepted)

    def _compare(self, decided: Sequence[tuple[Proposal, torch.Tensor]]) -> None:
        """Of one drafter's proposals, each with the policy's [N, V] where its tokens were decided: what each kind of
        draft would have been accepted with, of all at once, since each copy from a device waits for it."""
        ids = decided[0][0].draft_token_ids
        decided = [(one, rows[: len(one.draft_probs)]) for one, rows in decided]  # of another rank's draft, a part
        policy = torch.cat([rows for _, rows in decided])
        drafts = torch.cat([one.draft_probs[: len(rows)] for one, rows in decided])
        rates = [
            standing_rates(rows if ids is None else rows[:, ids], own)
            for rows, own in zip(policy.split(COMPARED_ROWS), drafts.split(COMPARED_ROWS), strict=True)
        ]
        found = torch.cat([torch.stack(list(each.values())) for each in rates], dim=1).cpu()
        for (proposal, _), own in zip(decided, found.split([len(rows) for _, rows in decided], dim=1), strict=True):
            sums = dict(zip(rates[0], own.sum(1).tolist(), strict=True))
            self.stats[proposal.drafter].compare(sums, own.shape[1])
            self.on_compared(proposal, sums, own.shape[1])


def spread(proposal: Proposal, vocab_size: int) -> torch.Tensor:
    """[K, V]: q over the whole vocabulary."""
    if proposal.draft_token_ids is None:
        return proposal.draft_probs
    full = proposal.draft_probs.new_zeros(len(proposal.draft_probs), vocab_size)
    return full.index_copy_(1, proposal.draft_token_ids, proposal.draft_probs)
