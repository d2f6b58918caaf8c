"""Whole RL training with and without speculation, on the same seeds, interleaved: time by phase, learning curves.

tools/bench_e2e.py --hf-model DIR --drafter DIR --out PREFIX [--requests-per-rank 8 32] -- FLAGS OF pretrain_rl.py

A mode is `plain` (no code of speculation: what a trainer with a colocated engine does), a value of --spec-strategy
(`eagle:3` with a frozen head, `suffix:8`, `adaptive:8`), or one followed by `+spot` (idle ranks train the head) and
`+tail` (responses move to idle ranks); `full` is adaptive:8+spot. All modes walk the same policy's path for the same
seed, up to rounding. Runs go in blocks of iterations, one mode after the other, the order rotated from block to block
and from seed to seed; a block goes on from its run's checkpoint. The first iteration of each start is not counted, and
neither are evaluation and checkpoints. Ratios are of pairs: the seconds of plain by those of the mode with the same
seed. Started again with the same --out, finished blocks are not repeated.

Writes PREFIX.md, PREFIX.png, PREFIX.json (or --json FILE), and the runs below PREFIX.runs/.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

from tlt.report.mode_picture import draw  # noqa: E402
from tlt.report.pairs import PLAIN, MeasuredRun, markdown_tables, measure_seed, rows  # noqa: E402
from tlt.report.run import read_run  # noqa: E402
from tools.training_run import last_iteration, run_command  # noqa: E402

NAMED = {PLAIN: "off", "full": "adaptive:8+spot"}
EXTRAS = {
    "spot": ["--spot-training", "on", "--spec-hidden-states-mib", "256"],
    "tail": ["--rollout-consolidate-tail", "on"],
}
MODES = f"{PLAIN},eagle:3,suffix:8,adaptive:8,full"
QUICK = ["--rollout-max-response-tokens", "256", "--eval-num-prompts", "8", "--eval-num-samples", "0"]
COMMAND = "command.json"
RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
Launch = Callable[[Sequence[str], int, Path], None]
"""(flags of pretrain_rl.py, ranks, file that output is appended to); raises RuntimeError where the run fails."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Neighbouring iterations of one run."""

    requests_per_rank: int
    seed: int
    mode: str
    last: int
    """Iteration that it ends with."""

    def folder(self, runs: Path) -> Path:
        """Of its run."""
        return runs / f"{self.requests_per_rank}_a_rank" / f"seed_{self.seed}" / re.sub(r"[^\w.+-]", "_", self.mode)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-model", required=True, metavar="DIR", help="policy to start from")
    parser.add_argument("--drafter", nargs="+", metavar="DIR", help="EAGLE heads, for the modes that need one")
    parser.add_argument("--out", type=Path, required=True, metavar="PREFIX", help="of the files written")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: PREFIX.json")
    parser.add_argument("--modes", default=MODES, help=f"comma-separated (default: {MODES})")
    parser.add_argument("--requests-per-rank", nargs="+", type=int, default=[8], metavar="N",
                        help="of an iteration: prompts x group size / ranks (default: 8)")  # fmt: skip
    parser.add_argument("--group-size", type=int, default=8, help="responses to a prompt (default: 8)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="one run a mode each (default: 1 2 3)")
    parser.add_argument("--iterations", type=int, default=6, help="of a run (default: 6)")
    parser.add_argument("--block", type=int, help="iterations between changes of the mode (default: whole runs)")
    parser.add_argument("--ranks", type=int, default=2, help="one core each (default: 2)")
    parser.add_argument("--quick", action="store_true", help="one seed, 3 iterations, the first of "
                        "--requests-per-rank, responses of at most 256 tokens: shows that it runs")  # fmt: skip
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS",
                        help="flags of pretrain_rl.py; those that the benchmark sets win over them")  # fmt: skip
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.iterations, args.block = args.seeds[:1], 3, None
        args.requests_per_rank = args.requests_per_rank[:1]
        args.flags = [*args.flags, *QUICK]
    args.block = args.block or args.iterations
    args.modes = args.modes.split(",")
    return args


