"""Speed of whole rollouts under several strategies of speculation, paired and interleaved, against plain vLLM.

tools/bench_rollout.py --model DIR --sources 'reasoning-gym:...' --strategies plain,off,eagle:4 --drafter DIR

`plain` is an engine without any code of speculation, `off` one that could speculate and does not, `stock-eagle:4` and
`stock-ngram:4` are vLLM's own speculation. Each repetition rolls out other prompts, the same ones with the same seeds
under each strategy, in an order that rotates; ratios are of one repetition's times, and the table has their medians.
Every strategy but sampled drafts gives the tokens of `plain` but for rounding near ties, after which a response may
become several times as long: the first strategy of a repetition writes, the others are made to draw its tokens, so
that all do the same work, and how often they would have drawn another one is reported. Engines live in processes of
their own, `--ranks` for each kind of engine, and one kind runs at a time. A row carries the workload's entropy and
one-hot ceiling: without them it means nothing.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.lone_engine import make_engine  # noqa: E402
from tools.prompt_flags import add_prompt_flags, in_own_names, prompt_builder, prompt_stream  # noqa: E402
from tools.replay_text import Replay  # noqa: E402
from tools.stock_engine import PREFIX, make_stock_engine, stock_config  # noqa: E402

PLAIN = "plain"
SPECULATIVE = "speculative"
LONG = 200
"""Tokens above which a response is reported apart."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What all ranks roll out together in a repetition."""

    name: str
    prompts: tuple
    group_size: int
    temperature: float
    max_tokens: int


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--drafter", nargs="+", metavar="DIR", help="EAGLE heads for the model: eagle, eagle2, ...")
    parser.add_argument("--drafts", default="coupled", choices=("coupled", "one-hot", "sampled", "auto"))
    parser.add_argument("--sources", nargs="+", required=True, metavar="X", help="as --data-train of pretrain_rl.py")
    add_prompt_flags(parser)
    parser.add_argument("--name", default="workload", help="of the workload, for the table")
    parser.add_argument("--strategies", default="plain,off", help="comma-separated (default: plain,off)")
    parser.add_argument("--requests-per-rank", nargs="+", type=int, default=[8], metavar="N", help="default: 8")
    parser.add_argument("--group-size", type=int, default=8, help="responses to a prompt (default: 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--max-tokens", type=int, default=768, help="of a response (default: 768)")
    parser.add_argument("--max-model-len", type=int, default=1024, help="default: 1024")
    parser.add_argument("--ranks", type=int, default=2, help="replicas, one core each (default: 2)")
    parser.add_argument("--repetitions", type=int, default=3, help="default: 3; one more goes uncounted before them")
    parser.add_argument("--quick", action="store_true", help="one repetition of at most 96 tokens: shows that it runs")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write every counted rollout's engine steps, of "
                        "all strategies but plain, for tools/replay_policies.py")  # fmt: skip
    args = parser.parse_args(argv)
    if args.quick:
        args.repetitions, args.max_tokens = 1, min(args.max_tokens, 96)
    return args


