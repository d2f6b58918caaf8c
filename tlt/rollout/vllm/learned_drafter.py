"""Runs an EAGLE head inside the engine: its KV cache lags behind while speculation is off and catches up in one pass.

Shapes: B requests, T tokens, H hidden, V_draft tokens that may be drafted. A request of n tokens has hidden states at
n - 1 of them; the last token was just sampled.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from tlt.drafter.model import EagleHead
from tlt.rollout.vllm.head_passes import CpuPasses, TorchPasses
from tlt.rollout.vllm.ledger import Proposal
from tlt.rollout.vllm.paged_attention import CpuPagedAttention, FlashPagedAttention
from tlt.rollout.vllm.target_weights import output_name
from tlt.rollout.vllm.token_pool import TokenPool
from tlt.spec.draft_kind import COUPLED, ONE_HOT, SAMPLED, KindChoice
from tlt.spec.race import confidence, race_with_leads
from tlt.spec.randomness import DRAFT, TOKEN
from tlt.types import prompt_id_of

COMPARE_INTERVAL, NUM_COMPARED = 16, 4
"""Drafts between two of which probabilities are kept to compare the kinds of drafts, and of how many requests: each
keeps rows of the vocabulary until it is verified."""


@dataclass(frozen=True, kw_only=True)
class DraftRequest:
    """One row of the engine's batch that may get drafts."""

    row: int
    request_id: str
    """vLLM's: it appends a random suffix, another one on each rank."""
    name: str
    """As given to the engine; the same on all ranks."""
    num_tokens: int
    """Prompt and response, the token just sampled included."""
    num_draft_tokens: int
    """At most so many are of use."""
    temperature: float
    seed: int

    @property
    def group(self) -> str:
        """Id of its prompt."""
        return prompt_id_of(self.name)

    def asking_for(self, num_draft_tokens: int) -> "DraftRequest":
        """The same request with fewer drafts."""
        return replace(self, num_draft_tokens=num_draft_tokens)


class DraftLimit(Protocol):
    """Ends drafts before they are as long as was asked for; alike on all ranks of a replica."""

    def begin(self, name: str, requests: Sequence[DraftRequest]) -> None:
        """A drafter begins to draft for these."""

    def goes_on(self, rows: np.ndarray, confidences: np.ndarray) -> np.ndarray:
        """[B] whether each of the requests at [B] `rows` gets a token more, one having been drafted with [B]
        confidences."""


class AsAsked:
    """No limit but what was asked for."""

    def begin(self, name: str, requests: Sequence[DraftRequest]) -> None:
        """Nothing to remember."""

    def goes_on(self, rows: np.ndarray, confidences: np.ndarray) -> np.ndarray:
        return np.ones(len(rows), dtype=bool)


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """One more token of each of B requests."""

    tokens: torch.Tensor  # [B] int64, CPU
    probs: torch.Tensor  # [B, V_draft]
    confidences: np.ndarray  # [B] probability of each token, or of a coupled one `race.confidence`
    seconds: float
    """Of the pass."""


class Chain(Protocol):
    """Drafts of some requests, a token of each at a time."""

    def step(self, rows: np.ndarray) -> Drafted:
        """The next token of the requests at [B] `rows`, rising: all at first, then those that go on."""


class PassByPass:
    """Waits for each token before the next pass: a pass is worth saving on a CPU, where it costs what it computes."""

    def __init__(self, drafter: "LearnedDrafter", requests: Sequence[DraftRequest], kinds: Sequence[str]):
        self.drafter = drafter
        self.requests = requests
        self.kinds = kinds
        self.block_table = drafter.pool.block_table(torch.tensor([request.row for request in requests]))
        self.num_tokens = torch.tensor([request.num_tokens for request in requests], dtype=torch.int32)
        self._rows = np.arange(len(requests))
        self._num_steps = 0

    def step(self, rows: np.ndarray) -> Drafted:
        begin_s = time.perf_counter()
        if len(rows) < len(self._rows):
            self._keep(torch.from_numpy(np.flatnonzero(np.isin(self._rows, rows))))
            self._rows = rows
        if self._num_steps == 0:
            hidden = self.drafter._catch_up(self.requests, self.block_table)
        else:
            position = self.num_tokens + (self._num_steps - 2)
            hidden = self.drafter._one_more(self._tokens, self._hidden, position, self.block_table)
        tokens, probs, confidences = self.drafter._choose(hidden, self.requests, self.kinds, self._num_steps)
        self._tokens, self._hidden = tokens, hidden
        self._num_steps += 1
        return Drafted(
            tokens=tokens, probs=probs, confidences=confidences, seconds=time.perf_counter() - begin_s
        )  # fmt: skip

    def _keep(self, kept: torch.Tensor) -> None:
        """Go on with these of the present rows alone."""
        self.requests, self.kinds = ([own[row] for row in kept.tolist()] for own in (self.requests, self.kinds))
        self.block_table, self.num_tokens = self.block_table[kept], self.num_tokens[kept]
        self._tokens, self._hidden = self._tokens[kept], self._hidden[kept.to(self._hidden.device)]


