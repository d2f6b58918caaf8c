"""What training in the tail costs a rollout: off, on, and beside a bystander that owes the rollout nothing.

torchrun --nproc_per_node 2 tools/bench_spot.py <flags of pretrain_rl.py with --spot-training on> --repetitions 12

The components are those of a run with these flags; the policy is not updated. Each repetition rolls out other prompts,
the same ones with the same seeds in each mode, in an order that rotates; all modes write the tokens of the first one.
`off`: idle ranks wait, no hidden state is kept. `on`: idle ranks train, ranks meet, average and judge. `bystander`: a
process of its own on the idle rank's core trains the same head on the same kind of samples until the rollout's end,
and neither is asked nor waited for: what the rollout loses to it, it loses to the machine's shared memory and cores.
`turns`: in one and the same tail the idle rank trains, lets its bystander train, and rests, a second or so each; the
engine steps of decoding ranks in neighbouring turns are compared. It trains a head of its own.
The head that drafts stays the same in all modes, so that what training gains is not mixed in: weights are judged and
then not loaded.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.replay_text import Replay  # noqa: E402

MODES = ("off", "on", "bystander", "turns")
TURNS = ("rests", "trains", "bystander")
TURN_S = 1.2
"""Of each; some engine steps and optimizer micro-steps."""
WARM_UP = 2
"""Repetitions before those that count: kernels compile, prices and lengths become known."""
LOOK_S = 0.02
"""Seconds between two looks at the board of a rank that waits beside its bystander."""


def own_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(of this tool, those of pretrain_rl.py)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--repetitions", type=int, default=12, help=f"default: 12; {WARM_UP} more go uncounted")
    parser.add_argument("--modes", default=",".join(MODES), help=f"comma-separated, off first (default: {MODES})")
    parser.add_argument("--json", type=Path, help="file to write")
    return parser.parse_known_args(argv)


class Bystander:
    """Tail work that hands this rank's core to another process until the world's rollout ends."""

    def __init__(self, board, learner_state: dict):
        context = multiprocessing.get_context("spawn")
        self.board = board
        self.go, self.has_loaded, self.is_resting = (context.Event() for _ in range(3))
        self.inbox = context.Queue()
        self.process = context.Process(
            target=train_along, daemon=True,
            args=(learner_state, self.inbox, self.go, self.has_loaded, self.is_resting),
        )  # fmt: skip
        self.process.start()

    def prepare(self, samples: list) -> None:
        """Train on these from now on; returns once the process has them, so that handing them over is not timed.
        RuntimeError where it died."""
        import torch

        # Plain bytes: tensors in a queue would keep an open file each.
        content = BytesIO()
        torch.save([vars(sample) for sample in samples], content)
        self.has_loaded.clear()
        self.inbox.put(content.getvalue())
        self.wait_for(self.has_loaded, "it had its samples")

    def wait_for(self, event, what: str) -> None:
        """RuntimeError where the process dies first."""
        while not event.wait(timeout=1.0):
            if not self.process.is_alive():
                raise RuntimeError(f"the bystander's process ended before {what}")

    def begin(self) -> None:
        self.board.begin()

    def use_tail(self):
        from tlt.types import TailReport

        self.board.ended()
        self.go.set()
        while not self.board.all_ended():
            time.sleep(LOOK_S)
        self.go.clear()
        return TailReport()

    def publish(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.inbox.put(None)
        self.process.join()


class Turns:
    """Tail work that takes turns: `TURNS` one after another, in an order that rotates, until all have ended."""

    def __init__(self, spot, learner, bystander: Bystander):
        self.spot, self.learner, self.bystander = spot, learner, bystander
        self.windows: list[tuple[str, float, float]] = []
        """Of the present rollout: what was done, wall-clock seconds from and to."""
        self.num_begun = 0

    def begin(self) -> None:
        self.windows = []
        self.spot.board.begin()

    def use_tail(self):
        from tlt.types import TailReport

        board = self.spot.board
        board.ended()
        samples = self.spot.engine.training_samples(seed=0)
        while not board.all_ended():
            turn = TURNS[(self.num_begun + self.num_begun // len(TURNS)) % len(TURNS)]
            self.num_begun += 1
            begin_s = time.time()

            def is_over(begin_s=begin_s) -> bool:
                return time.time() - begin_s > TURN_S or board.all_ended()

            if turn == "trains":
                self.learner.train(samples, should_stop=is_over, on_step=lambda: None)
            else:
                if turn == "bystander":
                    self.bystander.go.set()
                while not is_over():
                    time.sleep(LOOK_S)
                self.bystander.go.clear()
                self.bystander.wait_for(self.bystander.is_resting, "it was done")
            self.windows.append((turn, begin_s, time.time()))
        return TailReport()

    def publish(self) -> dict[str, float]:
        return {}


def turn_steps(windows: list[tuple[str, float, float]], stats) -> list[tuple[str, int, float]]:
    """(what another rank did, number, mean seconds) of a rank's engine steps that lie within one turn, for each turn
    that has any, in their order; the first and the last turn are cut by the rollout and left out."""
    found = []
    for turn, begin_s, end_s in windows[1:-1]:
        inside = [
            seconds for own_s, seconds in zip(stats.step_begin_s, stats.step_s, strict=True)
            if begin_s <= own_s and own_s + seconds <= end_s
        ]  # fmt: skip
        if inside:
            found.append((turn, len(inside), statistics.fmean(inside)))
    return found


def turn_ratios(turns: list[tuple[str, int, float]], turn: str, other: str) -> list[float]:
    """Seconds of a step in each turn of one kind over those in the turns of another kind around it, at most one of the
    third kind between them."""
    ratios = []
    for index, (own, _, seconds) in enumerate(turns):
        around = [*turns[max(index - 2, 0) : index], *turns[index + 1 : index + 3]]
        near = [other_seconds for kind, _, other_seconds in around if kind == other]
        if own == turn and near:
            ratios.append(seconds / statistics.fmean(near))
    return ratios


def train_along(learner_state: dict, inbox, go, has_loaded, is_resting) -> None:
    """A process that trains while `go` is set, on what it was last given; sets `has_loaded` when it has that, and
    `is_resting` while it does not train."""
    import torch

    torch.set_num_threads(1)
    from tlt.drafter.learner import HeadLearner
    from tlt.types import HiddenStateSample

    target = learner_state.pop("target")
    learner = HeadLearner(**learner_state, target=lambda: target)
    samples: list = []
    is_resting.set()
    while True:
        while not inbox.empty():
            message = inbox.get()
            if message is None:
                return
            samples = [HiddenStateSample(**fields) for fields in torch.load(BytesIO(message), weights_only=True)]
            has_loaded.set()
        if samples and go.wait(timeout=LOOK_S):
            is_resting.clear()
            learner.train(samples, should_stop=lambda: not go.is_set(), on_step=lambda: None)
            is_resting.set()
        else:
            time.sleep(LOOK_S)


def prepare_bench(run) -> dict:
    """Tail work by mode, of a run built with training on: always due, and its head drafts on as it is."""
    import copy

    from tlt.drafter.learner import HeadLearner
    from tlt.spot.opportunity import GainRecord
    from tlt.spot.training import NoSpotTraining

    class AlwaysDue(GainRecord):
        def is_due(self, policy_version: int) -> bool:
            return True

    spot, engine, config = run.rollouts.tail, run.rollout_engine, run.config
    spot.gains = AlwaysDue(min_gain_frac=config.spot.min_gain)
    trainer = spot.learner.trainer
    state = {
        "head": copy.deepcopy(trainer.head), "config": trainer.config, "seed": trainer.seed,
        "temperature": spot.learner.temperature,
        "target": tuple(tensor.detach().clone() for tensor in spot.learner.target()),
    }  # fmt: skip
    bystander = Bystander(spot.board, state)
    engine.load_drafter = lambda tensors, *, drafter_version: None
    learner = HeadLearner(**state | {"head": copy.deepcopy(trainer.head), "target": spot.learner.target})
    return {"off": NoSpotTraining(), "on": spot, "bystander": bystander, "turns": Turns(spot, learner, bystander)}


class Buffers:
    """The engine's buffer of hidden states, open only where a mode trains on it."""

    def __init__(self, speculation):
        from tlt.drafter.buffer import HiddenStateBuffer

        self.speculation = speculation
        self.open, self.closed = speculation.buffer, HiddenStateBuffer(0)

    def set(self, *, is_open: bool) -> None:
        self.speculation.buffer = self.open if is_open else self.closed


