"""Rows of a sweep: every combination of ranks, batch, limits, strategy and tail, each against plain decoding of the
same lengths."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from statistics import fmean

import numpy as np

from tlt.simulation.costs import Costs
from tlt.simulation.drafter_quality import DrafterQuality
from tlt.simulation.lengths import Lengths
from tlt.simulation.run import Iteration, Setting, Workload, simulate
from tlt.simulation.step_table import Engine, StepTable, step_table
from tlt.spec.policy import takes_threshold
from tlt.types import OFF

PLAIN = str(OFF)
DEFAULT_ROLLOUT_SHARE = 0.85
"""Of a plain iteration, where neither the caller nor the costs say: TLT's figure."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Of the iteration beside its rollout, and of a head that ages."""

    rollout_share: float | None = None
    """Of a plain iteration; None takes the costs' update and `other_s`."""
    other_s: float = 10.0
    update_loss: float = 0.02
    recovery_rank_s: float = 200.0
    meeting_s: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is combined. A replica has `tp_size` ranks."""

    tp_size: int
    ranks: Sequence[int]
    requests: Sequence[int]
    """A replica's."""
    global_requests: int | None = None
    """Of all replicas, in the place of `requests`."""
    group_sizes: Sequence[int] = (8,)
    longest: Sequence[int] = (32_768,)
    strategies: Sequence[str] = (PLAIN,)
    max_running_requests: Sequence[int] = (0,)
    """Above which a single strategy is off; 0 is never."""
    consolidation: Sequence[str] = ("off",)
    training: Sequence[bool] = (False,)
    switch_s: Sequence[float] = (2.0,)
    lengths: Lengths
    are_prompts_known: bool = False
    num_prompt_tokens: int = 200
    max_num_seqs: int = 256
    iterations: int = 4
    seed: int = 0
    assumptions: Assumptions = Assumptions()


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination."""

    ranks: int
    requests: int
    group_size: int
    longest: int
    strategy: str
    max_running_requests: int
    consolidation: str
    training: bool
    switch_s: float


def points(sweep: Sweep) -> list[Point]:
    """All, without those that differ in what cannot matter: a plain replica has no threshold and nothing to train, and
    a policy that decides at each batch size has no threshold."""
    found = {}
    strategies = dict.fromkeys([PLAIN, *sweep.strategies])
    for ranks, requests, group_size, longest in product(
        sweep.ranks, [0] if sweep.global_requests else sweep.requests, sweep.group_sizes, sweep.longest
    ):
        own = requests or max(round(sweep.global_requests / (ranks // sweep.tp_size)), 1)
        for strategy, most, moves, trains, switch_s in product(
            strategies, sweep.max_running_requests, sweep.consolidation, sweep.training, sweep.switch_s
        ):
            is_plain = strategy == PLAIN
            point = Point(
                ranks=ranks, requests=own, group_size=group_size, longest=longest, strategy=strategy,
                max_running_requests=most if takes_threshold(strategy) and not is_plain else 0, consolidation=moves,
                training=trains and not is_plain, switch_s=switch_s if trains and not is_plain else 0.0,
            )  # fmt: skip
            found[point] = None
    return list(found)


def rows(sweep: Sweep, costs: Costs) -> list[dict]:
    """One for each point: means over the iterations. Raises ValueError where a strategy drafts with what the costs do
    not know."""

    @cache
    def of(point: Point) -> dict:
        return measures(sweep, costs, point)

    return [of(point) | compared(of(point), of(plain_of(point)), sweep, costs) for point in points(sweep)]


def plain_of(point: Point) -> Point:
    """What ratios are to: the same responses, where nothing is drafted, nothing moves and no one trains."""
    return replace(
        point, strategy=PLAIN, max_running_requests=0, consolidation="off", training=False, switch_s=0.0
    )  # fmt: skip


def measures(sweep: Sweep, costs: Costs, point: Point) -> dict:
    """What the simulation gives for a point."""
    num_replicas = point.ranks // sweep.tp_size
    num_groups = max(round(num_replicas * point.requests / point.group_size), 1)
    workload = Workload(
        num_groups=num_groups, group_size=point.group_size, lengths=sweep.lengths, longest=point.longest,
        num_prompt_tokens=sweep.num_prompt_tokens, are_prompts_known=sweep.are_prompts_known,
    )  # fmt: skip
    setting = Setting(
        workload=workload, num_replicas=num_replicas, strategy=point.strategy, consolidation=point.consolidation,
        training=point.training, switch_s=point.switch_s, meeting_s=sweep.assumptions.meeting_s,
    )  # fmt: skip
    iterations = simulate(
        setting, tables_of(sweep, costs, point), iterations=sweep.iterations, seed=sweep.seed,
        quality=quality_of(sweep, costs),
    )  # fmt: skip
    return {
        "ranks": point.ranks, "replicas": num_replicas, "requests_per_replica": point.requests,
        "group_size": point.group_size, "max_response_tokens": point.longest, "strategy": point.strategy,
        "max_running_requests": point.max_running_requests, "consolidation": point.consolidation,
        "training": point.training, "idle_threshold_s": point.switch_s, **means(iterations, costs),
    }  # fmt: skip


def means(iterations: Sequence[Iteration], costs: Costs) -> dict[str, float]:
    """Over iterations; of contexts the largest."""
    outcomes = [one.rollout for one in iterations]
    peak = max(one.peak_context for one in outcomes)
    return {
        "rollout_s": fmean(one.duration_s for one in outcomes),
        "tail_s": fmean(one.tail_s for one in outcomes),
        "idle_frac": fmean(one.idle_frac for one in outcomes),
        "idle_used_frac": fmean(one.used_frac for one in outcomes),
        "trained_frac": fmean(float(one.has_met) for one in iterations),
        "head_share": fmean(one.share for one in iterations),
        "tokens_per_step": fmean(one.tokens_per_step for one in outcomes),
        "moved_responses": fmean(one.num_moved for one in outcomes),
        "tokens": fmean(one.num_tokens for one in outcomes),
        "kv_frac": peak / costs.kv_room if costs.kv_room else 0.0,
    }


def compared(row: dict, plain: dict, sweep: Sweep, costs: Costs) -> dict[str, float]:
    """Times of whole iterations, and ratios to plain ones of the same lengths."""
    assumptions = sweep.assumptions
    if assumptions.rollout_share is None and costs.update_s is not None:
        rest_s = costs.update_s(row["tokens"], row["ranks"]) + assumptions.other_s
    else:
        share = assumptions.rollout_share or DEFAULT_ROLLOUT_SHARE
        rest_s = plain["rollout_s"] * (1 - share) / share
    iteration_s = row["rollout_s"] + rest_s + assumptions.meeting_s * row["trained_frac"]
    plain_s = plain["rollout_s"] + rest_s
    return {
        "iteration_s": iteration_s, "rollout_ratio": plain["rollout_s"] / row["rollout_s"],
        "iteration_ratio": plain_s / iteration_s, "plain_rollout_share": plain["rollout_s"] / plain_s,
    }  # fmt: skip


def quality_of(sweep: Sweep, costs: Costs) -> DrafterQuality:
    """A head at its best, which then ages."""
    heads = [drafter.stands for name, drafter in costs.model.drafters.items() if name.startswith("eagle")]
    return DrafterQuality(
        stands=heads[0] if heads else (0.0,), loss=sweep.assumptions.update_loss if heads else 0.0,
        recovery_rank_s=sweep.assumptions.recovery_rank_s,
    )  # fmt: skip


def tables_of(sweep: Sweep, costs: Costs, point: Point):
    """Function from a head's share of acceptance to the table of a replica."""
    engine = engine_of(sweep, costs, point.requests, point.longest)

    @cache
    def of(share: float) -> StepTable:
        return step_table(
            engine, point.strategy, "--strategies", max_running_requests=point.max_running_requests or None,
            share=share,
        )  # fmt: skip

    return of


