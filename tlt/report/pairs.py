"""Runs of several modes on the same seeds, compared: what each phase costs in a mode, and against plain."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tlt.report.run import Point, RunRecord
from tlt.timeline.breakdown import ITERATION, PHASES, breakdown

PLAIN = "plain"
MEANS = {
    "acceptance_length": "spec/acceptance_length",
    "response_tokens": "rollout/response_tokens_mean",
    "entropy_nats": "rollout/entropy",
    "one_hot_ceiling": "rollout/max_prob",
}
"""Names in a row, and the metrics that they are means of over the counted iterations."""
CURVES = {
    "reward": "rl/reward",
    "greedy_accuracy": "eval/greedy_accuracy",
    "sampled_accuracy": "eval/sampled_accuracy",
    "acceptance_length": "spec/acceptance_length",
    "rollout_s": "rollout/duration_s",
}


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One run of one mode."""

    requests_per_rank: int
    mode: str
    seed: int
    counted: tuple[int, ...]
    """Iterations."""
    seconds: dict[str, float]
    """By phase, mean over the counted iterations."""
    idle_frac: float
    training_frac: float
    means: dict[str, float]
    """By the names of MEANS."""
    texts: tuple[tuple[float, float], ...]
    """(reward, mean response length) of each counted iteration: where both are equal the text was, in all likelihood.
    """
    curves: dict[str, list[Point]]
    """By the names of CURVES."""


def measure_seed(
    runs: Mapping[str, RunRecord], *, requests_per_rank: int, seed: int
) -> list[MeasuredRun]:  # fmt: skip
    """Of one seed's runs by mode, over the iterations that none of them began a start with: a pair has the same ones.

    Raises ValueError where there are none.
    """
    counted = set.intersection(*(run.warm_iterations() for run in runs.values())) if runs else set()
    if runs and not counted:
        raise ValueError(f"runs of seed {seed} with {requests_per_rank} requests a rank share no counted iteration")
    return [
        measure(run, requests_per_rank=requests_per_rank, mode=mode, seed=seed, counted=sorted(counted))
        for mode, run in runs.items()
    ]


def measure(
    run: RunRecord, *, requests_per_rank: int, mode: str, seed: int, counted: Sequence[int]
) -> MeasuredRun:  # fmt: skip
    """Over iterations that the run completed."""
    chosen = [breakdown(run.timeline([iteration])) for iteration in counted]
    means = {name: run.mean(metric, set(counted)) for name, metric in MEANS.items()}
    records = {record["iteration"]: record for record in run.metrics}
    return MeasuredRun(
        requests_per_rank=requests_per_rank, mode=mode, seed=seed, counted=tuple(counted),
        seconds={phase: statistics.fmean(each.seconds[phase] for each in chosen) for phase in PHASES},
        idle_frac=statistics.fmean(each.idle_frac for each in chosen),
        training_frac=statistics.fmean(each.training_frac for each in chosen),
        means={"acceptance_length": 1.0} | {name: value for name, value in means.items() if value is not None},
        texts=tuple(
            (records[each]["rl/reward"], records[each]["rollout/response_tokens_mean"]) for each in counted
        ),
        curves={name: run.series(metric) for name, metric in CURVES.items()},
    )  # fmt: skip


def rows(runs: Sequence[MeasuredRun]) -> list[dict]:
    """One for each number of requests, mode and phase. `median_s`: median over a mode's runs of the mean seconds of
    an iteration; `ratio_vs_plain`: median over seeds of plain's seconds by the mode's, both of that seed, None where
    there is no pair or the phase takes no time; `ratio_vs`: the same against each mode."""
    result = []
    for requests, mode in dict.fromkeys((run.requests_per_rank, run.mode) for run in runs):
        own = of_mode(runs, requests, mode)
        about = summary(own, of_mode(runs, requests, PLAIN))
        modes = dict.fromkeys(run.mode for run in runs if run.requests_per_rank == requests)
        for phase in PHASES:
            seconds = [run.seconds[phase] for run in own.values()]
            by_mode = {other: ratios(of_mode(runs, requests, other), own, phase) for other in modes}
            against_plain = by_mode.get(PLAIN, [])
            result.append(
                {
                    "requests_per_rank": requests,
                    "mode": mode,
                    "phase": phase,
                    "median_s": statistics.median(seconds),
                    "ratio_vs_plain": statistics.median(against_plain) if against_plain else None,
                    "ratio_min": min(against_plain, default=None),
                    "ratio_max": max(against_plain, default=None),
                    "num_pairs": len(against_plain),
                    "ratio_vs": {other: statistics.median(values) for other, values in by_mode.items() if values},
                    "seconds": seconds,
                    **about,
                }
            )
    return result


def ratios(base: Mapping[int, MeasuredRun], own: Mapping[int, MeasuredRun], phase: str) -> list[float]:
    """Seconds of `base` by those of `own`, of each seed that both have; above 1: `own` is faster."""
    pairs = [(base[seed].seconds[phase], own[seed].seconds[phase]) for seed in own if seed in base]
    return [base_s / own_s for base_s, own_s in pairs if base_s > 0 and own_s > 0]