class LearnedDrafter:
    """Drafts with one head."""

    def __init__(self, head: EagleHead, runner: Any, pool: TokenPool, *, name: str, kinds: KindChoice):
        self.head = head.to(runner.device)
        self.runner = runner
        self.pool = pool
        self.name = name
        self.kinds = kinds
        self.version = 0
        self.limit: DraftLimit = AsAsked()
        self.on_pass: Callable[[int, float], None] = lambda num_rows, seconds: None
        self._previous: dict[str, torch.Tensor] = {}
        self._num_cached: dict[str, int] = {}
        self._num_passes = 0
        on_cpu = runner.device.type == "cpu"
        passes, attention = (CpuPasses, CpuPagedAttention) if on_cpu else (TorchPasses, FlashPagedAttention)
        cache = attention(
            head.shape, num_blocks=pool.num_blocks, block_size=pool.block_size, dtype=runner.model_config.dtype,
            device=runner.device,
        )  # fmt: skip
        self.passes = passes(self.head, cache, runner.get_model().compute_logits)
        self.ends_early = on_cpu
        """Whether a draft that is ended saves passes; a GPU's graphs have made all that were asked for."""
        self.chain: Callable[[Sequence[DraftRequest], Sequence[str]], Chain] = partial(PassByPass, self)
        if not on_cpu:
            from tlt.rollout.vllm.draft_graphs import DraftGraphs
            from tlt.spec.race_triton import triton_race  # Triton's kernels need a GPU

            self.chain = DraftGraphs(self, race=triton_race).begin

    def load(self, tensors: Mapping[str, torch.Tensor], *, version: int) -> None:
        """Take new weights in place, between two engine steps; the old ones are kept for `roll_back`.

        Raises ValueError where names or shapes differ; nothing is changed then.
        """
        own = dict(self.head.named_parameters())
        if set(own) != set(tensors) or any(own[name].shape != tensor.shape for name, tensor in tensors.items()):
            raise ValueError(f"the drafter has the weights {shapes(own)}, got {shapes(tensors)}")
        self._previous = {name: parameter.detach().clone() for name, parameter in own.items()}
        self._copy(tensors)
        self.version = version

    def roll_back(self) -> None:
        """Take back what `load` replaced; the version grows, since what drafts now is neither."""
        self._copy(self._previous)
        self.version += 1

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.head.named_parameters():
            parameter.copy_(tensors[name])
        self.passes.weights_changed()
        self._num_cached.clear()  # keys and values are of the old weights

    def renew_output(self, name: str, tensor: torch.Tensor) -> None:
        """Take over a weight of the target (Hugging Face name) if it is what drafts are read out with."""
        ids = self.head.draft_token_ids
        if ids is None or name != output_name(self.runner.get_model()):
            return
        weight = tensor[ids.to(tensor.device)].to(device=self.runner.device, dtype=self.runner.model_config.dtype)
        self.passes.output_changed(weight)

    @property
    def output_weight(self) -> torch.Tensor | None:
        """[V_draft, H] rows of the target's LM head that drafts are read out with; None: the layer itself."""
        return self.passes.output_weight

    def forget(self, request_ids: Iterable[str]) -> None:
        """These requests ended or lost their blocks."""
        for request_id in request_ids:
            self._num_cached.pop(request_id, None)

    @torch.inference_mode()
    def draft(self, requests: Sequence[DraftRequest]) -> dict[str, Proposal]:
        """Drafts of each request, as many as it asks for."""
        if not requests:
            return {}
        self._num_passes += 1
        compared = self._compared(len(requests))
        # What is greedy has but one best token.
        kinds = [self.kinds.choose(each.temperature) if each.temperature > 0 else ONE_HOT for each in requests]
        is_kept = [
            each.temperature > 0 and (row in compared or kind == SAMPLED)
            for row, (each, kind) in enumerate(zip(requests, kinds, strict=True))
        ]
        self.limit.begin(self.name, requests)
        chain = self.chain(requests, kinds)
        asked = np.array([request.num_draft_tokens for request in requests])
        rows = np.arange(len(requests))  # that go on
        tokens: list[list[int]] = [[] for _ in requests]
        probs: list[list[torch.Tensor]] = [[] for _ in requests]
        confidences: list[list[float]] = [[] for _ in requests]
        step = 0
        while len(rows):
            drafted = chain.step(rows)
            for index, (row, token) in enumerate(zip(rows, drafted.tokens.tolist(), strict=True)):
                tokens[row].append(token)
                confidences[row].append(drafted.confidences[index])
                if is_kept[row]:
                    probs[row].append(drafted.probs[index])
            self.on_pass(len(rows), drafted.seconds)
            step += 1
            rows = rows[self.limit.goes_on(rows, drafted.confidences) & (asked[rows] > step)]
        return {
            request.request_id: Proposal(
                drafter=self.name,
                request_name=request.name,
                token_ids=tokens[row],
                confidences=np.array(confidences[row]),
                temperature=request.temperature,
                is_sampled=kinds[row] == SAMPLED,
                draft_probs=torch.stack(probs[row]) if is_kept[row] else None,
                draft_token_ids=self.head.draft_token_ids,
            )
            for row, request in enumerate(requests)
        }

    def _compared(self, num_requests: int) -> set[int]:
        """Of the present draft; requests take turns."""
        turn, since_last = divmod(self._num_passes, COMPARE_INTERVAL)
        if since_last:
            return set()
        return {(turn * NUM_COMPARED + index) % num_requests for index in range(NUM_COMPARED)}

    def num_cached(self, request: DraftRequest) -> int:
        """Of its positions the first so many have keys and values in this head's cache."""
        return self._num_cached.get(request.request_id, 0)

    def caught_up(self, requests: Sequence[DraftRequest]) -> None:
        """All positions that have a hidden state have keys and values now."""
        self._num_cached.update((request.request_id, request.num_tokens - 1) for request in requests)

    def catch_up(self, requests: Sequence[DraftRequest]) -> None:
        """Compute the keys and values that these requests lack, of any number of positions."""
        self._catch_up(requests, self.pool.block_table(torch.tensor([request.row for request in requests])))

    def _catch_up(self, requests: Sequence[DraftRequest], block_table: torch.Tensor) -> torch.Tensor:
        """[B, H] of the head at each request's last position with a hidden state; its cache is complete after."""
        begins = [self.num_cached(request) for request in requests]
        ends = [request.num_tokens - 1 for request in requests]
        position = torch.cat([torch.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
        counts = torch.tensor([end - begin for begin, end in zip(begins, ends, strict=True)], dtype=torch.int32)
        index = torch.repeat_interleave(torch.arange(len(requests)), counts)
        rows = torch.tensor([request.row for request in requests])[index]
        next_tokens = torch.from_numpy(self.runner.input_batch.token_ids_cpu[rows.numpy(), position.numpy() + 1])
        slots = self.pool.slots(block_table, index, position)
        hidden = self.passes.fuse(self.pool.at(self.head.reads, slots))
        output = self.forward(
            next_tokens.long(), hidden, position, slots, block_table, torch.tensor(ends, dtype=torch.int32),
            rows=counts.cumsum(0) - 1,
        )  # fmt: skip
        self.caught_up(requests)
        return output

    def _one_more(
        self, tokens: torch.Tensor, hidden: torch.Tensor, position: torch.Tensor, block_table: torch.Tensor
    ) -> torch.Tensor:
        """[B, H] one position further, on the head's own output; these keys are overwritten once verified."""
        index = torch.arange(len(tokens))
        slots = self.pool.slots(block_table, index, position.long())
        return self.forward(tokens, hidden, position.long(), slots, block_table, position + 1)

    def forward(self, tokens, hidden, position, slots, block_table, seq_lens, rows=None) -> torch.Tensor:
        """[B, H] at each request's last token, one of `rows` [B] where it has several; the others leave their keys."""
        device = self.runner.device
        embeddings = self.runner.get_model().model.embed_tokens(tokens.to(device)).to(hidden.dtype)
        return self.passes.forward(
            embeddings, hidden, position.to(device), slots.to(device), block_table.to(device), seq_lens, rows
        )

    def _choose(
        self, hidden: torch.Tensor, requests: Sequence[DraftRequest], kinds: Sequence[str], step: int
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """(token [B] int64 on the CPU, probabilities [B, V_draft], confidences [B]) that follow the head's output."""
        probs = self.passes.probs(
            hidden, [request.temperature if request.temperature > 0 else 1.0 for request in requests]
        )
        ids = self.head.draft_token_ids
        columns = probs.argmax(1)
        leads = {}
        for kind, stream in ((COUPLED, TOKEN), (SAMPLED, DRAFT)):
            rows = [row for row, own in enumerate(kinds) if own == kind]
            if rows:
                columns[rows], leads[kind] = race_with_leads(
                    probs[rows], [requests[row].seed for row in rows],
                    [requests[row].num_tokens + step for row in rows], stream=stream, token_ids=ids,
                )  # fmt: skip
        confidences = probs.gather(1, columns[:, None]).squeeze(1).double().cpu().numpy()
        if np.isnan(confidences).any():
            raise RuntimeError(f"drafter {self.name}: no token has a probability: NaN?")
        if COUPLED in leads:
            coupled = [kind == COUPLED for kind in kinds]
            confidences[coupled] = confidence(leads[COUPLED], confidences[coupled])
        return (columns if ids is None else ids[columns]).cpu(), probs, confidences


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