def engine_of(sweep: Sweep, costs: Costs, requests: int, longest: int) -> Engine:
    """A replica that runs all of its requests, or as many as it may."""
    max_running = min(max(requests, *sweep.group_sizes) + max(sweep.group_sizes), sweep.max_num_seqs)

    def contexts(num_running: int) -> float:
        """All begin together: while so many are left, they are as long as those that ended."""
        share = np.array([1 - num_running / (max_running + 1)])
        return sweep.num_prompt_tokens + float(sweep.lengths.at(share, longest=longest)[0])

    def draw(rng: np.random.Generator, count: int) -> np.ndarray:
        effects = sweep.lengths.effects(rng, count)
        return sweep.lengths.draw(rng, effects, group_size=1, longest=longest)[:, 0]

    return Engine(
        model=costs.model, context_s=costs.context_s, max_running=max_running, contexts=contexts, lengths=draw
    )  # fmt: skip


COLUMNS = (
    ("ranks", "ranks", "{}"), ("requests_per_replica", "requests", "{}"), ("group_size", "group", "{}"),
    ("max_response_tokens", "cap", "{}"), ("strategy", "strategy", "{}"),
    ("max_running_requests", "spec up to", "{}"), ("consolidation", "moves", "{}"), ("training", "trains", "{}"),
    ("idle_threshold_s", "threshold s", "{:g}"), ("rollout_s", "rollout s", "{:.1f}"), ("tail_s", "tail s", "{:.1f}"),
    ("idle_frac", "idle", "{:.2f}"), ("idle_used_frac", "of it used", "{:.2f}"),
    ("tokens_per_step", "tokens a step", "{:.2f}"), ("moved_responses", "moved", "{:.0f}"),
    ("kv_frac", "KV room used", "{:.2f}"), ("rollout_ratio", "x plain, rollout", "{:.2f}"),
    ("iteration_ratio", "x plain, iteration", "{:.2f}"),
)  # fmt: skip
ALWAYS = {"ranks", "strategy", "rollout_s", "tail_s", "idle_frac", "rollout_ratio", "iteration_ratio"}


def table(found: Sequence[dict]) -> str:
    """Markdown; columns in which all rows agree are left out, but for those that are asked for always."""
    columns = [one for one in COLUMNS if one[0] in ALWAYS or len({row[one[0]] for row in found}) > 1]
    lines = ["| " + " | ".join(title for _, title, _ in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(text.format(shown(row[name])) for name, _, text in columns) + " |" for row in found]
    return "\n".join(lines)


def shown(value: object) -> object:
    """Booleans as words."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
