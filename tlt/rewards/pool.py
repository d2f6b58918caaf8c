"""RewardFn over processes: responses are scored while others decode, each within a time limit."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from tlt.config import RewardConfig
from tlt.rewards.processes import scorer_context
from tlt.rewards.scoring import score
from tlt.rewards.worker import OUT_OF_MEMORY, enter, guarded
from tlt.types import Prompt, Rollout, RolloutGroup

logger = logging.getLogger(__name__)

SCORINGS_PER_PROCESS = 10_000
"""Then it is replaced: what leaks does not grow for ever."""


class RewardPool:
    """A response whose scoring hangs, crashes or raises gets reward 0, a warning and a count; the run goes on."""

    def __init__(self, config: RewardConfig, *, scorer: Callable[[dict, str], float] = score):
        self.config = config
        self.scorer = scorer
        self.pool = ProcessPool(
            max_workers=config.workers, max_tasks=SCORINGS_PER_PROCESS, initializer=enter,
            initargs=[config.memory_mib], context=scorer_context(),
        )  # fmt: skip
        self.pending: dict[tuple[str, int], tuple[ProcessFuture, tuple[dict, str]]] = {}
        self._stats: dict[str, float] = {}

    def submit(self, prompt: Prompt, sample_index: int, rollout: Rollout) -> None:
        """Start scoring; returns at once."""
        response = (prompt.answer, rollout.text)
        self.pending[prompt.prompt_id, sample_index] = (self._schedule(response), response)

    def _schedule(self, response: tuple[dict, str]) -> ProcessFuture:
        return self.pool.schedule(guarded, args=[self.scorer, *response], timeout=self.config.timeout_s)

    def collect(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The groups with their rewards; waits for what was submitted.

        Raises RuntimeError for a rollout that was never submitted.
        """
        begin_s = time.perf_counter()
        self._stats = {"reward/timeouts": 0.0, "reward/errors": 0.0, "reward/out_of_memory": 0.0}
        scored = [
            replace(
                group,
                rewards=tuple(self._reward(group.prompt.prompt_id, each.sample_index) for each in group.rollouts),
            )
            for group in groups
        ]
        self._stats["reward/wait_s"] = time.perf_counter() - begin_s
        return scored

    def _reward(self, prompt_id: str, sample_index: int) -> float:
        if (prompt_id, sample_index) not in self.pending:
            raise RuntimeError(f"response {sample_index} of {prompt_id} was never submitted for scoring")
        future, response = self.pending.pop((prompt_id, sample_index))
        error = future.exception()
        if isinstance(error, ProcessExpired) and error.exitcode == OUT_OF_MEMORY:
            self._stats["reward/out_of_memory"] += 1
            logger.warning(
                "scoring response %d of %s: the process reached --reward-memory-mib %d; scoring it in a new one",
                sample_index, prompt_id, self.config.memory_mib,
            )  # fmt: skip
            future = self._schedule(response)  # others may have left the process full
            error = future.exception()
        if error is None:
            return future.result()
        is_timeout = isinstance(error, FutureTimeout)
        self._stats["reward/timeouts" if is_timeout else "reward/errors"] += 1
        reason = f"took more than {self.config.timeout_s} s" if is_timeout else repr(error)
        if isinstance(error, ProcessExpired):
            reason = f"the scoring process died ({error.exitcode})"
        logger.warning("scoring response %d of %s: %s; reward 0", sample_index, prompt_id, reason)
        return 0.0

    def abandon(self) -> None:
        """Forget what was submitted since the last `collect`."""
        for future, _ in self.pending.values():
            future.cancel()
        self.pending.clear()

    def stats(self) -> dict[str, float]:
        """Metrics of the last `collect`."""
        return self._stats

    def close(self) -> None:
        """End the scoring processes."""
        self.pool.stop()
        self.pool.join()
