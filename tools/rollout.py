"""Responses to prompts, by the rollout engine alone: JSONL in, JSONL out, with or without lossless speculation.

tools/rollout.py --model DIR --prompts FILE --out FILE [--drafter DIR --spec-strategy eagle:4] [--temperature 1.0]

Each line of the input has `prompt` or `messages`, or `prompt_token_ids`. Each line of the output has `token_ids`,
`logprobs` (of the distribution sampled from), `text`, `finish_reason` and what was drafted for it, in the order of the
input. A summary goes to standard error. Under torchrun each rank is a replica of its own.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.lone_engine import make_engine, start_ranks  # noqa: E402
from tools.prompt_flags import in_own_names  # noqa: E402


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL to read")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--drafter", nargs="+", metavar="DIR", help="EAGLE heads for the model: eagle, eagle2, ...")
    parser.add_argument(
        "--spec-strategy", default="off", metavar="X",
        help="eagle:K, suffix:K, prompt_lookup:K, adaptive:K, schedule@..., beg-mab@..., cost-model@... "
        "(docs/speculation.md), or off (default: off)",
    )  # fmt: skip
    parser.add_argument("--spec-drafts", default="coupled", choices=("coupled", "one-hot", "sampled", "auto"))
    parser.add_argument("--spec-max-running-requests", type=int, metavar="N", help="speculate with at most N running")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1.0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all (default: 0)")
    parser.add_argument("--n", type=int, default=1, help="responses to each prompt (default: 1)")
    parser.add_argument("--seed", type=int, default=1234, help="default: 1234")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a response (default: 256)")
    parser.add_argument("--max-model-len", type=int, help="tokens of prompt and response (default: the model's)")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="requests that run at a time (default: 64)")
    parser.add_argument("--instruction", default="", help="text appended to every prompt")
    parser.add_argument("--chat-template", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")
    parser.add_argument("--engine-args", default="{}", help="JSON of further arguments of vLLM's engine")
    return parser.parse_args(argv)


def check_token_ids(ids: object, where: str, vocabulary: int) -> tuple[int, ...]:
    """Of a line's `prompt_token_ids`. Raises ValueError that begins with `where`."""
    allowed = f'{where}: "prompt_token_ids" must be a list of token ids from 0 to {vocabulary - 1}'
    if not isinstance(ids, list):
        raise ValueError(f"{allowed}, got {ids!r}")
    for one in ids:
        if type(one) is not int or not 0 <= one < vocabulary:
            raise ValueError(f"{allowed}, got {one!r}")
    return tuple(ids)


def read_prompts(args: argparse.Namespace, tokenizer, *, max_prompt_tokens: int, vocabulary: int) -> list:
    """Raises ValueError naming file and line."""
    from tlt.config import DataConfig
    from tlt.data.jsonl import numbered_lines, parse_object
    from tlt.data.prompts import PromptBuilder
    from tlt.data.source import unanswered
    from tlt.types import Prompt

    if not args.prompts.is_file():
        raise ValueError(f"--prompts must be a JSONL file, got {args.prompts}")
    data = DataConfig(train=("prompts",), instruction=args.instruction, chat_template=args.chat_template)
    builder = PromptBuilder(data, tokenizer=tokenizer, max_prompt_tokens=max_prompt_tokens)
    prompts = []
    for number, line in numbered_lines(args.prompts):
        where = f"{args.prompts}, line {number}"
        ids = parse_object(line, where).get("prompt_token_ids")
        if ids is not None:
            ids = check_token_ids(ids, where, vocabulary)
            prompts.append(Prompt(prompt_id=where, source="prompts", token_ids=ids, text="", answer={}))
        else:
            prompts.append(builder.build(unanswered(line, where, name=where), "prompts"))
        if not prompts[-1].token_ids or len(prompts[-1].token_ids) > max_prompt_tokens:
            raise ValueError(
                f"{where}: {len(prompts[-1].token_ids)} tokens; 1 to {max_prompt_tokens} fit beside --max-tokens"
            )
    if not prompts:
        raise ValueError(f"--prompts: {args.prompts} holds no prompt")
    return prompts