def serve(rank: int, args: argparse.Namespace, kind: str, store: str, inbox, outbox) -> None:
    """One rank of one kind of engine: rolls out what it is told to."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(args.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    engine = engine_of(args, kind)
    from tlt.spec.policy import parse_policy
    from tlt.types import SamplingConfig

    policies: dict = {}  # what one learned in a repetition it knows in the next
    replay = Replay(engine)
    steps: list = []
    if args.record and kind == SPECULATIVE:
        engine.speculation.on_step = steps.append
    outbox.put((rank, "ready", None))
    while (task := inbox.get()) is not None:
        strategy, workload, seed, replay.texts = task
        if kind == SPECULATIVE:
            if strategy not in policies:
                policies[strategy], _ = parse_policy(strategy, "--strategies", seed=args.seed)
            engine.speculation.policy = policies[strategy]
        sampling = SamplingConfig(temperature=workload.temperature, max_response_tokens=workload.max_tokens)
        steps.clear()
        begin_s = time.perf_counter()
        groups = engine.generate(
            workload.prompts, sampling, group_size=workload.group_size, seed=seed, on_finished=lambda *_: None
        )
        seconds = time.perf_counter() - begin_s
        outbox.put((rank, seconds, summary(groups, engine.stats()) | replay.take_counts() | {"steps": tuple(steps)}))
    engine.close()


def engine_of(args: argparse.Namespace, kind: str):
    import torch
    from transformers import AutoTokenizer

    from tlt.config import RolloutConfig, SpecConfig, read_hf_config
    from tlt.data.tokenizer import stop_token_ids
    from tlt.rollout.vllm.speculation import read_spec_plan

    hf_config = read_hf_config(args.model)
    rollout = RolloutConfig(
        max_model_len=args.max_model_len, max_response_tokens=args.max_tokens,
        gpu_memory_utilization=0.85 / len(kinds(args)),  # all kinds of engines share the GPU
    )  # fmt: skip
    spec = spec_config(args) if kind == SPECULATIVE else SpecConfig()
    plan = read_spec_plan(spec, target_config=hf_config, dtype=getattr(torch, args.dtype), tp_size=1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    make = partial(
        make_engine, rollout, hf_model=args.model, dtype=args.dtype, plan=plan,
        stop_token_ids=stop_token_ids(Path(args.model), hf_config, tokenizer),
    )  # fmt: skip
    if kind in (PLAIN, SPECULATIVE):
        return make()
    return make_stock_engine(kind, stock_config(kind, args.drafter, "--strategies"), make)


def kind_of(strategy: str) -> str:
    """The engine that runs it: one for `plain`, one for each of vLLM's own, one for all of ours."""
    return strategy if strategy == PLAIN or strategy.startswith(PREFIX) else SPECULATIVE


def kinds(args: argparse.Namespace) -> list[str]:
    return sorted({kind_of(strategy) for strategy in args.strategies.split(",")})


def spec_config(args: argparse.Namespace):
    """Of the engine that all strategies of ours share: room for the longest draft among them."""
    from tlt.config import SpecConfig
    from tlt.spec.policy import parse_policy

    own = [text for text in args.strategies.split(",") if kind_of(text) == SPECULATIVE]
    parsed = [parse_policy(text, "--strategies") for text in own]
    longest = max((policy.max_draft_tokens for policy, _ in parsed), default=0)
    method = "eagle" if args.drafter else "prompt_lookup"
    return SpecConfig(
        strategy=f"{method}:{max(longest, 1)}",
        drafter=tuple(args.drafter) if args.drafter else None,
        drafts=args.drafts,
    )


def summary(groups: list, stats) -> dict:
    """What a repetition's row is made of, from one rank."""
    from tlt.types import rollout_name

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    acceptance = {name: (sum(s.accepted), s.num_drafts, sum(s.drafted)) for name, s in stats.acceptance.items()}
    return {
        "tokens": {rollout_name(g.prompt.prompt_id, i): r.token_ids for g in groups for i, r in enumerate(g.rollouts)},
        "entropy_sum": sum(sum(rollout.entropies) for rollout in rollouts),
        "max_prob_sum": sum(sum(rollout.max_probs) for rollout in rollouts),
        "num_tokens": sum(len(rollout.token_ids) for rollout in rollouts),
        "engine_steps": stats.num_engine_steps,
        "long": long_steps(rollouts),
        "acceptance": acceptance,
        "draft_s": sum(s.draft_s for s in stats.acceptance.values()),
    }


def long_steps(rollouts: list) -> tuple[int, int, int]:
    """(tokens, steps that verified, tokens drafted) of responses over LONG tokens; a step gives one token and what
    stood."""
    found = [one for one in rollouts if len(one.token_ids) > LONG]
    num_tokens = sum(len(one.token_ids) for one in found)
    num_accepted, num_drafted = (
        sum(getattr(one, name) for one in found) for name in ("num_accepted_tokens", "num_draft_tokens")
    )
    return num_tokens, num_tokens - num_accepted, num_drafted


