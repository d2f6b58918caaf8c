"""RL iterations on 8 to 1,024 ranks, simulated: how long a rollout takes, who idles in its tail, what helps.

tools/simulate_long_tail.py --out PREFIX [--ranks 8 64 1024] [--strategies off eagle:4 adaptive:8] ...
tools/simulate_long_tail.py --out PREFIX --paper       TLT's table 3 and our design beside it
tools/simulate_long_tail.py --out PREFIX --validate RUN    predicted against measured time of a real run

Rows are all combinations of what several values are given for. Costs: a named GPU (assumed, tlt/simulation/
roofline.py), --recording FILE (of tools/bench_rollout.py --record) or --checkpoint DIR (of a run) (measured).
Writes PREFIX.json (or --json FILE), PREFIX.md and PREFIX.png. What is modelled: docs/capacity.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

from tlt.provenance import git_commit  # noqa: E402
from tlt.simulation import paper_table, picture, sweep  # noqa: E402
from tlt.simulation.costs import Costs, gpu_costs, learned_costs, recorded_costs  # noqa: E402
from tlt.simulation.lengths import Lengths, named_lengths  # noqa: E402
from tlt.simulation.measured import read_run  # noqa: E402
from tlt.simulation.roofline import GPUS, MODELS  # noqa: E402
from tlt.simulation.sweep import Assumptions, Sweep  # noqa: E402
from tlt.simulation.validation import Validation, validate  # noqa: E402


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="prefix of the .json, .md and .png written")
    found.add_argument("--json", type=Path, metavar="FILE", help="where the rows go (default: PREFIX.json)")
    modes = found.add_mutually_exclusive_group()
    modes.add_argument("--validate", type=Path, metavar="RUN", help="folder of a run with --rollout-save-interval 1")
    modes.add_argument("--paper", action="store_true", help="TLT's scaling from 1 to 8 nodes")

    costs = found.add_argument_group("costs of a replica")
    costs.add_argument("--recording", type=Path, metavar="FILE", help="measured steps and drafters")
    costs.add_argument("--checkpoint", type=Path, metavar="DIR", help="of a run, with speculation.json: measured")
    costs.add_argument("--gpu", choices=[*GPUS], default="H100", help="default: H100")
    costs.add_argument("--model", choices=[*MODELS], default="7B", help="default: 7B")
    costs.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of a replica (default: 1)")
    costs.add_argument("--stands", type=float, nargs="+", default=[0.8, 0.78, 0.75, 0.72], metavar="P",
                       help="assumed: a head's token stands where those before it do, by depth")  # fmt: skip
    costs.add_argument("--suffix", type=float, nargs=2, default=[0.3, 0.7], metavar=("SHARE", "P"), help="assumed: "
                       "share of requests with a suffix draft, and how often its tokens stand")  # fmt: skip
    costs.add_argument("--rollout-share", type=float, help="of a plain iteration; the rest follows from it (default: "
                       "the update by the GPU's roofline; without a GPU 0.85)")  # fmt: skip
    costs.add_argument("--other-s", type=float, default=10.0, help="assumed: weight sync, waiting for rewards, data "
                       "(default: 10 s; not with --rollout-share)")  # fmt: skip

    work = found.add_argument_group("workload")
    work.add_argument("--lengths", default="lognormal:792:1.16", help="distribution (constant:N, lognormal:MEDIAN:"
                      "SIGMA, pareto:SHORTEST:ALPHA), JSON file or run (default: lognormal:792:1.16)")  # fmt: skip
    work.add_argument("--icc", type=float, default=0.57, help="likeness of a group's lengths (default: 0.57)")
    work.add_argument("--known-prompts", action="store_true", help="prompts come again: the history knows them")
    work.add_argument("--prompt-tokens", type=int, default=200, help="default: 200")

    several = found.add_argument_group("swept")
    several.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 256, 1024], help="default: 8 64 256 1024")
    several.add_argument("--requests", type=int, nargs="+", default=[64], help="a replica's responses (default: 64)")
    several.add_argument("--global-requests", type=int, help="of all replicas, instead: strong scaling")
    several.add_argument("--group-size", type=int, nargs="+", default=[8], help="default: 8")
    several.add_argument("--max-response-tokens", type=int, nargs="+", default=[32_768], help="default: 32768")
    several.add_argument("--strategies", nargs="+", default=["off", "eagle:4", "adaptive:8"], metavar="S",
                         help="as --spec-strategy; `off` is always there")  # fmt: skip
    several.add_argument("--max-running-requests", type=int, nargs="+", default=[0], metavar="N",
                         help="a single strategy is off above; 0: never (default: 0)")  # fmt: skip
    several.add_argument("--consolidation", choices=["off", "on", "known"], nargs="+", default=["off"],
                         help="`known`: decided with the true lengths (default: off)")  # fmt: skip
    several.add_argument("--training", choices=["off", "on"], nargs="+", default=["off"], help="spot training")
    several.add_argument("--idle-threshold", type=float, nargs="+", default=[2.0], metavar="S", help="seconds of the "
                         "shortest tail that is trained in, and of the switch (default: 2)")  # fmt: skip

    run = found.add_argument_group("run")
    run.add_argument("--max-num-seqs", type=int, default=256, help="requests of a replica at a time (default: 256)")
    run.add_argument("--iterations", type=int, default=4, help="of which means are shown (default: 4)")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--update-loss", type=float, default=0.02, help="assumed: share of a head's acceptance that an "
                     "update of the policy takes (default: 0.02)")  # fmt: skip
    run.add_argument("--recovery-rank-s", type=float, default=200.0, help="assumed: rank seconds of training that "
                     "bring back all but 1/e of it (default: 200)")  # fmt: skip
    run.add_argument(
        "--meeting-s", type=float, default=1.0, help="assumed: averaging, judging and loading (default: 1)"
    )
    return found


def check(args: argparse.Namespace) -> None:
    """Raises ValueError naming the flag."""
    for name in ("tp", "max_num_seqs", "iterations", "ranks", "requests", "group_size", "max_response_tokens"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {values}")
    for name in ("max_running_requests", "idle_threshold", "prompt_tokens", "other_s", "meeting_s"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {values}")
    for name in ("stands", "suffix", "icc", "update_loss"):
        values = getattr(args, name)
        if not all(0 <= value <= 1 for value in (values if isinstance(values, list) else [values])):
            raise ValueError(f"--{name.replace('_', '-')} must be in [0, 1], got {values}")
    if args.rollout_share is not None and not 0 < args.rollout_share <= 1:
        raise ValueError(f"--rollout-share must be in (0, 1], got {args.rollout_share}")
    if args.recovery_rank_s <= 0:
        raise ValueError(f"--recovery-rank-s must be above 0, got {args.recovery_rank_s}")
    if any(ranks % args.tp for ranks in args.ranks):
        raise ValueError(f"--ranks must be multiples of --tp {args.tp}, got {args.ranks}")


def read_costs(args: argparse.Namespace) -> Costs:
    """Raises ValueError naming the flag."""
    if args.recording:
        return recorded_costs(args.recording, "--recording")
    if args.checkpoint:
        path = args.checkpoint / "speculation.json"
        if not path.is_file():
            raise ValueError(f"--checkpoint must be a folder with speculation.json, {args.checkpoint} has none")
        return learned_costs(json.loads(path.read_text()), args.checkpoint.name)
    return gpu_costs(args.gpu, args.model, tp_size=args.tp, stands=tuple(args.stands), suffix=tuple(args.suffix))


def assumptions(args: argparse.Namespace) -> Assumptions:
    return Assumptions(
        rollout_share=args.rollout_share, other_s=args.other_s, update_loss=args.update_loss,
        recovery_rank_s=args.recovery_rank_s, meeting_s=args.meeting_s,
    )  # fmt: skip


def sweep_of(args: argparse.Namespace, lengths: Lengths) -> Sweep:
    return Sweep(
        tp_size=args.tp, ranks=args.ranks, requests=args.requests, global_requests=args.global_requests,
        group_sizes=args.group_size, longest=args.max_response_tokens, strategies=args.strategies,
        max_running_requests=args.max_running_requests, consolidation=args.consolidation,
        training=[each == "on" for each in args.training], switch_s=args.idle_threshold, lengths=lengths,
        are_prompts_known=args.known_prompts, num_prompt_tokens=args.prompt_tokens, max_num_seqs=args.max_num_seqs,
        iterations=args.iterations, seed=args.seed, assumptions=assumptions(args),
    )  # fmt: skip


def run_sweep(args: argparse.Namespace, lengths: Lengths) -> None:
    """Rows of all combinations."""
    costs = read_costs(args)
    rows = sweep.rows(sweep_of(args, lengths), costs)
    write(args, rows, sweep.table(rows), costs=costs.name, costs_are=costs.origin)
    picture.draw_sweep(Path(f"{args.out}.png"), rows)


def run_paper(args: argparse.Namespace, lengths: Lengths) -> None:
    """TLT's table; ours is the last of --strategies."""
    ours = paper_table.Ours(
        strategy=args.strategies[-1], stands=tuple(args.stands), suffix=tuple(args.suffix)
    )  # fmt: skip
    rows = paper_table.rows(
        ours, lengths, assumptions(args), gpu=args.gpu, iterations=args.iterations, seed=args.seed,
        num_prompt_tokens=args.prompt_tokens,
    )  # fmt: skip
    write(args, rows, paper_table.table(rows))
    picture.draw_paper(Path(f"{args.out}.png"), rows)


