"""A first look at a rollout engine on a GPU: graphs, times of steps by batch and strategy, sleep, wake, weight loads.

look.py --model HF --drafter HEAD --json FILE [--sleep]

--sleep ends with status 1 where the text is another one after sleep, wake and load.
One process and one engine, some seconds a strategy. Strategies of a batch draw with the same numbers, so `same` counts
responses that are those of the first strategy, token for token; in bf16 a near tie may part two.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

BEGIN_S = time.time()
QUESTION = "State the final answer to the following arithmetic problem: {} =\n"


def say(*what) -> None:
    print(f"[{time.time() - BEGIN_S:6.1f}]", *what, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--strategies", default="off,eagle:4,eagle:6,adaptive:8")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--sleep", action="store_true", help="free all memory, load weights and compare text")
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


def prompts(tokenizer, count: int, *, terms: int, seed: int) -> list:
    from tlt.types import Prompt

    random = Random(seed)
    texts = []
    for _ in range(count):
        numbers = [str(random.randint(1, 9)) for _ in range(terms)]
        texts.append(QUESTION.format(numbers[0] + "".join(random.choice((" + ", " - ")) + n for n in numbers[1:])))
    return [
        Prompt(
            prompt_id=f"{seed}/{index}", source="look", text="", answer={}, token_ids=tuple(tokenizer(text).input_ids)
        )
        for index, text in enumerate(texts)
    ]  # fmt: skip


class Look:
    """One engine and what is asked of it."""

    def __init__(self, args: argparse.Namespace):
        import torch
        from transformers import AutoTokenizer

        from tlt.config import RolloutConfig, SpecConfig, read_hf_config
        from tlt.data.tokenizer import stop_token_ids
        from tlt.rollout.vllm.speculation import read_spec_plan
        from tools.lone_engine import make_engine, start_ranks

        start_ranks()
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        hf_config = read_hf_config(args.model)
        longest = max((int(one.split(":")[1]) for one in args.strategies.split(",") if ":" in one), default=4)
        plan = read_spec_plan(
            SpecConfig(strategy=f"adaptive:{longest}", drafter=(args.drafter,)), target_config=hf_config,
            dtype=torch.bfloat16, tp_size=1,
        )  # fmt: skip
        rollout = RolloutConfig(
            max_model_len=1024, max_response_tokens=args.max_tokens, max_num_seqs=max(args.batches),
            num_gpu_blocks_override=8192, gpu_memory_utilization=0.3,
        )  # fmt: skip
        self.engine = make_engine(
            rollout, hf_model=args.model, dtype="bfloat16", plan=plan, decode=self.tokenizer.decode,
            stop_token_ids=stop_token_ids(Path(args.model), hf_config, self.tokenizer),
        )  # fmt: skip
        self.graphs: dict[str, int] = {}
        dispatcher = self.engine.runner.cudagraph_dispatcher
        dispatch = dispatcher.dispatch

        def counted(*args, **kwargs):
            found = dispatch(*args, **kwargs)
            self.graphs[found[0].name] = self.graphs.get(found[0].name, 0) + 1
            return found

        dispatcher.dispatch = counted

    def run(self, strategy: str, batch: int, *, temperature: float, seed: int, terms: int = 24) -> tuple[list, dict]:
        """(responses, row of the table)."""
        from tlt.spec.policy import parse_policy
        from tlt.types import SamplingConfig

        self.engine.speculation.policy, _ = parse_policy(strategy, "--strategies")
        self.graphs.clear()
        asked = prompts(self.tokenizer, max(1, batch // 8), terms=terms, seed=batch)
        sampling = SamplingConfig(temperature=temperature, max_response_tokens=self.args.max_tokens)
        begin_s = time.perf_counter()
        groups = self.engine.generate(
            asked, sampling, group_size=min(8, batch), seed=seed, on_finished=lambda *_: None
        )  # fmt: skip
        seconds, stats = time.perf_counter() - begin_s, self.engine.stats()
        texts = [rollout.token_ids for group in groups for rollout in group.rollouts]
        return texts, {
            "batch": batch, "temperature": temperature, "strategy": strategy, "seconds": seconds,
            "tokens": sum(map(len, texts)), "longest": max(map(len, texts)), "steps": stats.num_engine_steps,
            "ms_per_step": 1e3 * seconds / stats.num_engine_steps,
            "ms_per_token_of_the_longest": 1e3 * seconds / max(map(len, texts)),
            "acceptance": {
                name: {"length": 1 + sum(one.accepted) / one.num_drafts, "draft_s": one.draft_s}
                for name, one in stats.acceptance.items() if one.num_drafts
            },
            "plan_s": stats.plan_s, "graphs": dict(self.graphs),
        }  # fmt: skip

    def load(self) -> dict:
        """Sleep, wake and load the weights again, three times, each load read back: seconds, and how many responses
        are those of before: greedy ones with a fixed strategy, and prompts that are computed anew both times."""
        import torch
        from safetensors.torch import load_file

        files = sorted(Path(self.args.model).glob("*.safetensors"))
        weights = {name: one.cuda() for path in files for name, one in load_file(path).items()}
        num_bytes = sum(one.numel() * one.element_size() for one in weights.values())
        self.engine.engine.reset_prefix_cache()  # as loading weights does: another batch shape may part a near tie
        before, _ = self.run("eagle:4", 8, temperature=0.0, seed=5)
        found: dict = {"bytes": num_bytes, "load_s": []}
        for name, step in (("sleep", self.engine.sleep), ("wake", self.engine.wake)):
            begin_s = time.perf_counter()
            step()
            found[f"{name}_s"] = time.perf_counter() - begin_s
            say(f"{name}: {found[f'{name}_s']:.3f} s, GPU memory free {torch.cuda.mem_get_info()[0]}")
        for version in range(3):
            torch.cuda.synchronize()
            begin_s = time.perf_counter()
            self.engine.load_weights(weights.items(), policy_version=version)
            torch.cuda.synchronize()
            found["load_s"].append(time.perf_counter() - begin_s)
            say(f"load_weights: {found['load_s'][-1]:.3f} s for {num_bytes} bytes")
        after, _ = self.run("eagle:4", 8, temperature=0.0, seed=5)
        found |= {"responses": len(before), "same": sum(a == b for a, b in zip(before, after, strict=True))}
        say("same text after sleep:", found["same"], "of", found["responses"])
        return found


def main() -> int:
    from tlt.rollout.vllm.graph_check import check_graphs

    args = arguments()
    look = Look(args)
    compilation = look.engine.runner.compilation_config
    say("engine:", compilation.cudagraph_mode, compilation.cudagraph_capture_sizes)
    check_graphs(look.engine, seed=1)
    for strategy in args.strategies.split(","):
        look.run(strategy, 8, temperature=1.0, seed=5, terms=12)  # compiles and captures
    rows = []
    for batch in args.batches:
        for temperature in (0.0, 1.0):
            first: list = []
            for strategy in args.strategies.split(","):
                texts, row = look.run(strategy, batch, temperature=temperature, seed=7)
                first = first or texts
                rows.append(row | {"same": sum(a == b for a, b in zip(texts, first, strict=True))})
                say(json.dumps(rows[-1]))
    sleep = look.load() if args.sleep else None
    args.json.write_text(json.dumps({"rows": rows, "sleep": sleep}, indent=1) + "\n")
    if sleep is not None and sleep["same"] != sleep["responses"]:
        counts = f"{sleep['responses'] - sleep['same']} of {sleep['responses']}"
        print(f"look.py: error: {counts} responses differ after sleep, wake and load", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
