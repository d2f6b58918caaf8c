"""GPU memory of a rollout engine with the CUDA graphs of one strategy.

graph_memory.py --model HF [--drafter HEAD] --strategy X --json FILE [--eager]

One engine with a KV cache of a fixed number of blocks: two of them differ by their graphs, and --eager has none.
Without a GPU the engine is built all the same, and 0 bytes are reported.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--drafter", nargs="*", default=[], help="EAGLE heads, where the strategy needs one")
    parser.add_argument("--strategy", required=True)
    parser.add_argument("--eager", action="store_true", help="without graphs")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--num-blocks", type=int, default=4096, help="of the KV cache")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


def used_bytes() -> int:
    """Of the GPU, by this process and all others, but for what the allocator only holds on to."""
    import torch

    if not torch.cuda.is_available():
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> None:
    args = arguments()
    before = used_bytes()
    import torch
    from lone_engine import make_engine, start_ranks

    from tlt.config import RolloutConfig, SpecConfig, read_hf_config
    from tlt.rollout.vllm.speculation import read_spec_plan
    from tlt.types import Prompt, SamplingConfig

    start_ranks()
    plan = read_spec_plan(
        SpecConfig(strategy=args.strategy, drafter=tuple(args.drafter)), target_config=read_hf_config(args.model),
        dtype=getattr(torch, args.dtype), tp_size=1,
    )  # fmt: skip
    rollout = RolloutConfig(
        max_model_len=256, max_response_tokens=64, max_num_seqs=args.max_num_seqs, enforce_eager=args.eager,
        num_gpu_blocks_override=args.num_blocks,
    )  # fmt: skip
    engine = make_engine(rollout, hf_model=str(args.model), dtype=args.dtype, plan=plan, stop_token_ids=())
    engine.generate(  # a head's graphs are captured with its first draft
        [Prompt(prompt_id="p/0", source="p", token_ids=tuple(range(3, 19)), text="", answer={})],
        SamplingConfig(temperature=0.0, max_response_tokens=32, ignore_eos=True), group_size=1, seed=0,
        on_finished=lambda prompt, sample, rollout: None,
    )  # fmt: skip
    mode = engine.runner.compilation_config.cudagraph_mode
    row = {
        "strategy": args.strategy, "cudagraph_mode": mode.name if mode else "NONE", "used_bytes": used_bytes() - before
    }  # fmt: skip
    args.json.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
