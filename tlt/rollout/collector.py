"""One iteration's rollouts: every replica generates its groups, scores them as they end, and all ranks receive all."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tlt.drafter.history import SuffixHistory
from tlt.interrupt import Interrupt, Interrupted
from tlt.parallel import Parallel
from tlt.protocols import RewardFn, RolloutEngine, RolloutInterrupted, TailWork
from tlt.rollout.resources import Resources, own_resources, resource_metrics
from tlt.spec.acceptance import AcceptanceStats
from tlt.trace import Trace
from tlt.types import EngineStats, Prompt, Rollout, RolloutGroup, SamplingConfig, TailReport


@dataclass(frozen=True, kw_only=True)
class ReplicaReport:
    """What one rank contributes: groups come from the first rank of each replica, times from all."""

    groups: list[RolloutGroup]
    stats: EngineStats
    begin_s: float
    end_s: float
    """Wall-clock seconds between which the rank decoded."""
    tail: TailReport
    reward_stats: dict[str, float]
    interrupted: bool
    resources: Resources


class RolloutCollector:
    """Brings engine, rewards and ranks together; the same for training (sampled groups) and evaluation (greedy)."""

    def __init__(
        self, engine: RolloutEngine, rewards: RewardFn, parallel: Parallel, *, history: SuffixHistory, tail: TailWork,
        interrupt: Interrupt, trace: Trace,
    ):  # fmt: skip
        self.engine = engine
        self.rewards = rewards
        self.parallel = parallel
        self.history = history
        self.tail = tail
        self.interrupt = interrupt
        self.trace = trace

    def collect(
        self, prompts: Sequence[Prompt], sampling: SamplingConfig, *, group_size: int, seed: int
    ) -> tuple[list[RolloutGroup], dict[str, float]]:
        """Scored groups in the order of `prompts`, and metrics, both equal on all ranks.

        Raises Interrupted on all ranks if any of them was asked to stop. Collective over all ranks; all must call.
        """
        begin_s = time.time()
        self.tail.begin()
        try:
            with self.trace.span("rollout", num_prompts=len(prompts), group_size=group_size):
                groups = self.engine.generate(
                    prompts, sampling, group_size=group_size, seed=seed, on_finished=self.rewards.submit
                )
            is_scored = self.engine.is_replica_leader
            trace_steps(self.trace, self.engine.stats())
        except RolloutInterrupted:
            self.rewards.abandon()
            groups, is_scored = [], False
        end_s = time.time()
        tail = self.tail.use_tail()
        with self.trace.span("reward"):
            groups = self.rewards.collect(groups) if is_scored else []

        has_rewards = self.engine.is_replica_leader and bool(groups)
        report = ReplicaReport(
            groups=groups,
            stats=self.engine.stats(),
            begin_s=begin_s,
            end_s=end_s,
            tail=tail,
            reward_stats=self.rewards.stats() if has_rewards else {},
            interrupted=self.interrupt.is_requested(),
            resources=own_resources(history_bytes=self.history.num_bytes),
        )
        with self.trace.span("rollout_exchange"):
            reports = self.parallel.all_gather_objects(report)
        if any(report.interrupted for report in reports):
            raise Interrupted
        groups = in_order(prompts, reports, group_size=group_size)
        check_versions(groups, policy_version=self.engine.policy_version)
        for group in groups:  # the same on all ranks, wherever a prompt will be placed next
            for rollout in group.rollouts:
                self.history.add(group.prompt.problem_key, rollout.token_ids, policy_version=rollout.policy_version)
        metrics = rollout_metrics(reports) | resource_metrics([report.resources for report in reports])
        return groups, metrics | self.tail.publish()


def check_versions(groups: Sequence[RolloutGroup], *, policy_version: int) -> None:
    """Raise RuntimeError naming the first response that other weights than the present ones have written."""
    for group in groups:
        for rollout in group.rollouts:
            if rollout.policy_version != policy_version:
                raise RuntimeError(
                    f"response {rollout.sample_index} of {group.prompt.prompt_id} (replica {rollout.replica}) is of "
                    f"policy version {rollout.policy_version}, the policy is at {policy_version}"
                )


def trace_steps(trace: Trace, stats: EngineStats) -> None:
    """One record of all engine steps of a rollout, `engine_steps`: when each began (milliseconds after the first),
    requests that ran in it, and, where anything was drafted, drafts it verified and draft tokens that stood."""
    if not stats.step_s:
        return
    begin_s = stats.step_begin_s[0]
    drafting = {"drafts": stats.step_drafts, "accepted": stats.step_accepted} if any(stats.step_drafts) else {}
    trace.record(
        "engine_steps", begin_s=begin_s, end_s=stats.step_begin_s[-1] + stats.step_s[-1],
        begin_ms=[round(1e3 * (each - begin_s)) for each in stats.step_begin_s], running=stats.running_requests,
        **drafting,
    )  # fmt: skip


def in_order(
    prompts: Sequence[Prompt], reports: Sequence[ReplicaReport], *, group_size: int
) -> list[RolloutGroup]:  # fmt: skip
    """Groups in the order of `prompts`, of what reports have of them: a group's responses may have ended on several
    replicas. Raises RuntimeError unless each prompt has each of its responses exactly once."""
    found: dict[str, list[tuple[Rollout, float]]] = {prompt.prompt_id: [] for prompt in prompts}
    for group in (group for report in reports for group in report.groups):
        found[group.prompt.prompt_id] += zip(group.rollouts, group.rewards, strict=True)
    groups = []
    for prompt in prompts:
        scored = sorted(found[prompt.prompt_id], key=lambda each: each[0].sample_index)
        samples = [rollout.sample_index for rollout, _ in scored]
        if samples != list(range(group_size)):
            raise RuntimeError(f"prompt {prompt.prompt_id}: responses {samples} of {group_size} came back")
        rollouts, rewards = zip(*scored, strict=True)
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts, rewards=rewards))
    return groups


TAIL_SIZES = (1, 2, 4)
"""Running requests up to which a rank counts as being in the long tail."""


def rollout_metrics(reports: Sequence[ReplicaReport]) -> dict[str, float]:
    """Times over all ranks: a rank's tail is the time between its own last response and the world's last.

    `rollout/running_le_<k>_frac_of_time`: share of rank time in which at most k requests run, idle time included.
    """
    begin_s = min(report.begin_s for report in reports)
    end_s = max(report.end_s for report in reports)
    idle_s = [end_s - report.end_s for report in reports]
    num_tokens = sum(report.stats.num_response_tokens for report in reports if report.groups)
    duration_s = end_s - begin_s
    small_s = {
        size: sum(idle_s) + sum(
            seconds
            for report in reports
            for seconds, running in zip(report.stats.step_s, report.stats.running_requests, strict=True)
            if running <= size
        )
        for size in TAIL_SIZES
    }  # fmt: skip
    rewards = {name for report in reports for name in report.reward_stats}
    return {
        **{name: sum(report.reward_stats.get(name, 0.0) for report in reports) for name in sorted(rewards)},
        **{
            f"rollout/running_le_{size}_frac_of_time": value / (len(reports) * duration_s) if duration_s > 0 else 0.0
            for size, value in small_s.items()
        },
        "rollout/duration_s": duration_s,
        "rollout/tail_s": max(idle_s),
        "rollout/idle_frac": sum(idle_s) / (len(reports) * duration_s) if duration_s > 0 else 0.0,
        "rollout/tokens_per_s": num_tokens / duration_s if duration_s > 0 else 0.0,
        "rollout/preemptions": float(sum(report.stats.num_preemptions for report in reports if report.groups)),
        **moved_metrics(reports),
        **spec_metrics(reports),
        **tail_metrics(reports, end_s=end_s, idle_s=sum(idle_s)),
    }


def moved_metrics(reports: Sequence[ReplicaReport]) -> dict[str, float]:
    """Responses that ended on another replica than they began on; nothing where none did."""
    num_moved = sum(report.stats.num_adopted for report in reports if report.groups)
    return {"rollout/moved_responses": float(num_moved)} if num_moved else {}


def tail_metrics(reports: Sequence[ReplicaReport], *, end_s: float, idle_s: float) -> dict[str, float]:
    """What idle ranks did; nothing where none expected a tail, trained in this rollout or has failed before."""
    tails = [report.tail for report in reports]
    expected_s = [tail.expected_s for tail in tails if tail.expected_s > 0]
    if not expected_s and not any(tail.did_train or tail.has_failed for tail in tails):
        return {}
    late_s = [max(tail.back_s - end_s, 0.0) for tail in tails if tail.did_train]
    # What a rank trained after the world's last response was not idle time.
    used_s = sum(max(tail.train_s - max(tail.back_s - end_s, 0.0), 0.0) for tail in tails)
    return {
        "spot/train_s": sum(tail.train_s for tail in tails),
        "spot/idle_rank_s_used_frac": used_s / idle_s if idle_s > 0 else 0.0,
        "spot/ranks_trained": float(sum(tail.num_steps > 0 for tail in tails)),
        "spot/ranks_too_late": float(sum(tail.was_too_short for tail in tails)),
        **({"spot/expected_tail_s": max(expected_s)} if expected_s else {}),
        **({"spot/preemption_s_max": max(late_s)} if late_s else {}),
    }


def spec_metrics(reports: Sequence[ReplicaReport]) -> dict[str, float]:
    """What speculation did, over all replicas; nothing where nothing was ever drafted."""
    drafters: dict[str, AcceptanceStats] = {}
    for report in reports:
        for name, stats in report.stats.acceptance.items():
            drafters.setdefault(name, AcceptanceStats()).add(stats)
    total = AcceptanceStats()
    for stats in drafters.values():
        total.add(stats)
    if not total.num_drafts:
        return {}
    step_s = sum(sum(report.stats.step_s) for report in reports)
    speculative_s = sum(report.stats.speculative_step_s for report in reports)
    return {
        **{k: v for name in sorted(drafters) for k, v in drafters[name].metrics(f"spec/{name}").items()},
        **{f"spec/{name}/share_of_drafts": s.num_drafts / total.num_drafts for name, s in sorted(drafters.items())},
        "spec/acceptance_length": total.acceptance_length,
        "spec/acceptance_rate": total.acceptance_rate,
        "spec/draft_frac_of_time": total.draft_s / step_s if step_s > 0 else 0.0,
        "spec/plan_frac_of_time": sum(report.stats.plan_s for report in reports) / step_s if step_s > 0 else 0.0,
        "spec/speculative_frac_of_time": speculative_s / step_s if step_s > 0 else 0.0,
        "spec/strategy_switches": float(sum(report.stats.num_strategy_switches for report in reports)),
        "spec/roll_backs": float(sum(report.stats.num_roll_backs for report in reports)),
        "spec/unsound_samples": float(sum(report.stats.num_unsound_samples for report in reports)),
        "spec/hidden_states_mib_max": max(report.stats.hidden_state_bytes for report in reports) / 2**20,
        "spec/drafter_version": float(max(report.stats.drafter_version for report in reports)),
    }