def check(args: argparse.Namespace) -> None:
    """All modes' flags before anything runs. Raises ValueError naming the flag."""
    if not 2 <= args.block <= args.iterations:
        raise ValueError(
            f"--block must be from 2 to --iterations ({args.iterations}): the first iteration of each block is not "
            f"counted, got {args.block}"
        )
    if args.iterations % args.block == 1:
        raise ValueError(
            f"--iterations {args.iterations} leaves a block of 1 behind blocks of {args.block}: it would not count"
        )
    for requests in args.requests_per_rank:
        if requests < 1 or requests * args.ranks % args.group_size:
            raise ValueError(
                f"--requests-per-rank x --ranks must be multiples of --group-size {args.group_size}, got {requests} x "
                f"{args.ranks}"
            )
    from tlt.arguments import parse
    from tlt.config import RunConfig, read_hf_config
    from tlt.config import check as check_config
    from tlt.spec.policy import parse_policy

    hf_config = read_hf_config(args.hf_model)
    for block in first_blocks(args):
        config = parse(flags(args, block), "", RunConfig)
        parse_policy(config.spec.strategy, "--modes")
        check_config(config, world_size=args.ranks, ranks_per_node=args.ranks, hf_config=hf_config)


def first_blocks(args: argparse.Namespace) -> list[Block]:
    """Of each number of requests and mode one."""
    return [
        Block(requests_per_rank=requests, seed=args.seeds[0], mode=mode, last=args.block)
        for requests in args.requests_per_rank
        for mode in args.modes
    ]


def plan(args: argparse.Namespace, seed: int) -> list[Block]:
    """A seed's blocks in the order in which they run: block by block, the modes in turn, another first each time."""
    blocks = []
    for requests in args.requests_per_rank:
        for index, last in enumerate([*range(args.block, args.iterations, args.block), args.iterations]):
            shift = (args.seeds.index(seed) + index) % len(args.modes)
            blocks += [
                Block(requests_per_rank=requests, seed=seed, mode=mode, last=last)
                for mode in args.modes[shift:] + args.modes[:shift]
            ]
    return blocks


def mode_flags(mode: str, drafter: Sequence[str] | None) -> list[str]:
    """What a mode adds. Raises ValueError naming --modes or --drafter."""
    strategy, *extras = NAMED.get(mode, mode).split("+")
    result = ["--spec-strategy", strategy]
    if strategy.startswith("adaptive") or "eagle" in strategy:
        if not drafter:
            raise ValueError(f"--modes {mode} needs --drafter DIR")
        result += ["--spec-drafter", *drafter]
    for extra in extras:
        if extra not in EXTRAS:
            raise ValueError(f"--modes {mode}: what follows + must be one of {', '.join(EXTRAS)}, got {extra!r}")
        result += EXTRAS[extra]
    return result


def flags(args: argparse.Namespace, block: Block) -> list[str]:
    """Of pretrain_rl.py."""
    folder = str(block.folder(runs_folder(args)))
    return [
        *args.flags, "--hf-model", args.hf_model, "--save", folder, "--load", folder, "--seed", str(block.seed),
        "--train-iters", str(block.last), "--save-interval", "0", "--save-retain", "1", "--eval-interval",
        str(args.block), "--rollout-save-interval", "0", "--rl-group-size", str(args.group_size),
        "--rl-prompts-per-iteration", str(block.requests_per_rank * args.ranks // args.group_size),
        *mode_flags(block.mode, args.drafter),
    ]  # fmt: skip


def runs_folder(args: argparse.Namespace) -> Path:
    return Path(f"{args.out}.runs")


def torchrun(flags: Sequence[str], ranks: int, log: Path) -> None:
    """As examples/reasoner_cpu/run.sh starts it: one core a rank."""
    environment = {name: value for name, value in os.environ.items() if name not in RENDEZVOUS}
    with log.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            [*run_command(ranks), *flags], stdout=file, stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip
        try:
            status = process.wait()
        finally:  # a benchmark that is stopped leaves no run behind
            if process.poll() is None:
                process.terminate()
                process.wait()
    if status:
        lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("pretrain_rl.py: error:")] or lines[-15:]
        raise RuntimeError(f"a run ended with status {status}, its output is in {log}:\n" + "\n".join(errors))


