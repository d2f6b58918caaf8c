"""Policies of speculation compared on many iterations in seconds: regret against an oracle, in a model of the engine.

tools/replay_policies.py --out PREFIX [--recording FILE]

The model is fitted to a recording (tools/bench_rollout.py --record FILE) or stated (tlt/spec/step_model.py). Its heads
drift: with an update of the policy they lose acceptance, which comes back. A policy is the same object from the first
iteration to the last. PREFIX.json, PREFIX.md, PREFIX.png. `adaptive`, which routes each request by its own text, is no
policy over arms: compare it by running it (tools/bench_rollout.py).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

import numpy as np  # noqa: E402

from tlt.provenance import git_commit  # noqa: E402
from tlt.spec.policy import parse_policy  # noqa: E402
from tlt.spec.recording import read_recording  # noqa: E402
from tlt.spec.replay import Drift, Lengths, Replay, World, as_recorded, heavy_tailed, replay  # noqa: E402
from tlt.spec.step_model import StepModel, fit_model, stated_model  # noqa: E402
from tlt.types import OFF, SpecStrategy  # noqa: E402

ARMS = "eagle:1|eagle:2|eagle:4|eagle:6|suffix:8"
DEFAULT_POLICIES = (
    "off", *ARMS.split("|"), "schedule@1=eagle:6/2=eagle:4/7=eagle:2/25=off",
    "beg-mab@" + "/".join(f"{first}={ARMS}" for first in (1, 3, 6, 11, 21)), "cost-model@" + ARMS,
)  # fmt: skip
ORACLE = "oracle"
CURVE_POINTS = 200


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="prefix of the .json, .md and .png written")
    parser.add_argument("--recording", type=Path, metavar="FILE", help="of tools/bench_rollout.py (default: stated)")
    parser.add_argument(
        "--policies", nargs="+", default=DEFAULT_POLICIES, metavar="P",
        help=f"as --spec-strategy; `off` is always there (default: arms {ARMS}, a schedule, both learning policies)",
    )  # fmt: skip
    parser.add_argument("--requests", nargs="+", type=int, default=[8, 32], metavar="N", help="default: 8 32")
    parser.add_argument("--iterations", type=int, default=200, help="rollouts, one update each (default: 200)")
    parser.add_argument("--seeds", type=int, default=5, help="default: 5")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="JSON list of response lengths (default: the "
                        "recording's, or lognormal)")  # fmt: skip
    parser.add_argument("--median-length", type=float, default=60.0, help="tokens, of lognormal (default: 60)")
    parser.add_argument("--length-sigma", type=float, default=1.0, help="of its logarithm (default: 1)")
    parser.add_argument("--longest", type=int, default=768, help="tokens, where lengths are cut (default: 768)")
    parser.add_argument("--drift-fall", type=float, default=0.4, help="share of acceptance lost (default: 0.4)")
    parser.add_argument("--drift-recovery", type=float, default=5.0, help="iterations to 1/e (default: 5)")
    parser.add_argument("--drift-period", type=int, default=20, help="iterations between falls (default: 20)")
    args = parser.parse_args(argv)
    args.policies = [*dict.fromkeys(["off", *args.policies])]
    return args


def check(args: argparse.Namespace) -> None:
    """Raises ValueError naming the flag."""
    for name in ("iterations", "seeds", "drift_period", "longest"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("drift_recovery", "median_length"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    if not 0 <= args.drift_fall <= 1:
        raise ValueError(f"--drift-fall must be in [0, 1], got {args.drift_fall}")
    if min(args.requests) < 1:
        raise ValueError(f"--requests must be at least 1, got {args.requests}")


def read_inputs(args: argparse.Namespace) -> tuple[StepModel, Lengths, tuple[SpecStrategy, ...]]:
    """(model, lengths, the oracle's arms). Raises ValueError naming the flag."""
    check(args)
    arms = dict.fromkeys(arm for text in args.policies for arm in parse_policy(text, "--policies")[1])
    recorded: list[int] = []
    model = stated_model()
    if args.recording:
        rollouts = read_recording(args.recording, "--recording")
        model = fit_model(rollouts)
        recorded = [tokens for rollout in rollouts for tokens in rollout.response_tokens]
    missing = sorted({arm.method for arm in arms if arm != OFF} - set(model.drafters))
    if missing:
        raise ValueError(f"--policies must draft with {sorted(model.drafters)}, which the model knows, got {missing}")
    if args.lengths:
        recorded = read_lengths(args.lengths)
    lengths = as_recorded(recorded) if recorded else heavy_tailed(args.median_length, args.length_sigma, args.longest)
    return model, lengths, tuple(arms)


def read_lengths(path: Path) -> list[int]:
    """Raises ValueError naming the flag."""
    found = json.loads(path.read_text()) if path.is_file() else None
    if not isinstance(found, list) or not found or not all(isinstance(n, int) and n >= 1 for n in found):
        raise ValueError(f"--lengths must be a file with a JSON list of lengths in tokens, got {path}")
    return found


def compare(args: argparse.Namespace, world: World) -> list[dict]:
    """Rows, one for each policy, the oracle's last."""
    replays: dict[str, list[Replay]] = {}
    for text in (*args.policies, ORACLE):
        begin_s = time.perf_counter()
        replays[text] = [
            replay(
                None if text == ORACLE else parse_policy(text, "--policies", seed=seed)[0], world,
                iterations=args.iterations, seed=seed,
            ) for seed in range(args.seeds)
        ]  # fmt: skip
        num_steps = sum(one.num_steps for one in replays[text])
        print(f"{world.num_requests} requests, {text}: {num_steps} steps replayed in "
              f"{time.perf_counter() - begin_s:.1f} s", file=sys.stderr)  # fmt: skip
    return [row(text, world, found, replays) for text, found in replays.items()]


def row(text: str, world: World, found: list[Replay], replays: dict[str, list[Replay]]) -> dict:
    """Of one policy over all seeds; ratios are of the same seed's rollouts."""
    seconds, off, oracle = ([float(one.seconds.sum()) for one in each]
                            for each in (found, replays["off"], replays[ORACLE]))  # fmt: skip
    regrets = np.array([one.regret_s.cumsum() for one in found])  # [seeds, iterations]
    points = np.unique(np.linspace(0, regrets.shape[1] - 1, CURVE_POINTS).astype(int))
    last = regrets[:, -1]
    return {
        "num_requests": world.num_requests,
        "policy": text,
        "regret_s": float(last.mean()),
        "regret_s_min": float(last.min()),
        "regret_s_max": float(last.max()),
        "regret_frac": statistics.mean(a / b for a, b in zip(last.tolist(), seconds, strict=True)),
        "speed_vs_off": statistics.mean(a / b for a, b in zip(off, seconds, strict=True)),
        "speed_vs_oracle": statistics.mean(a / b for a, b in zip(oracle, seconds, strict=True)),
        "seconds": statistics.mean(seconds),
        "switches_per_100_steps": 100 * sum(o.num_switches for o in found) / sum(o.num_steps for o in found),
        "curve": {
            "iterations": (points + 1).tolist(),
            **{
                name: values[points].round(3).tolist()
                for name, values in
                (("mean", regrets.mean(0)), ("min", regrets.min(0)), ("max", regrets.max(0)))
            },
        },
    }  # fmt: skip


def short(text: str) -> str:
    """A policy's name for tables and legends."""
    return text.partition("@")[0]


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| requests | policy | regret s, mean (min to max) | of its time | x off | x oracle | switches in 100 steps |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one['num_requests']} | {short(one['policy'])} | {one['regret_s']:.1f} ({one['regret_s_min']:.1f} to "
        f"{one['regret_s_max']:.1f}) | {100 * one['regret_frac']:.2f} % | {one['speed_vs_off']:.3f} | "
        f"{one['speed_vs_oracle']:.3f} | {one['switches_per_100_steps']:.1f} |"
        for one in rows
    ]
    return "\n".join(lines)


