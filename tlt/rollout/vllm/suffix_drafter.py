"""Suffix drafts inside the engine: one tree per prompt, fed with what its requests have written and wrote before."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tlt.drafter.history import SuffixHistory
from tlt.drafter.router import SUFFIX
from tlt.rollout.vllm.learned_drafter import DraftRequest
from tlt.rollout.vllm.ledger import Proposal
from tlt.types import Prompt, prompt_id_of

if TYPE_CHECKING:
    from tlt.drafter.suffix_tree import Draft, SuffixTree

MIN_PROB, TOKENS_PER_MATCH = 0.1, 4.0
"""A draft ends where it would stand with a smaller probability, and after so many tokens for each matched one."""
PROMPT = "prompt"


class SuffixDrafter:
    """Trees of one rollout. Texts are appended when drafts are asked for, so steps without drafts cost nothing."""

    def __init__(self, runner: Any, history: SuffixHistory):
        self.runner = runner
        self.history = history
        self._prompts: dict[str, Prompt] = {}
        self._trees: dict[str, SuffixTree] = {}
        self._num_known: dict[str, int] = {}  # tokens of each request's text that are in its tree
        self._looked_up: dict[str, Draft] = {}
        self._finished: dict[str, dict[str, Sequence[int]]] = {}  # texts of groups that have no tree yet

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """A rollout of these prompts begins: earlier texts live on in the history alone."""
        self._prompts = {prompt.prompt_id: prompt for prompt in prompts}
        for held in (self._trees, self._num_known, self._looked_up, self._finished):
            held.clear()

    def look_up(self, requests: Sequence[DraftRequest]) -> "dict[str, Draft]":
        """A draft of each request by id, all texts of the batch known to all; `draft` proposes from these."""
        for request in requests:
            self._catch_up(request.name, self.runner.input_batch.token_ids_cpu[request.row, : request.num_tokens])
        self._looked_up = {
            request.request_id: self._tree(request.group).draft(
                request.name, request.num_draft_tokens, tokens_per_match=TOKENS_PER_MATCH, min_prob=MIN_PROB
            )
            for request in requests
        }
        return self._looked_up

    def draft(self, requests: Sequence[DraftRequest]) -> dict[str, Proposal]:
        """What was looked up, as many tokens as each request asks for."""
        if any(request.request_id not in self._looked_up for request in requests):
            self.look_up(requests)
        proposals = {}
        for request in requests:
            found, count = self._looked_up.pop(request.request_id), request.num_draft_tokens
            proposals[request.request_id] = Proposal(
                drafter=SUFFIX,
                request_name=request.name,
                token_ids=found.token_ids[:count].tolist(),
                confidences=found.probs[:count],
                match_length=found.match_length,
                temperature=request.temperature,
            )
        return proposals

    def finished(self, name: str, token_ids: Sequence[int]) -> None:
        """A request ended: its whole text stays for its siblings, should they ever ask."""
        if prompt_id_of(name) not in self._trees:
            self._finished.setdefault(prompt_id_of(name), {})[name] = token_ids
            return
        self._catch_up(name, np.asarray(token_ids))
        self._trees[prompt_id_of(name)].end(name)

    def forget(self, request_ids: Sequence[str]) -> None:
        """Nothing: a text stays true when its blocks are lost."""

    def _tree(self, group: str) -> "SuffixTree":
        """The group's, begun with its prompt and the prompt's past responses when it is first needed."""
        if group not in self._trees:
            tree = self._trees[group] = new_tree()
            prompt = self._prompts[group]
            tree.begin(PROMPT, prompt.token_ids)
            for index, response in enumerate(self.history.responses(prompt.problem_key)):
                tree.begin(index, response.token_ids, after=PROMPT)
                tree.end(index)
            for name, token_ids in self._finished.pop(group, {}).items():
                self.finished(name, token_ids)
        return self._trees[group]

    def _catch_up(self, name: str, token_ids: np.ndarray) -> None:
        tree, known = self._tree(prompt_id_of(name)), self._num_known.get(name)
        if known is None:
            tree.begin(name, after=PROMPT)
            known = len(self._prompts[prompt_id_of(name)].token_ids)
        tree.append(name, token_ids[known:])
        self._num_known[name] = len(token_ids)


def new_tree() -> "SuffixTree":
    """Numba is imported here, after vLLM's engine: vLLM 0.32 looks into all loaded modules for kernels to replace
    while it is built, and fails at an attribute of llvmlite's."""
    from tlt.drafter.suffix_tree import SuffixTree

    return SuffixTree()


def compile_kernels() -> None:
    """Once, while an engine is built: it takes seconds, which would fall into the first engine step."""
    tree = new_tree()
    tree.begin("a", [1, 2, 1, 2])
    tree.draft("a", 2)
