"""Prompt lookup inside the engine: what followed the request's last tokens where they occurred before."""

from collections.abc import Sequence
from typing import Any

from tlt.drafter.prompt_lookup import prompt_lookup
from tlt.rollout.vllm.learned_drafter import DraftRequest
from tlt.rollout.vllm.ledger import Proposal

MIN_MATCH, MAX_MATCH = 2, 8
"""Tokens that must match, and the longest match looked for first."""


class LookupDrafter:
    """Drafts from the request's own prompt and response; has no state."""

    def __init__(self, runner: Any):
        self.runner = runner

    def draft(self, requests: Sequence[DraftRequest]) -> dict[str, Proposal]:
        return {
            request.request_id: Proposal(
                drafter="prompt_lookup",
                request_name=request.name,
                token_ids=prompt_lookup(
                    self.runner.input_batch.token_ids_cpu[request.row, : request.num_tokens],
                    min_match=MIN_MATCH, max_match=MAX_MATCH, max_tokens=request.num_draft_tokens,
                ).tolist(),
                temperature=request.temperature,
            )
            for request in requests
        }  # fmt: skip

    def forget(self, request_ids: Sequence[str]) -> None:
        """Nothing is kept."""