def draw(path: Path, rows: list[dict]) -> None:
    """Cumulative regret by iteration, a panel for each number of requests; the band is from the best to the worst
    seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(one["num_requests"] for one in rows))
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(6 * len(sizes), 4.5), squeeze=False)
    for axes, size in zip(panels[0], sizes, strict=True):
        for one in rows:
            if one["num_requests"] != size or one["policy"] == ORACLE:
                continue
            curve = one["curve"]
            (line,) = axes.plot(curve["iterations"], curve["mean"], label=short(one["policy"]))
            axes.fill_between(curve["iterations"], curve["min"], curve["max"], color=line.get_color(), alpha=0.2)
        axes.set_yscale("log")
        axes.set_title(f"{size} requests a rollout")
        axes.set_xlabel("iteration")
        axes.set_ylabel("cumulative regret (s)")
        axes.grid(alpha=0.3)
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    try:
        model, lengths, arms = read_inputs(args)
    except ValueError as error:
        print(f"replay_policies.py: error: {error}", file=sys.stderr)
        return 2
    drift = Drift(fall=args.drift_fall, recovery=args.drift_recovery, period=args.drift_period)
    rows = [
        one
        for size in args.requests
        for one in compare(args, World(model=model, arms=arms, drift=drift, lengths=lengths, num_requests=size))
    ]
    about = {
        "commit": git_commit(), "arguments": {name: str(value) for name, value in vars(args).items()},
        "model": {
            name: {"covers": drafter.covers, "stands": drafter.stands} for name, drafter in model.drafters.items()
        } | {"step_s_by_tokens": {size: model.steps.seconds(size) for size in (1, 2, 4, 8, 16, 32, 64)}},
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.out}.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    Path(f"{args.out}.md").write_text(table(rows) + "\n")
    draw(Path(f"{args.out}.png"), rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