def of_mode(runs: Sequence[MeasuredRun], requests_per_rank: int, mode: str) -> dict[int, MeasuredRun]:
    """By seed."""
    return {run.seed: run for run in runs if (run.requests_per_rank, run.mode) == (requests_per_rank, mode)}


def summary(by_seed: Mapping[int, MeasuredRun], plain: Mapping[int, MeasuredRun]) -> dict:
    """What all rows of a mode carry: without the workload's entropy and ceiling no ratio means anything."""
    own = list(by_seed.values())
    pairs = [(plain[seed], run) for seed, run in by_seed.items() if seed in plain]
    pair_tokens = [run.means["response_tokens"] / base.means["response_tokens"] for base, run in pairs]
    same = [one == other for base, run in pairs for one, other in zip(base.texts, run.texts, strict=True)]
    accuracies = [final(run.curves["greedy_accuracy"]) for run in own]
    known = [value for value in accuracies if value is not None]
    return {
        "num_runs": len(own),
        "idle_frac": statistics.fmean(run.idle_frac for run in own),
        "training_frac": statistics.fmean(run.training_frac for run in own),
        **{name: mean_of([run.means.get(name) for run in own]) for name in MEANS},
        "tokens_vs_plain": statistics.median(pair_tokens) if pair_tokens else None,
        "same_text_frac": statistics.fmean(same) if same else None,
        "final_accuracy": statistics.fmean(known) if known else None,
        "final_accuracy_min": min(known, default=None),
        "final_accuracy_max": max(known, default=None),
    }


def mean_of(values: Sequence[float | None]) -> float | None:
    """Over those that are there."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def final(points: Sequence[Point]) -> float | None:
    """Last value of a curve."""
    return points[-1][1] if points else None


def spread(curves: Sequence[Sequence[Point]]) -> list[tuple[float, float, float, float]]:
    """(iteration, mean, least, largest) over seeds, at iterations that all of them have."""
    by_iteration: list[Mapping[float, float]] = [dict(points) for points in curves]
    shared = set.intersection(*(set(points) for points in by_iteration)) if by_iteration else set()
    return [
        (each, statistics.fmean(values), min(values), max(values))
        for each in sorted(shared)
        for values in [[points[each] for points in by_iteration]]
    ]


def markdown_tables(found: Sequence[dict]) -> str:
    """Of `rows`: for each number of requests a table of modes, one of phases and one of ratios."""
    parts = []
    for requests in dict.fromkeys(row["requests_per_rank"] for row in found):
        chosen = [row for row in found if row["requests_per_rank"] == requests]
        parts += [f"## {requests} requests a rank", mode_table(chosen), phase_table(chosen), ratio_table(chosen)]
    return "\n\n".join(parts)


def mode_table(found: Sequence[dict]) -> str:
    """A line for each mode."""
    by_mode: dict[str, dict[str, dict]] = {}
    for row in found:
        by_mode.setdefault(row["mode"], {})[row["phase"]] = row
    lines = [
        "| mode | runs | iteration s | x plain, median (min to max) | rollout x plain | acceptance length | idle | "
        "trained | tokens x plain | same text | accuracy at the end (min to max) | entropy, nats | E[max p] |",
        "|" + "---|" * 13,
    ]
    for mode, phases in by_mode.items():
        row = phases[ITERATION]
        cells = [
            mode, str(row["num_runs"]), number(row["median_s"], 2), ratio(row), ratio(phases["rollout"]),
            number(row["acceptance_length"], 2), percent(row["idle_frac"]), percent(row["training_frac"]),
            number(row["tokens_vs_plain"], 2), percent(row["same_text_frac"]),
            f"{number(row['final_accuracy'], 3)} ({number(row['final_accuracy_min'], 3)} to "
            f"{number(row['final_accuracy_max'], 3)})",
            number(row["entropy_nats"], 3), number(row["one_hot_ceiling"], 3),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def phase_table(found: Sequence[dict]) -> str:
    """Seconds of an iteration by phase (median over runs), a line for each mode."""
    by_mode: dict[str, dict[str, float]] = {}
    for row in found:
        by_mode.setdefault(row["mode"], {})[row["phase"]] = row["median_s"]
    lines = ["| mode, seconds | " + " | ".join(PHASES) + " |", "|" + "---|" * (len(PHASES) + 1)]
    for mode, seconds in by_mode.items():
        lines.append("| " + " | ".join([mode, *(number(seconds[phase], 2) for phase in PHASES)]) + " |")
    return "\n".join(lines)


def ratio_table(found: Sequence[dict]) -> str:
    """How many times as fast each mode is as each other one, end to end (median over seeds)."""
    against = {row["mode"]: row["ratio_vs"] for row in found if row["phase"] == ITERATION}
    lines = ["| mode, times as fast as | " + " | ".join(against) + " |", "|" + "---|" * (len(against) + 1)]
    for mode, by_mode in against.items():
        lines.append("| " + " | ".join([mode, *(number(by_mode.get(other), 2) for other in against)]) + " |")
    return "\n".join(lines)


def ratio(row: Mapping) -> str:
    """`1.70 (1.60 to 1.80)`."""
    if row["ratio_vs_plain"] is None:
        return "-"
    return f"{row['ratio_vs_plain']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"


def number(value: float | None, digits: int) -> str:
    """A dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
