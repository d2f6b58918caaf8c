"""Entropy and largest probability of every sampled position, carried out of the engine as two more logprob columns.

The sampler has the processed log-probabilities of the whole vocabulary when it gathers those of the sampled tokens;
the columns follow their request through preemption, chunks and scheduling without any bookkeeping here.
"""

from typing import Any

import torch

ENTROPY, MAX_PROB = -1, -2
"""Token ids, which no token has, under which the two numbers are reported."""
NUM_COLUMNS = 2
"""`logprobs` of SamplingParams that makes room for them."""


def install(sampler: Any) -> None:
    """Replace the sampler's top-k columns, which nobody asks for, by entropy (nats) and largest probability."""
    from vllm.v1.outputs import LogprobsTensors

    gather = sampler.gather_logprobs

    def gather_with_statistics(logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor) -> LogprobsTensors:
        if num_logprobs != NUM_COLUMNS:
            return gather(logprobs, num_logprobs, token_ids)
        sampled = gather(logprobs, 0, token_ids)
        values = torch.stack(statistics(logprobs), dim=1)
        names = torch.tensor([ENTROPY, MAX_PROB], dtype=sampled.logprob_token_ids.dtype, device=values.device)
        return LogprobsTensors(
            torch.cat([sampled.logprob_token_ids, names.expand(len(values), -1)], dim=1),
            torch.cat([sampled.logprobs, values.to(sampled.logprobs.dtype)], dim=1),
            sampled.selected_token_ranks,
        )

    sampler.gather_logprobs = gather_with_statistics


def statistics(
    logprobs: torch.Tensor,  # [R, V]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(entropy in nats, largest probability) of each row of log-probabilities; removed tokens are minus infinity."""
    probs = logprobs.exp()
    terms = torch.where(probs > 0, probs * logprobs, 0.0)
    return -terms.sum(dim=1), probs.amax(dim=1)