class Ranks:
    """The processes of one kind of engine."""

    def __init__(self, args: argparse.Namespace, kind: str):
        context = multiprocessing.get_context("spawn")
        self.outbox = context.Queue()
        self.inboxes = [context.Queue() for _ in range(args.ranks)]
        store = f"{tempfile.mkdtemp()}/store"
        self.processes = [
            context.Process(target=serve, args=(rank, args, kind, store, inbox, self.outbox), daemon=True)
            for rank, inbox in enumerate(self.inboxes)
        ]
        for process in self.processes:
            process.start()
        self._answers()

    def rollout(self, strategy: str, workload: Workload, seed: int, texts: dict) -> tuple[float, list[dict]]:
        """(seconds until the last rank was done, summaries); `texts` are drawn where they are given."""
        for inbox in self.inboxes:
            inbox.put((strategy, workload, seed, texts))
        answers = self._answers()
        return max(seconds for _, seconds, _ in answers), [found for _, _, found in answers]

    def _answers(self) -> list:
        import queue

        answers = []
        while len(answers) < len(self.processes):
            try:
                answers.append(self.outbox.get(timeout=5))
            except queue.Empty:
                if any(process.exitcode is not None for process in self.processes):
                    raise RuntimeError("a rank of the benchmark died; its error is above") from None
        return answers

    def close(self) -> None:
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join()


