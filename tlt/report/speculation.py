"""What a run's drafters did, and what its controller or router decided, over its iterations."""

from collections import defaultdict
from collections.abc import Mapping

from tlt.report.run import Point, RunRecord
from tlt.timeline.records import complete_iterations

SIZES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 10**9))
"""Running requests, (least, most) of each range."""
COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "draft_s")
DECISIONS = {
    "spec/speculative_frac_of_time": "share of decoding time in steps that drafted",
    "spec/draft_frac_of_time": "share of decoding time spent drafting",
    "spec/strategy_switches": "changes of strategy",
    "spec/drafter_version": "drafter version",
}


def drafters(run: RunRecord) -> list[str]:
    """Names of those that ever drafted."""
    names = [name for name in run.names() if name.startswith("spec/") and name.endswith("/num_drafts")]
    return sorted(name.split("/")[1] for name in names)


def drafter_row(run: RunRecord, name: str) -> dict[str, float | None]:
    """Over all of a run's training rollouts: sums of COUNTS, acceptance length over all and in the first and the last
    iteration that it drafted in, acceptance rate, and the mean of the one-hot ceiling weighted by drafts."""
    values = {each: dict(run.series(f"spec/{name}/{each}")) for each in (*COUNTS, "acceptance_ceiling")}
    lengths = run.series(f"spec/{name}/acceptance_length")
    total: dict[str, float] = {each: sum(values[each].values()) for each in COUNTS}
    drafts = total["num_drafts"]
    ceilings = [values["num_drafts"][each] * value for each, value in values["acceptance_ceiling"].items()]
    return {
        **total,
        "acceptance_length": 1 + total["num_accepted_tokens"] / drafts if drafts else None,
        "first_length": lengths[0][1] if lengths else None,
        "last_length": lengths[-1][1] if lengths else None,
        "acceptance_rate": (
            total["num_accepted_tokens"] / total["num_draft_tokens"] if total["num_draft_tokens"] else None
        ),
        "acceptance_ceiling": sum(ceilings) / drafts if drafts and ceilings else None,
    }


def position_rates(run: RunRecord, name: str) -> list[float]:
    """Acceptance rate at each position of a draft, mean over iterations."""
    rates: list[float] = []
    while (mean := run.mean(f"spec/{name}/acceptance_rate_{len(rates) + 1}")) is not None:
        rates.append(mean)
    return rates


def spot_row(run: RunRecord) -> dict[str, float]:
    """What training on idle ranks did; {} where it was off."""
    if not run.series("spot/steps"):
        return {}
    sums = {name: sum(value for _, value in run.series(f"spot/{name}")) for name in ("steps", "train_s", "published")}
    used, gain = run.mean("spot/idle_rank_s_used_frac"), run.mean("spot/gain")
    return {
        **sums,
        **({"idle_rank_s_used_frac": used} if used is not None else {}),
        **({"gain": gain} if gain is not None else {}),
    }  # fmt: skip


def shares(run: RunRecord) -> dict[str, list[Point]]:
    """Of each drafter in an iteration's drafts."""
    return {name: run.series(f"spec/{name}/share_of_drafts") for name in drafters(run)}


def draft_lengths(run: RunRecord) -> dict[str, list[Point]]:
    """Mean draft tokens of a verification, by drafter."""
    result = {}
    for name in drafters(run):
        drafts = dict(run.series(f"spec/{name}/num_drafts"))
        tokens = run.series(f"spec/{name}/num_draft_tokens")
        result[name] = [(iteration, value / drafts[iteration]) for iteration, value in tokens]
    return result


def drafted_shares(run: RunRecord) -> Mapping[str, dict[int, float]]:
    """By range of running requests and iteration: the share of requests, over engine steps, that a draft was verified
    for. Evaluations are left out. {} where the trace has no drafts."""
    drafts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    requests: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for iteration, windows in complete_iterations(run.traces).items():
        for trace, window in zip(run.traces, windows, strict=True):
            evaluations = [span for span in trace.spans if span.name == "evaluation"]
            for steps in trace.steps:
                if window.holds(steps) and not any(span.holds(steps) for span in evaluations):
                    for running, drafted in zip(steps.running, steps.drafts, strict=True):
                        size = size_name(running)
                        drafts[size][iteration] += drafted
                        requests[size][iteration] += running
    if not any(any(by_iteration.values()) for by_iteration in drafts.values()):
        return {}
    return {
        size: {each: drafts[size][each] / count for each, count in requests[size].items() if count}
        for size in map(size_name, (least for least, _ in SIZES))
        if size in requests
    }


def size_name(running: int) -> str:
    """Of the range that a number of running requests lies in; 0 (a step that only ended requests) counts as 1."""
    least, most = next((least, most) for least, most in SIZES if running <= most)
    return f"{least}" if least == most else f"{least}+" if most >= 10**9 else f"{least}-{most}"
