"""train(): the RL iteration, over protocols only."""

from dataclasses import dataclass

from tlt.config import RunConfig
from tlt.evaluation import Evaluation
from tlt.heartbeat import Heartbeat
from tlt.interrupt import Interrupt, Interrupted
from tlt.metrics import MetricsLog
from tlt.parallel import Parallel
from tlt.progress import Progress
from tlt.protocols import PolicyTrainer, PromptSource, RolloutEngine, WeightSync
from tlt.rl.train_batch import build_train_batch
from tlt.rollout.collector import RolloutCollector
from tlt.rollout.groups import GroupSampler
from tlt.rollout.log import RolloutLog
from tlt.run_state import Checkpoints, RunState
from tlt.trace import Trace
from tlt.types import SamplingConfig


@dataclass(kw_only=True)
class Run:
    """Everything that `train` needs, made by build.py."""

    config: RunConfig
    parallel: Parallel
    prompts: PromptSource
    sampling: SamplingConfig
    rollout_engine: RolloutEngine
    rollouts: RolloutCollector
    group_sampler: GroupSampler
    rollout_log: RolloutLog
    policy_trainer: PolicyTrainer
    weight_sync: WeightSync
    evaluation: Evaluation
    checkpoints: Checkpoints
    metrics: MetricsLog
    trace: Trace
    interrupt: Interrupt
    heartbeat: Heartbeat
    progress: Progress
    state: RunState
    """The run after its last complete iteration."""


def train(run: Run) -> None:
    """One iteration = one rollout of `prompts_per_iteration` groups, then one policy update on exactly those rollouts
    (more groups where equal ones are refilled).

    When a signal arrives the last complete iteration is saved and the function returns. Collective over all ranks.
    """
    rl, train_iters = run.config.rl, run.config.training.train_iters
    try:
        run.weight_sync.push(policy_version=run.state.iteration)
        if run.state.iteration == 0:
            run.metrics.log(0, run.evaluation.metrics_if_due(0), train_iters=train_iters)
        for iteration in run.progress.iterations(run.state.iteration + 1, train_iters):
            with run.trace.span("iteration", iteration=iteration):
                groups, rollout_metrics = run.group_sampler.sample(iteration)
                run.rollout_log.write_if_due(iteration, groups)
                run.rollout_engine.sleep()
                batch = build_train_batch(groups, rl=rl, max_response_tokens=run.sampling.max_response_tokens)
                policy_metrics = run.policy_trainer.train_step(batch)
                sync_metrics = run.weight_sync.push(policy_version=iteration)
                eval_metrics = run.evaluation.metrics_if_due(iteration)

                metrics = batch.metrics | rollout_metrics | policy_metrics | sync_metrics | eval_metrics
                run.metrics.log(iteration, metrics, train_iters=train_iters)
                run.state = run.state.after(iteration, run.prompts.state_dict())
                run.checkpoints.save_if_due(run.state)
            if run.parallel.any(run.interrupt.requested):
                raise Interrupted
    except Interrupted:
        run.checkpoints.save(run.state)
