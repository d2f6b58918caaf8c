"""Routers inside the engine: one strategy for all requests, or for each request what pays for itself."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tlt.drafter.router import Candidate, DraftRouter
from tlt.drafter.worth import trusted
from tlt.rollout.vllm.learned_drafter import AsAsked, DraftLimit, DraftRequest, LearnedDrafter
from tlt.rollout.vllm.ledger import Proposal
from tlt.rollout.vllm.suffix_drafter import SuffixDrafter
from tlt.spec.cost_model import NO_PRICES
from tlt.spec.strategy import ADAPTIVE
from tlt.types import SpecStrategy, prompt_id_of


class Router(Protocol):
    """Which drafter drafts how much for each request."""

    def plan(self, requests: Sequence[DraftRequest], strategy: SpecStrategy) -> Mapping[str, list[DraftRequest]]:
        """Requests of each drafter, asking for what they get; a function of their past and of shared prices."""

    def cut(self, proposals: Mapping[str, Proposal]) -> Mapping[str, Proposal]:
        """What of all drafts of an engine step is to be verified."""


class OneForAll:
    """Every request gets the engine step's strategy."""

    def plan(self, requests: Sequence[DraftRequest], strategy: SpecStrategy) -> dict[str, list[DraftRequest]]:
        count = strategy.num_draft_tokens
        return {strategy.method: [request.asking_for(min(count, request.num_draft_tokens)) for request in requests]}

    def cut(self, proposals: Mapping[str, Proposal]) -> Mapping[str, Proposal]:
        return proposals


class AdaptiveRouting:
    """Asks the router where the strategy is `adaptive`; the heads' drafts then end where it says (`WorthLimit`)."""

    def __init__(
        self, router: DraftRouter, suffix: SuffixDrafter, heads: Sequence[LearnedDrafter], *,
        agree: Callable[[Any], Any],
    ):  # fmt: skip
        self.router = router
        self.suffix = suffix
        self.heads = heads
        self.agree = agree
        self.ends_early = {head.name for head in heads if head.ends_early}
        # Where all passes are made before any draft ends, ranks need not agree on each token: proposals are agreed on.
        limit = WorthLimit(router, agree=agree if self.ends_early else as_found)
        self.limits: dict[bool, DraftLimit] = {True: limit, False: AsAsked()}
        self.prices = NO_PRICES
        self.is_adaptive = False

    def plan(self, requests: Sequence[DraftRequest], strategy: SpecStrategy) -> dict[str, list[DraftRequest]]:
        self.is_adaptive = strategy.method == ADAPTIVE
        for head in self.heads:
            head.limit = self.limits[self.is_adaptive]
        plan = OneForAll().plan(requests, strategy)
        return self._routed(plan[ADAPTIVE]) if self.is_adaptive else plan

    def _routed(self, requests: Sequence[DraftRequest]) -> dict[str, list[DraftRequest]]:
        found = self.suffix.look_up(requests)
        candidates = [
            Candidate(
                name=request.name, group=request.group, room=request.num_draft_tokens,
                is_random=request.temperature > 0, match_length=found[request.request_id].match_length,
                probs=found[request.request_id].probs,
            )
            for request in requests
        ]  # fmt: skip
        plan: dict[str, list[DraftRequest]] = {}
        # Ranks of a replica may have rounded differently, and a head's passes are collectives.
        routes = self.agree(self.router.plan(candidates, self.prices, num_running=len(candidates)))
        for request, route in zip(requests, routes, strict=True):
            if route is not None:
                # A head that waits for each of its tokens is told by `WorthLimit` when to end, which knows what was
                # drafted; the route, made before any token was, would end a draft of sure tokens too early.
                is_open = route.drafter in self.ends_early and not self.router.is_probe
                asking = request if is_open else request.asking_for(route.num_draft_tokens)
                plan.setdefault(route.drafter, []).append(asking)
        return plan

    def cut(self, proposals: Mapping[str, Proposal]) -> Mapping[str, Proposal]:
        """Rejection sampling is exact only if whether a draft is verified does not depend on what it turned out to be,
        so sampled drafts are left whole; where the policy's token depends on no draft, any may be dropped."""
        if not self.is_adaptive:
            return proposals
        own = list(proposals.values())
        standings = [
            self.router.standing(
                one.drafter, request=one.request_name, group=prompt_id_of(one.request_name), is_random=one.is_random,
                match_length=one.match_length, confidences=one.confidences,
            )
            for one in own
        ]  # fmt: skip
        counts = self.router.cut(standings, [one.is_sampled for one in own])
        return {name: one.first(count) for (name, one), count in zip(proposals.items(), counts, strict=True)}

    def verified(self, proposal: Proposal, num_accepted: int) -> None:
        """Learn from a verification, whatever chose the draft."""
        self.router.verified(
            proposal.drafter, request=proposal.request_name, group=prompt_id_of(proposal.request_name),
            is_random=proposal.is_random, match_length=proposal.match_length, confidences=proposal.confidences,
            num_stood=num_accepted,
        )  # fmt: skip


def as_found(value: Any) -> Any:
    """Each rank's own."""
    return value


class WorthLimit:
    """`DraftLimit` that ends a head's draft where one more token is not worth its price to the router."""

    def __init__(self, router: DraftRouter, *, agree: Callable[[Any], Any]):
        self.router = router
        self.agree = agree

    def begin(self, name: str, requests: Sequence[DraftRequest]) -> None:
        """A head begins to draft; nothing is known of its tokens yet."""
        self._name, self._depth = name, 0
        self._is_random = np.array([request.temperature > 0 for request in requests])
        self._factors = np.array([self.router.factor(name, request.name, request.group) for request in requests])
        self._standing = np.ones(len(requests))

    def goes_on(self, rows: np.ndarray, confidences: np.ndarray) -> np.ndarray:
        name, depth, is_random, factors = self._name, self._depth, self._is_random[rows], self._factors[rows]
        either = [self.router.stands(name, depth, one, confidences) for one in (False, True)]
        self._standing[rows] *= trusted(np.where(is_random, either[1], either[0]), factors)
        self._depth += 1
        goes_on = self.router.goes_on(name, self._depth, self._standing[rows], is_random, factors)
        return np.array(self.agree(goes_on.tolist()))  # ranks of a replica may round differently