def run_validation(args: argparse.Namespace) -> None:
    """Print and write both times of each iteration."""
    run = read_run(args.validate, "--validate")
    found = validate(run, "--validate")
    text = validation_text(found)
    for number, why in run.left_out.items():
        text += f"\n\nIteration {number} is left out: {why}."
    rows = [
        {
            "iteration": one.number, "rollout_s": one.rollout_s, "predicted_rollout_s": one.predicted_rollout_s,
            "iteration_s": one.iteration_s, "predicted_iteration_s": one.predicted_iteration_s,
            "own_rollout_s": one.own_rollout_s, "drawn_rollout_s": one.drawn_rollout_s,
        } for one in found.comparisons
    ]  # fmt: skip
    names = ("rollout_error", "iteration_error", "own_error", "total_error", "drawn_error")
    errors = {name: getattr(found, name) for name in names}
    write(args, rows, text, strategy=run.strategy, **errors)
    picture.draw_validation(Path(f"{args.out}.png"), found)


def validation_text(found: Validation) -> str:
    """Markdown."""
    lines = [
        "| iteration | rollout s, measured | predicted | error | error with its own step times | "
        "iteration s, measured | predicted | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.number} | {one.rollout_s:.2f} | {one.predicted_rollout_s:.2f} | {100 * one.rollout_error:+.1f} % | "
        f"{100 * one.own_error:+.1f} % | {one.iteration_s:.2f} | {one.predicted_iteration_s:.2f} | "
        f"{100 * one.iteration_error:+.1f} % |"
        for one in found.comparisons
    ]
    return "\n".join([
        *lines, "",
        f"Median of absolute errors: rollout {100 * found.rollout_error:.1f} %, iteration "
        f"{100 * found.iteration_error:.1f} %; {100 * found.own_error:.1f} % where a rollout's own step times are "
        f"known. All rollouts together {100 * found.total_error:+.1f} %; with lengths drawn from the other iterations "
        f"{100 * found.drawn_error:+.1f} %.",
    ])  # fmt: skip


def write(args: argparse.Namespace, rows: list[dict], text: str, **about: object) -> None:
    """Numbers and table to files, the table to the screen too."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "about": {"commit": git_commit(), "arguments": {k: str(v) for k, v in vars(args).items()}, **about},
        "rows": rows,
    }  # fmt: skip
    (args.json or Path(f"{args.out}.json")).write_text(json.dumps(record, indent=1) + "\n")
    Path(f"{args.out}.md").write_text(text + "\n")
    print(text)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    begin_s = time.perf_counter()
    try:
        check(args)
        if args.validate:
            run_validation(args)
            return 0
        lengths = named_lengths(args.lengths, "--lengths", icc=args.icc)
        if args.paper:
            run_paper(args, lengths)
        else:
            run_sweep(args, lengths)
    except ValueError as error:
        print(f"simulate_long_tail.py: error: {error}", file=sys.stderr)
        return 2
    print(f"simulated in {time.perf_counter() - begin_s:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