def build(args: argparse.Namespace):
    """(engine, prompts, SamplingConfig). Raises ValueError naming the flag before anything is loaded."""
    import torch
    from transformers import AutoTokenizer

    from tlt.config import RolloutConfig, SpecConfig, read_hf_config, require
    from tlt.data.tokenizer import stop_token_ids
    from tlt.rollout.vllm.speculation import read_spec_plan
    from tlt.types import SamplingConfig

    require(args.n >= 1, "--n", args.n, "at least 1")
    require(args.temperature >= 0, "--temperature", args.temperature, "at least 0")
    hf_config = read_hf_config(args.model)
    rollout = RolloutConfig(
        top_p=args.top_p, top_k=args.top_k, max_response_tokens=args.max_tokens, max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs, engine_args=args.engine_args,
    )  # fmt: skip
    spec = SpecConfig(
        strategy=args.spec_strategy, drafter=tuple(args.drafter) if args.drafter else None, drafts=args.spec_drafts,
        max_running_requests=args.spec_max_running_requests,
    )  # fmt: skip
    plan = read_spec_plan(spec, target_config=hf_config, dtype=getattr(torch, args.dtype), tp_size=1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    context = args.max_model_len or hf_config["max_position_embeddings"]
    require(args.max_tokens < context, "--max-tokens", args.max_tokens, f"below the context of {context} tokens")
    prompts = read_prompts(
        args, tokenizer, max_prompt_tokens=context - args.max_tokens, vocabulary=hf_config["vocab_size"]
    )  # fmt: skip
    start_ranks()
    engine = make_engine(
        rollout, hf_model=args.model, dtype=args.dtype, plan=plan, seed=args.seed, decode=tokenizer.decode,
        stop_token_ids=stop_token_ids(Path(args.model), hf_config, tokenizer),
    )  # fmt: skip
    sampling = SamplingConfig(
        temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_response_tokens=args.max_tokens
    )
    return engine, prompts, sampling


def record(prompt, sample: int, rollout) -> dict:
    return {
        "prompt": prompt.text, "prompt_token_ids": prompt.token_ids, "sample": sample, "text": rollout.text,
        "token_ids": rollout.token_ids, "logprobs": rollout.logprobs, "finish_reason": rollout.finish_reason,
        "drafter": {
            "version": rollout.drafter_version, "num_drafts": rollout.num_drafts,
            "num_draft_tokens": rollout.num_draft_tokens, "num_accepted_tokens": rollout.num_accepted_tokens,
        },
    }  # fmt: skip


def main() -> int:
    args = arguments()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        engine, prompts, sampling = build(args)
    except ValueError as error:
        print(f"rollout.py: error: {in_own_names(error)}", file=sys.stderr)
        return 2
    import torch.distributed as dist

    begin_s = time.perf_counter()
    own = engine.generate(
        prompts, sampling, group_size=args.n, seed=args.seed, on_finished=lambda prompt, sample, rollout: None
    )
    seconds = time.perf_counter() - begin_s
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (own, engine.stats(), seconds))
    if dist.get_rank() == 0:
        write(args.out, prompts, [group for groups, _, _ in gathered for group in groups])
        summarise([stats for _, stats, _ in gathered], max(seconds for _, _, seconds in gathered))
    engine.close()
    return 0


def write(path: Path, prompts: list, groups: list) -> None:
    """All records in the order of the prompts, whole or not at all."""
    found = {group.prompt.prompt_id: group for group in groups}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w") as file:
        for prompt in prompts:
            for sample, rollout in enumerate(found[prompt.prompt_id].rollouts):
                file.write(json.dumps(record(prompt, sample, rollout)) + "\n")
    partial.rename(path)


def summarise(all_stats: list, seconds: float) -> None:
    """Of all replicas, to standard error."""
    num_tokens = sum(stats.num_response_tokens for stats in all_stats)
    print(f"{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s", file=sys.stderr)
    for stats in all_stats:
        for name, acceptance in stats.acceptance.items():
            print(json.dumps(acceptance.metrics(name)), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