def measure(run, args) -> dict[str, list[dict]]:
    """Records of each mode's counted rollouts, equal on all ranks but for the clock."""
    import torch.distributed as dist

    from tlt.drafter.history import SuffixHistory
    from tlt.rollout.outlook import NoOutlook
    from tlt.types import rollout_name

    modes = args.modes.split(",")
    tails, buffers, replay = prepare_bench(run), Buffers(run.rollout_engine.speculation), Replay(run.rollout_engine)
    outlook = run.rollout_engine.outlook
    found: dict[str, list[dict]] = {mode: [] for mode in modes}
    for repetition in range(-WARM_UP, args.repetitions):
        prompts = run.prompts.next_batch(run.config.rl.prompts_per_iteration)
        replay.texts = {}
        for index in range(len(modes)):
            mode = modes[(index + repetition) % len(modes)]
            run.rollouts.tail = tails[mode]
            run.rollout_engine.outlook = outlook if mode == "on" else NoOutlook()
            buffers.set(is_open=mode != "off")
            if mode in ("bystander", "turns"):
                tails["bystander"].prepare(run.rollout_engine.training_samples(seed=repetition))
            # Lengths become known in the warm-up; after it no mode's texts help the next one's.
            is_remembered = repetition < 0 and index == len(modes) - 1
            run.rollouts.history = run.rollout_engine.history if is_remembered else SuffixHistory(0)
            dist.barrier()
            begin_s = time.perf_counter()
            groups, metrics = run.rollouts.collect(
                prompts, run.sampling, group_size=run.config.rl.group_size, seed=1000 + repetition
            )
            seconds = time.perf_counter() - begin_s
            if not replay.texts:
                replay.texts = {
                    rollout_name(group.prompt.prompt_id, number): rollout.token_ids
                    for group in groups
                    for number, rollout in enumerate(group.rollouts)
                }
            counts = replay.take_counts()
            if run.parallel.rank == 0:
                print(f"repetition {repetition} {mode}: {seconds:.2f} s", file=sys.stderr, flush=True)
            stats = run.rollout_engine.stats()
            windows = run.parallel.all_gather_objects(tails["turns"].windows if mode == "turns" else [])
            turns = [turn_steps(each, stats) for rank, each in enumerate(windows) if rank != run.parallel.rank]
            turns = [each for rank in run.parallel.all_gather_objects(turns) for each in rank if each]
            if repetition >= 0:
                counted = {"seconds": seconds, "num_forced": counts["num_forced"], "turns": turns}
                found[mode].append(metrics | counted)
    tails["bystander"].close()
    return found


