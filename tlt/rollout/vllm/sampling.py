"""The engine's sampler: tokens are drawn with numbers of (seed, position), drafts are verified on the way.

Takes the place of vLLM's sampler and rejection sampler in the V1 runner. Plain and speculative steps go through the
same code, so that a response is the same token for token whatever was drafted (see tlt/spec/verification.py); no
generator exists, so none has to be rewound when vLLM discards a token (which a CPU generator cannot). Entropy and
largest probability of each token come along as two more logprob columns.
"""

from typing import Any

import numpy as np
import torch

from tlt.rollout.vllm.drafting import SEED
from tlt.rollout.vllm.ledger import DraftLedger
from tlt.spec.race import race
from tlt.spec.randomness import ACCEPT, RESIDUAL, TOKEN, uniforms
from tlt.spec.verification import REJECTED, SampledDrafts, draft_rows, reject, verify

ENTROPY, MAX_PROB = -1, -2
"""Token ids, which no token has, under which a token's entropy (nats) and largest probability are reported."""
LEAST_LOGIT = -1e4
"""Below the best one, where float32 has no probability left by far."""
NUM_COLUMNS = 2
"""`logprobs` of SamplingParams that makes room for them."""


class PositionSampler:
    """Samples and verifies one engine step of a V1 runner; the ledger knows who drafted what."""

    def __init__(self, runner: Any, ledger: DraftLedger):
        self.runner = runner
        self.ledger = ledger
        vocabulary = runner.model_config.get_vocab_size()
        runner._sample = self.sample
        self.names = torch.tensor([ENTROPY, MAX_PROB], dtype=torch.int32, device=runner.device)
        # Compiled now, for rows of this width: it would fall into the first engine step.
        race(torch.full((1, vocabulary), 1 / vocabulary, device=runner.device), [0], [0], stream=TOKEN)

    def sample(self, logits: torch.Tensor, spec_decode_metadata: Any) -> Any:
        """Tokens [B, drafts + 1] (REJECTED behind the last) and their logprobs, as the runner's own `_sample`."""
        from vllm.v1.outputs import SamplerOutput

        batch = self.runner.input_batch
        num_requests = batch.num_reqs
        counts = [0] * num_requests if spec_decode_metadata is None else list(spec_decode_metadata.num_draft_tokens)
        rows = np.repeat(np.arange(num_requests), np.asarray(counts) + 1)  # request of each row
        scaled = self._scaled(logits, rows)
        probs = scaled.softmax(-1)
        seeds, positions = self._seeds_and_positions(counts, rows)
        drawn = self.draw(logits, probs, rows, seeds, positions)
        drafts = logits.new_empty(0, dtype=torch.int64)
        if spec_decode_metadata is not None:
            drafts = spec_decode_metadata.draft_token_ids.long()
        tokens = verify(drawn, drafts, counts, self._sampled_drafts(probs, drafts, counts, seeds, positions))
        self.ledger.verified(batch.req_ids, counts, tokens, probs)
        return SamplerOutput(
            sampled_token_ids=tokens.to(torch.int32),
            logprobs_tensors=self._logprobs_tensors(tokens, scaled, probs, counts),
        )

    def draw(
        self, logits: torch.Tensor, probs: torch.Tensor, rows: np.ndarray, seeds: np.ndarray, positions: np.ndarray
    ) -> torch.Tensor:
        """[T] the policy's token of each row, whatever was drafted there; `rows` [T] are the batch's."""
        drawn = race(probs, seeds, positions, stream=TOKEN)
        is_greedy = self.runner.input_batch.temperature_cpu[rows] <= 0
        if is_greedy.any():
            drawn = torch.where(torch.from_numpy(is_greedy).to(logits.device), logits.argmax(1), drawn)
        return drawn

    def _scaled(self, logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        """[T, V] float32 logits of the distribution that is sampled from; of a greedy row, the untouched ones."""
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        batch = self.runner.input_batch
        logits = logits.float()
        temperature = batch.temperature_cpu[rows]
        scale = np.where(temperature <= 0, 1, temperature).astype(np.float32)
        if (scale != 1).any():
            logits = logits / torch.from_numpy(scale).to(logits.device)[:, None]
        top_k, top_p = batch.top_k_cpu[rows], batch.top_p_cpu[rows]
        k = torch.from_numpy(top_k).to(logits.device) if (top_k < logits.shape[1]).any() else None
        p = torch.from_numpy(top_p).to(logits.device) if (top_p < 1).any() else None
        if k is not None or p is not None:
            logits = apply_top_k_top_p(logits.clone(), k, p)
        return logits

    def _seeds_and_positions(self, counts: list[int], rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seed of each row's request, and the position in its sequence of the token that the row decides."""
        batch = self.runner.input_batch
        requests = self.runner.requests
        seeds = [(requests[name].sampling_params.extra_args or {}).get(SEED, 0) for name in batch.req_ids]
        first = np.cumsum(np.asarray(counts) + 1) - np.asarray(counts) - 1
        step = np.arange(len(rows)) - first[rows]
        return np.asarray(seeds, dtype=np.uint64)[rows], batch.num_tokens_no_spec[rows] + step

    def _sampled_drafts(
        self, probs: torch.Tensor, drafts: torch.Tensor, counts: list[int], seeds: np.ndarray, positions: np.ndarray
    ) -> SampledDrafts | None:
        """Rejection sampling at drafts that were drawn from a q; None where all are one-hot."""
        found = self.ledger.draft_probs(self.runner.input_batch.req_ids, counts, probs.shape[1])
        if found is None:
            return None
        index, draft_probs = found
        rows = torch.tensor(draft_rows(counts))[index].numpy()
        accept, residual = (
            uniforms(seeds[rows], positions[rows], stream=stream).to(probs.device) for stream in (ACCEPT, RESIDUAL)
        )
        stands, replacement = reject(
            probs[torch.from_numpy(rows)], draft_probs, drafts[index], accept=accept, residual=residual
        )
        return SampledDrafts(index=index, stands=stands, replacement=replacement)

    def _logprobs_tensors(
        self, tokens: torch.Tensor, scaled: torch.Tensor, probs: torch.Tensor, counts: list[int]
    ) -> Any:
        """Logprob, entropy and largest probability at each of `tokens`, rejected ones included, which vLLM drops."""
        from vllm.v1.outputs import LogprobsTensors

        if self.runner.input_batch.sampling_metadata.max_num_logprobs is None:
            return None
        log_norm, entropy, max_prob = statistics(scaled, probs)
        lengths = torch.tensor(counts, device=tokens.device) + 1
        step = torch.minimum(torch.arange(tokens.shape[1], device=tokens.device), lengths[:, None] - 1)
        row = ((torch.cumsum(lengths, 0) - lengths)[:, None] + step).flatten()
        flat = tokens.flatten().masked_fill(tokens.flatten() == REJECTED, 0)
        return LogprobsTensors(
            torch.cat([flat[:, None].int(), self.names.expand(len(flat), -1)], dim=1),
            torch.stack([scaled[row, flat] - log_norm[row], entropy[row], max_prob[row]], dim=1),
            torch.zeros(len(flat), dtype=torch.int64, device=tokens.device),
        )


def statistics(logits: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log of the sum of exponentials, entropy in nats, largest probability), [T] each, of rows [T, V]; `probs` are
    the logits' softmax, so no exponential is computed twice. Removed tokens have a logit of minus infinity."""
    best, max_prob = logits.amax(1), probs.amax(1)
    below = logits - best[:, None]  # sums of small terms lose no digits
    terms = below.clamp_(min=LEAST_LOGIT).mul_(probs)  # minus infinity times nothing would be NaN
    return best - max_prob.log(), -max_prob.log() - terms.sum(1), max_prob
