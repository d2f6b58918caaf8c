"""Which optimizer steps are not taken: the policy must not move by numbers that are not numbers, nor by rollouts that
another policy seems to have written."""

from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel

from tlt.metrics import MetricSums

MISMATCH = "logprob_diff_mean"
"""Metric of an objective that knows what the engine gave its tokens."""


class StepRefusal:
    """Looks at each optimizer step between gradients and update; `max_in_a_row` refusals are borne."""

    def __init__(self, *, max_logprob_diff: float | None, max_in_a_row: int):
        self.max_logprob_diff = max_logprob_diff
        self.max_in_a_row = max_in_a_row
        self.num_in_a_row = 0

    def reason(
        self, ddp: DistributedDataParallel, metrics: MetricSums,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> str | None:  # fmt: skip
        """Why the step must not be taken, the same on all ranks; None where it may be. `metrics`: this rank's part.

        Raises RuntimeError where too many were refused in a row. Collective over all ranks; all must call.
        """
        reason = self._reason(ddp, metrics, sum_over_ranks)
        self.num_in_a_row = self.num_in_a_row + 1 if reason else 0
        if self.num_in_a_row > self.max_in_a_row:
            raise RuntimeError(
                f"{self.num_in_a_row} optimizer steps in a row could not be taken (--max-skipped-steps "
                f"{self.max_in_a_row}); the last one: {reason}. The policy is that of the last step that was taken"
            )
        return reason

    def _reason(
        self, ddp: DistributedDataParallel, metrics: MetricSums,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    ) -> str | None:  # fmt: skip
        buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
        is_finite = all(bool(torch.linalg.vector_norm(buffer.grad_data).isfinite()) for buffer in buffers)
        own = [float(not is_finite), metrics.sums.get(MISMATCH, 0.0), metrics.counts.get(MISMATCH, 0.0)]
        num_bad, difference, num_tokens = sum_over_ranks(torch.tensor(own, dtype=torch.float64)).tolist()
        if num_bad:
            return f"gradients are not finite on {num_bad:.0f} ranks"
        if self.max_logprob_diff is None or num_tokens == 0:
            return None
        mean = difference / num_tokens
        if mean <= self.max_logprob_diff:
            return None
        return (
            f"old and rollout logprobs differ by {mean:.3g} nats in the mean, more than --rl-max-logprob-diff "
            f"{self.max_logprob_diff}"
        )