def read_workloads(args: argparse.Namespace) -> list[list[Workload]]:
    """For each of --requests-per-rank one for each repetition, of other prompts. Raises ValueError naming the flag."""
    from transformers import AutoTokenizer

    from tlt.config import read_hf_config

    read_hf_config(args.model)
    builder = prompt_builder(args, AutoTokenizer.from_pretrained(args.model))
    workloads = []
    for requests in args.requests_per_rank:
        if requests % args.group_size:
            raise ValueError(
                f"--requests-per-rank must be multiples of --group-size {args.group_size}, got {requests}"
            )
        stream = prompt_stream(args, builder)
        workloads.append(
            [
                Workload(
                    name=f"{args.name}, {requests} a rank", group_size=args.group_size, temperature=args.temperature,
                    max_tokens=args.max_tokens,
                    prompts=tuple(stream.next_batch(args.ranks * requests // args.group_size)),
                )
                for _ in range(args.repetitions + 1)
            ]
        )  # fmt: skip
    return workloads


def measure(
    args: argparse.Namespace, workloads: list[Workload], strategies: list[str], engines: dict
) -> tuple[list, list]:
    """(rows of one workload's repetitions, a strategy each; rollouts where they are recorded). The first repetition is
    not counted."""
    times: dict[str, list[float]] = {strategy: [] for strategy in strategies}
    found: dict[str, list[dict]] = {strategy: [] for strategy in strategies}
    recorded = []
    for repetition, workload in enumerate(workloads):
        order = strategies[repetition % len(strategies) :] + strategies[: repetition % len(strategies)]
        texts: dict[str, tuple[int, ...]] = {}
        for strategy in order:
            ranks = engines[kind_of(strategy)]
            seconds, answers = ranks.rollout(strategy, workload, args.seed + repetition, texts)
            if args.drafts in ("coupled", "one-hot") and not texts:
                texts = {name: ids for one in answers for name, ids in one["tokens"].items()}
            print(f"{workload.name} repetition {repetition} {strategy}: {seconds:.2f} s", file=sys.stderr, flush=True)
            if repetition > 0:
                times[strategy].append(seconds)
                found[strategy] += answers
                recorded += [record(strategy, one) for one in answers if one["steps"]]
    return [row(args, workloads[0], strategy, times, found[strategy]) for strategy in strategies], recorded


def record(strategy: str, found: dict):
    """RecordedRollout of one rank's summary."""
    from tlt.spec.recording import RecordedRollout

    return RecordedRollout(
        policy=strategy, steps=found["steps"], response_tokens=tuple(map(len, found["tokens"].values()))
    )


def row(args: argparse.Namespace, workload: Workload, strategy: str, times: dict, found: list[dict]) -> dict:
    ratios = [a / b for a, b in zip(times[PLAIN], times[strategy], strict=True)] if PLAIN in times else []
    num_tokens = sum(one["num_tokens"] for one in found)
    accepted, drafts, drafted = (
        sum(counts[index] for one in found for counts in one["acceptance"].values()) for index in range(3)
    )
    long_tokens, long_steps, long_drafted = (sum(one["long"][index] for one in found) for index in range(3))
    return {
        "workload": workload.name,
        "requests_per_rank": len(workload.prompts) * workload.group_size // args.ranks,
        "strategy": strategy,
        "median_s": statistics.median(times[strategy]),
        "ratio_vs_plain": statistics.median(ratios) if ratios else None,
        "seconds": times[strategy],
        "ratio_of_sums": sum(times[PLAIN]) / sum(times[strategy]) if ratios else None,
        "ratio_min": min(ratios, default=None),
        "ratio_max": max(ratios, default=None),
        "acceptance_length": 1 + accepted / drafts if drafts else 1.0,
        "long_tokens_per_step": long_tokens / long_steps if long_steps else None,
        "long_drafted_per_step": long_drafted / long_steps if long_steps else None,
        "drafted_per_verification": drafted / drafts if drafts else 0.0,
        "draft_s": sum(one["draft_s"] for one in found),
        "engine_steps": sum(one["engine_steps"] for one in found),
        "by_drafter": {
            name: {
                total: sum(one["acceptance"].get(name, (0, 0, 0))[index] for one in found)
                for index, total in enumerate(("accepted", "drafts", "drafted"))
            }
            for name in sorted({name for one in found for name in one["acceptance"]})
        },
        "forced_frac": sum(one["num_forced"] for one in found) / max(sum(one["num_drawn"] for one in found), 1),
        "num_tokens": num_tokens,
        "entropy_nats": sum(one["entropy_sum"] for one in found) / num_tokens,
        "one_hot_ceiling": sum(one["max_prob_sum"] for one in found) / num_tokens,
        "temperature": workload.temperature,
    }


def table(rows: list[dict]) -> str:
    """Markdown."""
    columns = {
        "workload": "workload", "strategy": "strategy", "median_s": "median s", "ratio_vs_plain": "x plain",
        "ratio_min": "min", "ratio_max": "max", "ratio_of_sums": "of sums", "acceptance_length": "acceptance length",
        "drafted_per_verification": "drafted", "long_tokens_per_step": f"tokens a step, over {LONG}",
        "long_drafted_per_step": f"drafted a step, over {LONG}", "forced_frac": "forced",
        "entropy_nats": "entropy, nats", "one_hot_ceiling": "E[max p]",
    }  # fmt: skip
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for one in rows:
        cells = (one[name] for name in columns)
        lines.append("| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    args = arguments()
    strategies = args.strategies.split(",")
    try:
        spec_config(args)
        for strategy in strategies:
            if strategy.startswith(PREFIX):
                stock_config(strategy, args.drafter, "--strategies")
        workloads = read_workloads(args)
    except ValueError as error:
        print(f"bench_rollout.py: error: {in_own_names(error)}", file=sys.stderr)
        return 2
    from tlt.provenance import measured_on

    engines = {kind: Ranks(args, kind) for kind in kinds(args)}
    measured = [measure(args, workload, strategies, engines) for workload in workloads]
    rows = [one for rows, _ in measured for one in rows]
    for ranks in engines.values():
        ranks.close()
    print(table(rows))
    if args.record:
        from tlt.spec.recording import write_recording

        write_recording(args.record, (rollout for _, recorded in measured for rollout in recorded))
    if args.json:
        about = measured_on() | {
            "ranks": args.ranks, "dtype": args.dtype, "drafts": args.drafts, "repetitions": args.repetitions,
        }  # fmt: skip
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
