"""TLT's scaling table as the simulator sees it: its policy on its layout, and our design on the same requests."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from tlt.simulation.costs import Costs, gpu_costs
from tlt.simulation.lengths import Lengths
from tlt.simulation.paper import REPORTED, Reported, tlt_table
from tlt.simulation.run import Setting, Workload, simulate
from tlt.simulation.step_table import StepTable, step_table
from tlt.simulation.sweep import PLAIN, Assumptions, Sweep, engine_of, quality_of

GPUS_PER_NODE = 8
MAX_NUM_SEQS = 512


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Of one model, after the scripts of the paper's released code where these say."""

    tp_size: int
    global_requests: int
    """The same at all scales: no source says how the batch scales in the paper's table."""


LAYOUTS = {"7B": Layout(tp_size=4, global_requests=512), "32B": Layout(tp_size=8, global_requests=512)}
"""grpo_7B.sh: 64 prompts x 8 responses, TP 4. The 32B script scales its batch with the nodes (256 a replica); with
that, a speed-up could not grow with them, so the 7B script's batch is assumed for both."""
GROUP_SIZE = 8
LONGEST = 32_768


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Our design: what is assumed of its drafts, and what it does."""

    strategy: str
    stands: tuple[float, ...]
    suffix: tuple[float, float]


def rows(
    ours: Ours, lengths: Lengths, assumptions: Assumptions, *, gpu: str, iterations: int, seed: int,
    num_prompt_tokens: int,
) -> list[dict]:  # fmt: skip
    """One for each row of the paper's table."""
    found = []
    for reported in REPORTED:
        layout = LAYOUTS[reported.model]
        costs = gpu_costs(gpu, reported.model, tp_size=layout.tp_size, stands=ours.stands, suffix=ours.suffix)
        sweep = Sweep(
            tp_size=layout.tp_size, ranks=[GPUS_PER_NODE * reported.num_nodes], requests=[0],
            global_requests=layout.global_requests, lengths=lengths, max_num_seqs=MAX_NUM_SEQS,
            num_prompt_tokens=num_prompt_tokens, iterations=iterations, seed=seed, assumptions=assumptions,
        )  # fmt: skip
        found.append(row(reported, sweep, costs, ours))
    return found


def row(reported: Reported, sweep: Sweep, costs: Costs, ours: Ours) -> dict:
    """Simulated speed-ups beside the reported one."""
    (num_gpus,) = sweep.ranks
    num_replicas = num_gpus // sweep.tp_size
    requests = sweep.global_requests // num_replicas
    engine = engine_of(sweep, costs, requests, LONGEST)
    plain = step_table(engine, PLAIN, "--strategies")
    workload = Workload(
        num_groups=sweep.global_requests // GROUP_SIZE, group_size=GROUP_SIZE, lengths=sweep.lengths, longest=LONGEST,
        num_prompt_tokens=sweep.num_prompt_tokens,
    )  # fmt: skip
    assumptions = sweep.assumptions

    def run(tables, **changes) -> tuple[float, float, float]:
        """(seconds of rollouts, iterations that trained, tokens), sums over the run."""
        setting = Setting(workload=workload, num_replicas=num_replicas, strategy="", **changes)
        done = simulate(
            setting, tables, iterations=sweep.iterations, seed=sweep.seed, quality=quality_of(sweep, costs)
        )  # fmt: skip
        return (
            sum(one.rollout.duration_s for one in done), sum(one.has_met for one in done),
            sum(one.rollout.num_tokens for one in done),
        )  # fmt: skip

    @cache
    def our_table(share: float) -> StepTable:
        return step_table(engine, ours.strategy, "--strategies", share=share)

    plain_s, _, tokens = run(lambda share: plain)
    tree_s, _, _ = run(lambda share: tlt_table(plain, reported.model))
    full_s, meetings, _ = run(our_table, training=True, consolidation="on", switch_s=2.0)
    rest_s = costs.update_s(tokens, num_gpus) + sweep.iterations * assumptions.other_s
    if assumptions.rollout_share is not None:
        rest_s = plain_s * (1 - assumptions.rollout_share) / assumptions.rollout_share
    whole_s = plain_s + rest_s
    return {
        "model": reported.model, "nodes": reported.num_nodes, "gpus": num_gpus, "replicas": num_replicas,
        "requests_per_replica": requests, "reported": reported.speed_up,
        "plain_rollout_s": plain_s / sweep.iterations, "plain_rollout_share": plain_s / whole_s,
        "tlt": whole_s / (tree_s + rest_s), "tlt_rollout": plain_s / tree_s,
        "ours": whole_s / (full_s + rest_s + meetings * assumptions.meeting_s), "ours_rollout": plain_s / full_s,
    }  # fmt: skip


def table(found: Sequence[dict]) -> str:
    """Markdown."""
    lines = [
        "| model | nodes | requests a replica | plain rollout s | of the iteration | reported | "
        "TLT's policy, simulated | (rollout) | ours, simulated | (rollout) |",
        "|---" * 10 + "|",
    ]
    lines += [
        f"| {one['model']} | {one['nodes']} | {one['requests_per_replica']} | {one['plain_rollout_s']:.0f} | "
        f"{one['plain_rollout_share']:.2f} | {one['reported'] or 'out of memory'} | {one['tlt']:.2f} | "
        f"{one['tlt_rollout']:.2f} | {one['ours']:.2f} | {one['ours_rollout']:.2f} |"
        for one in found
    ]
    return "\n".join(lines)
