"""Run RL for many iterations with faults at random and say whether anything grows: memory, descriptors, threads, time.

python tools/soak.py --iterations 240 --ranks 2 --seed 7 --out PREFIX -- --hf-model DIR --save DIR --data-train ...
(flags of pretrain_rl.py; --load, --fault, --train-iters and --save-interval are the soak's). Each start gets one fault
that ends it and some that it must survive; it is started again until all iterations are done. Writes PREFIX.png and
PREFIX.md.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.training_run import last_iteration, run_command  # noqa: E402

FATAL_KINDS = ("exception", "sigkill", "out-of-memory", "disk-full", "sigkill", "sigstop")
FATAL_POINTS = (
    "rollout", "reward", "rollout_exchange", "update", "optimizer_step", "weight_sync", "save", "save_commit",
)  # fmt: skip
SLOW_POINTS = ("rollout", "reward", "rollout_exchange", "update", "weight_sync", "save", "spot_publish")
SERIES = {
    "host/rss_mib_max": "resident memory of a rank, MiB",
    "host/open_files_max": "open files of a rank",
    "host/threads_max": "threads of a rank",
    "host/history_mib": "history of responses, MiB",
    "spec/hidden_states_mib_max": "hidden states, MiB",
    "iteration_s": "seconds of an iteration",
}
"""What must not grow, by name in metrics.jsonl (seconds of an iteration are of the trace)."""


@dataclass(kw_only=True)
class Start:
    """One start of the run."""

    begin_iteration: int
    faults: list[str]
    seconds: float = 0.0
    returncode: int = 0
    end_iteration: int = 0


@dataclass(kw_only=True)
class Soak:
    starts: list[Start] = field(default_factory=list)

    @property
    def restarts(self) -> list[Start]:
        return self.starts[1:]


class NoIterationError(Exception):
    """A start that brought the run no further; another one would do the same."""


def draw_faults(generator: random.Random, *, begin: int, end: int, every: int, num_ranks: int) -> list[str]:
    """One that ends the start about `every` iterations after its begin (none within the last ones), and about one in
    ten iterations that is survived."""
    fatal = begin + generator.randint(every // 2, every + every // 2)
    faults = []
    if fatal < end:
        rank = generator.randrange(num_ranks)
        faults.append(f"{generator.choice(FATAL_KINDS)}@{generator.choice(FATAL_POINTS)}/{fatal}/{rank}")
    for iteration in range(begin + 1, min(fatal, end)):
        if generator.random() < 0.1:
            faults.append(f"slow@{generator.choice(SLOW_POINTS)}/{iteration}/{generator.randrange(num_ranks)}")
    survived = begin + generator.randint(every // 4, every // 2)  # from then on the rank goes on without training
    faults.append(f"exception@drafter_step/{min(survived, end)}/{generator.randrange(num_ranks)}")
    return faults


def soak(flags: list[str], *, save: Path, iterations: int, every: int, num_ranks: int, seed: int) -> Soak:
    """Start the run until it has made all its iterations. Raises NoIterationError where a start makes none."""
    generator, result = random.Random(seed), Soak()
    save.parent.mkdir(parents=True, exist_ok=True)
    while last_iteration(save) < iterations:
        begin = last_iteration(save)
        faults = draw_faults(generator, begin=begin, end=iterations, every=every, num_ranks=num_ranks)
        command = [
            *run_command(num_ranks), *flags, "--load", str(save), "--train-iters", str(iterations),
            "--save-interval", "1", "--fault", *faults,
        ]  # fmt: skip
        begin_s = time.monotonic()
        with (save.parent / f"{save.name}.log").open("a") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        start = Start(begin_iteration=begin, faults=faults, seconds=time.monotonic() - begin_s, returncode=code)
        start.end_iteration = last_iteration(save)
        result.starts.append(start)
        print(f"iterations {begin} to {start.end_iteration} in {start.seconds:.0f} s, status {code}: {faults[0]}")
        if start.end_iteration == begin:
            raise NoIterationError(
                f"a start ended with status {code} and completed no iteration: see {save.parent / f'{save.name}.log'}"
            )
    return result


def read_series(save: Path) -> dict[str, dict[int, float]]:
    """Each series by iteration."""
    series: dict[str, dict[int, float]] = {name: {} for name in SERIES}
    for line in (save / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in SERIES:
            if record.get(name) is not None and record["iteration"] > 0:
                series[name][record["iteration"]] = record[name]
    for line in (save / "trace" / "rank0.jsonl").read_text().splitlines():
        span = json.loads(line) if line.endswith("}") else {}
        if span.get("name") == "iteration" and "error" not in span:
            series["iteration_s"][span["iteration"]] = span["end_s"] - span["begin_s"]
    return series


def slope(values: dict[int, float], starts: list[Start], *, warm_up: int) -> tuple[float, float, int]:
    """(units per 100 iterations, its standard error, number of points): one slope for all starts, each with a level of
    its own, without the first `warm_up` iterations of each. Residuals are taken in blocks of 10 iterations, since
    neighbours are alike."""
    rows, levels, blocks = [], [], []
    for number, start in enumerate(starts):
        span = range(start.begin_iteration + 1 + warm_up, start.end_iteration + 1)
        for iteration in [one for one in span if one in values]:
            rows.append((iteration, values[iteration]))
            levels.append(number)
            blocks.append((number, (iteration - span.start) // 10))
    if len(rows) < 2 or len(set(levels)) == len(rows):
        return math.nan, math.nan, len(rows)  # no start is longer than its warm-up
    x, y = np.array(rows, dtype=np.float64).T
    for number in set(levels):
        own = np.array(levels) == number
        x[own] -= x[own].mean()
        y[own] -= y[own].mean()
    spread = (x**2).sum()
    value = (x * y).sum() / spread
    scores = x * (y - value * x)
    sums = [scores[[index for index, block in enumerate(blocks) if block == one]].sum() for one in sorted(set(blocks))]
    return 100 * value, 100 * float(np.sqrt(np.square(sums).sum())) / spread, len(x)


def draw(series: dict[str, dict[int, float]], result: Soak, path: Path) -> None:
    """A panel a series; lines where the run was started again."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(SERIES), 1, figsize=(9, 11), sharex=True, layout="constrained")
    for axis, (name, title) in zip(axes, SERIES.items(), strict=True):
        axis.plot(list(series[name]), list(series[name].values()), ".", markersize=3)
        axis.set_ylim(bottom=0)
        axis.set_ylabel(title, fontsize=7)
        for start in result.restarts:
            axis.axvline(start.begin_iteration + 0.5, color="tab:red", linewidth=0.7)
    axes[-1].set_xlabel("iteration; red: started again after a fault")
    figure.savefig(path, dpi=90)