def percentile(values: list[float], share: float) -> float:
    import numpy as np

    return float(np.quantile(values, share))


def rows(found: dict[str, list[dict]]) -> list[dict]:
    """One for each mode; ratios are medians of pairs, above 1 is slower."""
    result = []
    for mode, records in found.items():
        row = {"mode": mode, "repetitions": len(records)}
        for key, name in (("seconds", "collect"), ("rollout/duration_s", "rollout")):
            times = [record[key] for record in records]
            row[f"{name}_median_s"] = statistics.median(times)
            for other in ("off", "bystander"):
                ratios = [time_s / base[key] for time_s, base in zip(times, found.get(other, ()), strict=False)]
                if ratios and other != mode:
                    row[f"{name}_vs_{other}"] = statistics.median(ratios)
                    row[f"{name}_vs_{other}_of_sums"] = sum(times) / sum(one[key] for one in found[other])
                    row[f"{name}_vs_{other}_min_max"] = [min(ratios), max(ratios)]
        row["idle_frac"] = statistics.median(record["rollout/idle_frac"] for record in records)
        row["acceptance_length"] = statistics.median(record["spec/acceptance_length"] for record in records)
        trained = [record for record in records if record.get("spot/steps", 0) > 0]
        if trained:
            row["trained"] = len(trained)
            # Shares of rank time; all rollouts have the same number of ranks.
            idle_s = [one["rollout/idle_frac"] * one["rollout/duration_s"] for one in records]
            used_s = [
                one.get("spot/idle_rank_s_used_frac", 0.0) * each for one, each in zip(records, idle_s, strict=True)
            ]  # fmt: skip
            row["idle_used_frac_of_sums"] = sum(used_s) / sum(idle_s)
            # Also where all ended before the first optimizer step.
            late_ms = [1e3 * one["spot/preemption_s_max"] for one in records if "spot/preemption_s_max" in one]
            row |= {"preemption_p50_ms": percentile(late_ms, 0.5), "preemption_p99_ms": percentile(late_ms, 0.99)}
        for turn, other in (("trains", "bystander"), ("trains", "rests"), ("bystander", "rests")):
            tails = [turns for record in records for turns in record.get("turns", ())]
            ratios = [ratio for turns in tails for ratio in turn_ratios(turns, turn, other)]
            if ratios:
                row[f"step_{turn}_vs_{other}"] = statistics.median(ratios)
                row[f"step_{turn}_vs_{other}_quartiles"] = [percentile(ratios, 0.25), percentile(ratios, 0.75)]
                row[f"step_{turn}_vs_{other}_turns"] = len(ratios)
        result.append(row)
    return result


