"""fine_tune(): the supervised iteration, over the policy trainer of RL."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlt.heartbeat import Heartbeat
from tlt.interrupt import Interrupt, Interrupted
from tlt.metrics import MetricsLog
from tlt.parallel import Parallel
from tlt.policy.trainer import MegatronPolicyTrainer
from tlt.progress import Progress
from tlt.run_state import Checkpoints, RunState
from tlt.sft.examples import ExampleStream
from tlt.trace import Trace
from tlt.types import TrainBatch, TrainSequence


@dataclass(kw_only=True)
class HeldOut:
    """Examples that are not trained on; none of them means that nothing is measured."""

    sequences: Sequence[TrainSequence]
    interval: int
    train_iters: int

    def metrics_if_due(self, trainer: MegatronPolicyTrainer, iteration: int) -> dict[str, float]:
        """Collective over all ranks; all must call."""
        on_interval = self.interval > 0 and iteration % self.interval == 0
        if not self.sequences or not (on_interval or iteration in (0, self.train_iters)):
            return {}
        return {f"sft/held_out_{name}": value for name, value in trainer.evaluate(self.sequences).items()}


@dataclass(kw_only=True)
class SftRun:
    """Everything that `fine_tune` needs, made by tools/train_sft.py."""

    train_iters: int
    parallel: Parallel
    examples: ExampleStream
    held_out: HeldOut
    policy_trainer: MegatronPolicyTrainer
    checkpoints: Checkpoints
    metrics: MetricsLog
    trace: Trace
    interrupt: Interrupt
    heartbeat: Heartbeat
    progress: Progress
    state: RunState
    hf_directory: Path


def fine_tune(run: SftRun) -> bool:
    """One iteration = one optimizer step; whether it came to the end.

    When a signal arrives the last complete iteration is saved and the function returns. Collective over all ranks.
    """
    try:
        if run.state.iteration == 0:
            metrics = run.held_out.metrics_if_due(run.policy_trainer, 0)
            run.metrics.log(0, metrics, train_iters=run.train_iters)
        for iteration in run.progress.iterations(run.state.iteration + 1, run.train_iters):
            with run.trace.span("iteration", iteration=iteration):
                sequences = run.examples.next_step()
                num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
                begin_s = time.perf_counter()
                batch = TrainBatch(optimizer_steps=(sequences,), policy_version=iteration - 1)
                metrics = run.policy_trainer.train_step(batch)
                metrics["sft/step_s"] = time.perf_counter() - begin_s
                metrics["sft/tokens"] = float(num_tokens)
                metrics["sft/response_tokens"] = float(sum(sequence.num_response_tokens for sequence in sequences))
                metrics["sft/tokens_per_s"] = num_tokens / metrics["sft/step_s"]
                metrics |= run.held_out.metrics_if_due(run.policy_trainer, iteration)
                run.metrics.log(iteration, metrics, train_iters=run.train_iters)
                run.state = run.state.after(iteration, run.examples.state_dict())
                run.checkpoints.save_if_due(run.state)
            if run.parallel.any(run.interrupt.requested):
                raise Interrupted
    except Interrupted:
        run.checkpoints.save(run.state)
        return False
    return True