def report(series: dict[str, dict[int, float]], result: Soak, *, warm_up: int) -> str:
    """Markdown: a row a series, a row a start."""
    lines = [
        f"{result.starts[-1].end_iteration} iterations, {len(result.starts)} starts, "
        f"{sum(start.seconds for start in result.starts) / 3600:.2f} hours.",
        "",
        f"Slopes leave out the first {warm_up} iterations of each start; +- is one standard error.",
        "",
        "| | first | last | slope per 100 iterations |",
        "|---|---|---|---|",
    ]
    for name, title in SERIES.items():
        values = series[name]
        value, error, _ = slope(values, result.starts, warm_up=warm_up)
        first, last = values[min(values)], values[max(values)]
        lines.append(f"| {title} | {first:.4g} | {last:.4g} | {value:+.3g} +- {error:.2g} |")
    lines += ["", "| from | to | ended by | survived | status | s |", "|---|---|---|---|---|---|"]
    for start in result.starts:
        fatal = [one for one in start.faults if not one.startswith("slow") and "drafter_step" not in one]
        lines.append(
            f"| {start.begin_iteration} | {start.end_iteration} | {''.join(fatal) or 'end'} | "
            f"{len(start.faults) - len(fatal)} | {start.returncode} | {start.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, save: Path) -> None:
    """Exit with one line that names the flag that is wrong."""
    least = {"iterations": args.warm_up + 2, "every": 1, "ranks": 1, "warm_up": 0}
    for name, allowed in least.items():
        if getattr(args, name) < allowed:
            more = " (--warm-up and 2 to see a slope)" if name == "iterations" else ""
            parser.error(f"--{name.replace('_', '-')} must be at least {allowed}{more}, got {getattr(args, name)}")
    if last_iteration(save) >= args.iterations:
        parser.error(
            f"--save must be a run with fewer than --iterations {args.iterations}, got {save} with "
            f"{last_iteration(save)}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=240, help="iterations of the run in all")
    parser.add_argument("--every", type=int, default=50, help="iterations between faults that end the run, about")
    parser.add_argument("--ranks", type=int, default=2, help="ranks under torchrun")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--warm-up", type=int, default=12, help="iterations of each start that no slope counts")
    parser.add_argument("--out", required=True, help="prefix of the PNG and the Markdown that are written")
    parser.add_argument("flags", nargs="+", help="-- and flags of pretrain_rl.py, among them --save")
    args = parser.parse_args(arguments)
    if "--save" not in args.flags[:-1]:
        parser.error("flags of pretrain_rl.py must be given after -- and name --save DIR")
    save = Path(args.flags[args.flags.index("--save") + 1])
    check(parser, args, save)
    try:
        result = soak(
            args.flags, save=save, iterations=args.iterations, every=args.every, num_ranks=args.ranks, seed=args.seed
        )
    except NoIterationError as error:
        print(f"soak.py: error: {error}", file=sys.stderr)
        return 1
    series = read_series(save)
    draw(series, result, Path(f"{args.out}.png"))
    text = report(series, result, warm_up=args.warm_up)
    Path(f"{args.out}.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
