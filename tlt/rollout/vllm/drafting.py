"""Drafts of the next engine step, proposed at the end of this one: the seam between vLLM's V1 runner and our drafters.

Takes the place of the runner's `propose_draft_token_ids`. vLLM is told that a `custom_class` drafts (`Proposer`), so
its scheduler verifies whatever lists it is given, of any length per request, empty ones included. On the V2 runner the
same object would wrap `model_runner.speculator.propose`, whose arguments hold the same tensors, with every number of
draft tokens in the start-up schedule so that a full graph of each exists; that seam is not built.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from tlt.rollout.vllm.learned_drafter import DraftRequest
from tlt.rollout.vllm.ledger import DraftLedger, Proposal, agreed_proposal
from tlt.rollout.vllm.routing import OneForAll, Router
from tlt.types import AUX, LAST, OFF

SEED, NAME = "seed", "name"
"""Keys of a request's seed and name in `SamplingParams.extra_args`."""

Agree = Callable[[Any], Any]
"""Makes a value of a replica's first rank (a strategy, or drafts) that of all its ranks."""


class Proposer:
    """What vLLM believes to be the drafter; `Drafting` takes its calls away."""

    def __init__(self, vllm_config: Any):
        self.vllm_config = vllm_config

    def load_model(self, target: Any) -> None:
        """Nothing: drafters are installed by the engine."""

    def propose(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Refuses: a draft that does not come through `Drafting` would not be in the ledger."""
        raise RuntimeError("the engine's drafting was not installed")


def speculative_config(max_draft_tokens: int) -> dict | None:
    """vLLM's setting for drafts of ours; None leaves vLLM without any code of speculation."""
    if max_draft_tokens == 0:
        return None
    return {
        "method": "custom_class",
        "model": f"{Proposer.__module__}.{Proposer.__qualname__}",
        "num_speculative_tokens": max_draft_tokens,
    }


def request_name(runner: Any, request_id: str) -> str:
    """The name under which a request was given to the engine; requests of others have vLLM's id."""
    return (runner.requests[request_id].sampling_params.extra_args or {}).get(NAME, request_id)


class EngineDrafter(Protocol):
    """Drafts for some rows of the batch; anything it does is a function of their past."""

    def draft(self, requests: Sequence[DraftRequest]) -> Mapping[str, Proposal]:
        """Proposals by request id; a request may get fewer tokens than it asks for, or none."""

    def forget(self, request_ids: Sequence[str]) -> None:
        """These requests ended or lost their blocks."""


class NoHiddenStates:
    """Stands for a token pool where no one needs hidden states."""

    def write(self, slots: torch.Tensor, computed: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Nothing."""


class Drafting:
    """Proposes after each engine step what `strategy` says; installed over a runner whose spec method is custom."""

    def __init__(
        self, runner: Any, scheduler: Any, *, drafters: dict[str, EngineDrafter], ledger: DraftLedger, pool: Any,
        agree: Agree, max_draft_tokens: int,
    ):  # fmt: skip
        self.runner = runner
        self.drafters = drafters
        self.ledger = ledger
        self.pool = pool
        self.agree = agree
        self.router: Router = OneForAll()
        self.strategy = OFF
        self.num_tokens = 0
        """Verified in the last engine step, one of each request included; 0 where it also read prompts."""
        self.num_rows = 0
        """Requests in it."""
        self.draft_s = 0.0
        """Spent on drafts in the last engine step."""
        runner.propose_draft_token_ids = self.propose
        # Requests near the context's end get fewer drafts below; vLLM would invent some for the whole batch instead.
        runner.effective_drafter_max_model_len = runner.max_model_len + max_draft_tokens + 1
        # A drafter writes keys ahead of the tokens that are scheduled: their slots must be allocated.
        scheduler.num_lookahead_tokens = max_draft_tokens
        # Otherwise vLLM pads requests that enter with a single token to draft, with drafts that no one proposed.
        scheduler.dynamic_sd_lookup = [max_draft_tokens] * (runner.max_num_reqs + 1)

    def propose(
        self, scheduler_output: Any, sampled_token_ids: list[list[int]], sampling_metadata: Any,
        hidden_states: torch.Tensor, sample_hidden_states: torch.Tensor, aux_hidden_states: Any,
        spec_decode_metadata: Any, common_attn_metadata: Any, slot_mappings: Any,
    ) -> list[list[int]]:  # fmt: skip
        """[B] lists of draft tokens; the runner's own method has these arguments."""
        num_tokens = scheduler_output.total_num_scheduled_tokens
        self.pool.write(
            common_attn_metadata.slot_mapping[:num_tokens], {LAST: [hidden_states], AUX: aux_hidden_states}
        )  # fmt: skip
        gone = [*scheduler_output.finished_req_ids, *scheduler_output.scheduled_cached_reqs.resumed_req_ids]
        for drafter in self.drafters.values():
            drafter.forget(gone)
        request_ids = self.runner.input_batch.req_ids
        self.ledger.forget([*gone, *request_ids])
        num_decoded = len(request_ids) + sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
        self.num_tokens = num_decoded if num_decoded == num_tokens else 0
        self.num_rows = len(request_ids)
        self.draft_s = 0.0
        if self.strategy.num_draft_tokens == 0:
            return [[] for _ in request_ids]
        begin_s = time.perf_counter()
        proposals = self._proposals(self._requests(sampled_token_ids))
        self.draft_s = time.perf_counter() - begin_s
        proposals = self._agreed(request_ids, proposals)
        self.ledger.proposals |= proposals
        return [proposals[name].token_ids if name in proposals else [] for name in request_ids]

    def _agreed(self, request_ids: Sequence[str], proposals: dict[str, Proposal]) -> dict[str, Proposal]:
        """Those of the replica's first rank. Others may have rounded differently; were they to learn from what they
        drafted themselves, a later plan of theirs might have another head draft, and its collectives would part."""
        own = [proposals[each].shared() if each in proposals else None for each in request_ids]
        agreed = self.agree(own)
        if agreed is own:  # this rank is the first, or alone
            return proposals
        return {
            request_id: agreed_proposal(
                shared, proposals.get(request_id), request_name=request_name(self.runner, request_id)
            )
            for request_id, shared in zip(request_ids, agreed, strict=True)
            if shared is not None
        }

    def _requests(self, sampled_token_ids: list[list[int]]) -> list[DraftRequest]:
        """Rows that sampled a token and can use a draft: not in prefill, not at their last token."""
        batch, max_model_len = self.runner.input_batch, self.runner.max_model_len
        found = []
        for row, (request_id, sampled) in enumerate(zip(batch.req_ids, sampled_token_ids, strict=True)):
            if not sampled:
                continue
            state = self.runner.requests[request_id]
            num_tokens = int(batch.num_tokens_no_spec[row])
            room = min(state.sampling_params.max_tokens - len(state.output_token_ids), max_model_len - num_tokens) - 1
            if room > 0:
                found.append(
                    DraftRequest(
                        row=row, request_id=request_id, name=request_name(self.runner, request_id),
                        num_tokens=num_tokens, num_draft_tokens=room, temperature=float(batch.temperature_cpu[row]),
                        seed=(state.sampling_params.extra_args or {}).get(SEED, 0),
                    )
                )  # fmt: skip
        return found

    def _proposals(self, requests: Sequence[DraftRequest]) -> dict[str, Proposal]:
        """Of all drafters, by request id; an empty draft is none."""
        begin_s = time.perf_counter()
        plan = self.router.plan(requests, self.strategy)
        self.ledger.plan_s += time.perf_counter() - begin_s
        proposals: dict[str, Proposal] = {}
        for name, own in plan.items():
            begin_s = time.perf_counter()
            proposals |= self.drafters[name].draft(own)
            self.ledger.stats[name].draft_s += time.perf_counter() - begin_s
        begin_s = time.perf_counter()
        proposals = dict(self.router.cut(proposals))
        self.ledger.plan_s += time.perf_counter() - begin_s
        return {name: proposal for name, proposal in proposals.items() if proposal.token_ids}