def is_done(block: Block, runs: Path) -> bool:
    """Its run completed its last iteration."""
    return last_iteration(block.folder(runs)) >= block.last


def run_block(args: argparse.Namespace, block: Block, launch: Launch) -> None:
    """Run it unless it is done. Raises ValueError where its folder holds a run with other flags."""
    runs = runs_folder(args)
    folder, command = block.folder(runs), flags(args, block)
    told = folder / COMMAND
    lasting = without(command, "--train-iters")  # grows from block to block
    if told.is_file() and json.loads(told.read_text()) != lasting:
        raise ValueError(f"--out {args.out}: {folder} holds a run with other flags ({told}); name another prefix")
    if not is_done(block, runs):
        folder.mkdir(parents=True, exist_ok=True)
        told.write_text(json.dumps(lasting) + "\n")
        print(f"{folder}: up to iteration {block.last}", file=sys.stderr, flush=True)
        launch(command, args.ranks, folder / "output.log")
        if not is_done(block, runs):
            raise RuntimeError(f"{folder}: the run was stopped before iteration {block.last}; start again to go on")
    if block.last == args.iterations:  # only what is measured stays: checkpoints are large
        for checkpoint in folder.glob("iter_*"):
            shutil.rmtree(checkpoint)


def without(command: Sequence[str], *names: str) -> list[str]:
    """Flags without those and their one value."""
    return [
        each for index, each in enumerate(command)
        if each not in names and (index == 0 or command[index - 1] not in names)
    ]  # fmt: skip


def measured(args: argparse.Namespace) -> list[MeasuredRun]:
    """Of all runs that are complete, in the order of --requests-per-rank, --modes and --seeds."""
    found = {}
    for requests in args.requests_per_rank:
        for seed in args.seeds:
            blocks = [Block(requests_per_rank=requests, seed=seed, mode=m, last=args.iterations) for m in args.modes]
            found |= {
                (requests, args.modes.index(run.mode), seed): run
                for run in measure_seed(
                    {b.mode: read_run(b.folder(runs_folder(args))) for b in blocks if is_done(b, runs_folder(args))},
                    requests_per_rank=requests, seed=seed,
                )
            }  # fmt: skip
    return [found[key] for key in sorted(found)]


def write(args: argparse.Namespace, found: Sequence[MeasuredRun]) -> str:
    """Tables, rows and picture; the tables are returned."""
    from tlt.provenance import measured_on

    starts = [
        start for path in runs_folder(args).rglob("run.json") for start in json.loads(path.read_text())["starts"]
    ]
    about = measured_on() | {
        "commits": sorted({start["commit"] for start in starts}),
        "ranks": args.ranks,
        "seeds": args.seeds,
        "iterations": args.iterations,
        "block": args.block,
        "counted": sorted({each for run in found for each in run.counted}),
        "modes": {mode: NAMED.get(mode, mode) for mode in args.modes},
        "flags": args.flags,
    }
    table = rows(found)
    curves = [
        {"requests_per_rank": run.requests_per_rank, "mode": run.mode, "seed": run.seed, **run.curves}
        for run in found
    ]  # fmt: skip
    path = args.json or Path(f"{args.out}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "rows": table, "curves": curves}, indent=1) + "\n")
    hardware = ", ".join([*about["gpus"], f"{about['cpus']} cores {about['processor']}"])
    head = (
        f"Commit {', '.join(about['commits'])}; {hardware}; {args.ranks} ranks; seeds "
        f"{', '.join(map(str, args.seeds))}; {args.iterations} iterations a run in blocks of {args.block}, the first "
        f"of each not counted.\n\n    {' '.join(about['command'])}"
    )
    text = f"{head}\n\n{markdown_tables(table)}\n"
    Path(f"{args.out}.md").write_text(text)
    draw(found, Path(f"{args.out}.png"), title="RL training end to end")
    return text


def main(argv: Sequence[str] | None = None, launch: Launch = torchrun) -> int:
    args = arguments(argv)
    text = ""
    try:
        check(args)
        for seed in args.seeds:
            for block in plan(args, seed):
                run_block(args, block, launch)
            text = write(args, measured(args))  # what is there if the benchmark is stopped
        print(text)
    except (ValueError, RuntimeError) as error:
        print(f"bench_e2e.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
