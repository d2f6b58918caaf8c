"""Responses of one rollout as requests of vLLM's engine: begun, gone on with, taken out half done, finished."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tlt.rollout.vllm import sampling as sampler
from tlt.rollout.vllm.drafting import NAME, SEED
from tlt.rollout.vllm.ledger import DraftLedger
from tlt.spec.randomness import request_seed
from tlt.types import Prompt, Rollout, RolloutGroup, SamplingConfig, rollout_name


class Requests:
    """Of one rank's engine, an LLMEngine; the same on all ranks of its replica. Names are those of `rollout_name`."""

    def __init__(
        self, engine: Any, scheduler: Any, ledger: DraftLedger, *, stop_token_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str], replica: int,
    ):  # fmt: skip
        self.engine = engine
        self.scheduler = scheduler
        self.ledger = ledger
        self.stop_token_ids = list(stop_token_ids)
        self.decode = decode
        self.replica = replica
        self.held: dict[str, Rollout | None] = {}
        """Responses that end here, by name: what other replicas made of them before."""

    def begin(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, group_size: int, seed: int, policy_version: int
    ) -> None:
        """A rollout of these prompts begins, on whatever replicas. Raises RuntimeError where two have one id."""
        self.sampling, self.seed, self.policy_version = sampling, seed, policy_version
        self.named = {
            rollout_name(prompt.prompt_id, sample): (prompt, sample)
            for prompt in prompts
            for sample in range(group_size)
        }
        if len(self.named) < len(prompts) * group_size:
            raise RuntimeError("two prompts of one rollout have the same id")
        self.held = {}

    def add(self, name: str, begun: Rollout | None = None) -> None:
        """Begin a response here, or go on after the tokens that another replica sampled."""
        prompt, _ = self.named[name]
        tokens = () if begun is None else begun.token_ids
        self.held[name] = begun
        self.engine.add_request(
            name, {"prompt_token_ids": [*prompt.token_ids, *tokens]}, self._params(name, len(tokens))
        )

    def _params(self, name: str, num_tokens: int):
        """Of a response that has so many tokens already."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        config, (prompt, sample) = self.sampling, self.named[name]
        return SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p if config.temperature > 0 else 1.0,
            top_k=config.top_k if config.temperature > 0 else 0,
            max_tokens=config.max_response_tokens - num_tokens,
            ignore_eos=config.ignore_eos,
            stop_token_ids=None if config.ignore_eos else self.stop_token_ids,
            logprobs=sampler.NUM_COLUMNS,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={SEED: request_seed(self.seed, prompt.prompt_id, sample), NAME: name},
        )

    def lengths(self) -> dict[str, int]:
        """Response tokens of each unfinished rollout, by name."""
        return {
            name: self._num_begun(name) + request.num_output_tokens for name, request in self._unfinished().items()
        }

    def num_known_tokens(self, name: str) -> int:
        """Prompt and response tokens of an unfinished rollout."""
        return self._unfinished()[name].num_tokens

    def are_decoding(self) -> bool:
        """Whether nothing waits, and all that run lack but the last token: the next engine step only decodes."""
        running = self.scheduler.running
        return not self.scheduler.waiting and all(each.num_computed_tokens >= each.num_tokens - 1 for each in running)

    def _unfinished(self) -> dict[str, Any]:
        """vLLM's requests by name."""
        requests = self.scheduler.requests.values()
        return {request.sampling_params.extra_args[NAME]: request for request in requests if not request.is_finished()}

    def _num_begun(self, name: str) -> int:
        begun = self.held[name]
        return 0 if begun is None else len(begun.token_ids)

    def parts(self, names: Sequence[str]) -> dict[str, Rollout]:
        """What there is of unfinished rollouts, what other replicas made of them before included; no text."""
        states = {state.external_req_id: state for state in self.engine.output_processor.request_states.values()}
        return {
            name: self._joined(
                name, states[name].detokenizer.output_token_ids, states[name].logprobs_processor.logprobs
            )
            for name in names
        }

    def drop(self, names: Sequence[str]) -> None:
        """Take unfinished rollouts out of the engine: others go on with them."""
        self.engine.abort_request(list(names))
        for name in names:
            del self.held[name]
            self.ledger.requests.pop(name, None)  # it may come back, with these counts

    def abort(self) -> None:
        """Take all out."""
        self.engine.abort_request(list(self.held))

    def finished(self, output: Any, *, drafter_version: int) -> Rollout:
        """The whole rollout of one of vLLM's final outputs."""
        completion = output.outputs[0]
        rollout = self._joined(output.request_id, completion.token_ids, completion.logprobs)
        is_stopped = completion.finish_reason == "stop"
        return replace(
            rollout, text=self.decode(rollout.token_ids[:-1] if is_stopped else rollout.token_ids),
            finish_reason=completion.finish_reason, drafter_version=drafter_version,
        )  # fmt: skip

    def groups(self, finished: Mapping[str, Rollout]) -> list[RolloutGroup]:
        """All that ended here, by prompt and in the order of prompts; `finished` has them by name."""
        found: dict[str, tuple[Prompt, list[Rollout]]] = {}
        for name, (prompt, _) in self.named.items():
            if name in self.held:
                found.setdefault(prompt.prompt_id, (prompt, []))[1].append(finished[name])
        return [RolloutGroup(prompt=prompt, rollouts=tuple(rollouts)) for prompt, rollouts in found.values()]

    def _joined(self, name: str, token_ids: Sequence[int], rows: Sequence[Any]) -> Rollout:
        """What others made of a response, and after it what this engine did: tokens and vLLM's logprobs of each."""
        begun = self.held[name] or Rollout(
            token_ids=(), logprobs=(), text="", finish_reason="", policy_version=self.policy_version
        )
        drafts = self.ledger.requests[name]
        return replace(
            begun,
            token_ids=(*begun.token_ids, *token_ids),
            logprobs=(*begun.logprobs, *(row[token].logprob for row, token in zip(rows, token_ids, strict=True))),
            entropies=(*begun.entropies, *(row[sampler.ENTROPY].logprob for row in rows)),
            max_probs=(*begun.max_probs, *(row[sampler.MAX_PROB].logprob for row in rows)),
            sample_index=self.named[name][1],
            replica=self.replica,
            num_drafts=begun.num_drafts + drafts.num_drafts,
            num_draft_tokens=begun.num_draft_tokens + drafts.num_draft_tokens,
            num_accepted_tokens=begun.num_accepted_tokens + drafts.num_accepted_tokens,
        )
