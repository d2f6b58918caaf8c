"""RewardFn over processes: responses are scored while others decode, each within a time limit."""

import logging
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from tlt.config import RewardConfig
from tlt.rewards.scoring import score
from tlt.types import Prompt, Rollout, RolloutGroup

logger = logging.getLogger(__name__)


def ignore_stop_signal() -> None:
    """A cluster signals all processes of a job, and its ranks finish what they are at before they stop: an evaluation
    needs its scores."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class RewardPool:
    """A response whose scoring hangs, crashes or raises gets reward 0, a warning and a count; the run goes on."""

    def __init__(self, config: RewardConfig, *, scorer: Callable[[dict, str], float] = score):
        self.config = config
        self.scorer = scorer
        # spawn: a forked child would inherit the engine's threads and locks.
        self.pool = ProcessPool(
            max_workers=config.workers, context=multiprocessing.get_context("spawn"), initializer=ignore_stop_signal
        )
        self.pending: dict[tuple[str, int], ProcessFuture] = {}
        self._stats: dict[str, float] = {}

    def submit(self, prompt: Prompt, sample_index: int, rollout: Rollout) -> None:
        """Start scoring; returns at once."""
        future = self.pool.schedule(self.scorer, args=[prompt.answer, rollout.text], timeout=self.config.timeout_s)
        self.pending[prompt.prompt_id, sample_index] = future

    def collect(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The groups with their rewards; waits for what was submitted.

        Raises RuntimeError for a rollout that was never submitted.
        """
        begin_s = time.perf_counter()
        self._stats = {"reward/timeouts": 0.0, "reward/errors": 0.0}
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
        future = self.pending.pop((prompt_id, sample_index), None)
        if future is None:
            raise RuntimeError(f"response {sample_index} of {prompt_id} was never submitted for scoring")
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
        for future in self.pending.values():
            future.cancel()
        self.pending.clear()

    def stats(self) -> dict[str, float]:
        """Metrics of the last `collect`."""
        return self._stats

    def close(self) -> None:
        """End the scoring processes."""
        self.pool.stop()
        self.pool.join()