def table(all_rows: list[dict]) -> str:
    """Markdown, a line for each figure and a column for each mode."""
    names = list(dict.fromkeys(name for row in all_rows for name in row if name != "mode"))
    lines = ["| | " + " | ".join(row["mode"] for row in all_rows) + " |", "|---" * (len(all_rows) + 1) + "|"]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(shown(row.get(name, "-")) for row in all_rows) + " |")
    return "\n".join(lines)


def shown(value: object) -> str:
    """A number with three digits, a range by its ends."""
    if isinstance(value, list):
        return " to ".join(map(shown, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(argv: list[str]) -> int:
    args, rest = own_arguments(argv)
    from tlt.config import RunConfig
    from tlt.launch import prepare, ranks_per_node

    def read_inputs(config: RunConfig, world_size: int):
        modes = args.modes.split(",")
        if not set(modes) <= set(MODES):
            raise ValueError(f"--modes must be some of {MODES}, got {args.modes!r}")
        if config.spot.training != "on":
            raise ValueError("--spot-training must be on, got off: it is what is measured")
        from tlt.rollout.vllm.engine import set_engine_environment

        set_engine_environment(config.rollout)
        from tlt.build import Inputs

        return Inputs(config, world_size=world_size, ranks_per_node=ranks_per_node(world_size))

    prepared = prepare(
        rest, program="tools/bench_spot.py", description=__doc__, config_class=RunConfig, read_inputs=read_inputs
    )
    if isinstance(prepared, int):
        return prepared
    from tlt.build import build, close
    from tlt.provenance import measured_on

    run = build(*prepared)
    with run.heartbeat:
        run.weight_sync.push(policy_version=0)
        found = measure(run, args)
    if run.parallel.rank == 0:
        result = rows(found)
        print(table(result))
        if args.json:
            about = measured_on() | {"command": argv, "ranks": run.parallel.world_size}
            args.json.write_text(json.dumps({"about": about, "rows": result, "records": found}, indent=1) + "\n")
    close(run)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
