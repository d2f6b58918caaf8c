"""What trees of drafts would add to chains, by replay: the target's text, a head's ranking of each of its tokens.

tools/replay_trees.py --model DIR --drafter DIR --sources 'reasoning-gym:...' --prompts 64

For each position of the responses the head drafts along the text (tlt/drafter/unroll.py), and the rank of the token
that followed is kept, in the order in which the head's candidates win their race (coupled drafts) or by probability
(one-hot). The best static tree of N nodes is chosen on half of the responses and measured on the other half, beside
the chain of N. Both verify N tokens, so the difference is what multi-candidate verification could gain at most: it
leaves out that a tree drafts more rows and that its attention needs a mask.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.lone_engine import make_engine, start_ranks  # noqa: E402
from tools.prompt_flags import add_prompt_flags, prompt_builder, prompt_stream  # noqa: E402
from tools.target_weights import make_target, read_rows  # noqa: E402

MAX_RANK = 8
"""Candidates of a node that are told apart."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Nodes; up to --depth, or a chain of as many would be cut short."""


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory")
    parser.add_argument("--drafter", type=Path, required=True, metavar="DIR", help="EAGLE head for the model")
    parser.add_argument("--sources", nargs="+", required=True, metavar="X", help="as --data-train of pretrain_rl.py")
    add_prompt_flags(parser)
    parser.add_argument("--prompts", type=int, default=64, help="one response each (default: 64)")
    parser.add_argument("--depth", type=int, default=12, help="of the deepest node (default: 12)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--max-tokens", type=int, default=768, help="of a response (default: 768)")
    parser.add_argument("--max-model-len", type=int, default=1024, help="default: 1024")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--json", type=Path, help="file to write")
    return parser.parse_args(argv)


def paths_of(head, sample, seed: int, *, target, depth: int) -> dict[str, list[tuple[int, ...]]]:
    """Of each position of one response with `depth` tokens behind it, by kind of draft."""
    import torch

    from tlt.drafter.batch import pack, whole
    from tlt.drafter.losses import readout
    from tlt.drafter.unroll import unroll
    from tlt.spec.race import RARE, arrival_times
    from tlt.spec.randomness import TOKEN

    batch = pack([whole(sample)], num_depths=depth, reads=head.reads)
    num_starts = len(batch.starts)
    ids = torch.arange(len(target.output_weight)) if head.draft_token_ids is None else head.draft_token_ids
    ranks = {kind: torch.zeros(num_starts, depth, dtype=torch.int64) for kind in ("coupled", "one-hot")}
    for index, step in enumerate(unroll(head, batch, target.embedding, num_depths=depth)):
        probs = readout(step.output, target.output_weight, temperature=target.temperature).softmax(1).double()
        position = batch.row_position_ids[step.rows] + 2
        token = sample.token_ids.long()[position]
        column = torch.searchsorted(ids, token).clamp(max=len(ids) - 1)
        is_named = ids[column] == token
        row, candidate = (probs >= RARE).nonzero(as_tuple=True)
        times = torch.full_like(probs, float("inf"))
        times[row, candidate] = arrival_times(
            probs[row, candidate], row, ids[candidate], seeds=[seed] * len(position), positions=position.tolist(),
            stream=TOKEN,
        )  # fmt: skip
        for kind, order in (("coupled", times), ("one-hot", -probs)):
            own = order.gather(1, column[:, None])
            rank = 1 + (order < own).sum(1)
            is_found = is_named & torch.isfinite(own.squeeze(1)) & (rank <= MAX_RANK)
            ranks[kind][step.starts, index] = torch.where(is_found, rank, 0)
    last = num_starts - depth + 1  # behind it the text's end cuts paths short
    return {kind: [until_unnamed(row) for row in found[: max(last, 0)].tolist()] for kind, found in ranks.items()}


def until_unnamed(ranks: list[int]) -> tuple[int, ...]:
    """The path up to the first token that the head does not name."""
    return tuple(ranks[: ranks.index(0)] if 0 in ranks else ranks)


def rows(kind: str, responses: list[list[tuple[int, ...]]], *, depth: int) -> list[dict]:
    """One for each number of nodes: trees chosen on every second response, measured on the others."""
    from tlt.spec.tree_value import best_tree, chain, mean_standing

    chosen_on = [path for own in responses[::2] for path in own]
    measured_on = [path for own in responses[1::2] for path in own]
    result = []
    for size in (size for size in SIZES if size <= depth):
        tree = best_tree(chosen_on, size)
        result.append(
            {
                "drafts": kind, "verified": size, "chain": 1 + mean_standing(measured_on, chain(size)),
                "tree": 1 + mean_standing(measured_on, tree), "deepest": max(map(len, tree), default=0),
                "positions": len(measured_on),
            }
        )  # fmt: skip
    return result


def responses(
    args: argparse.Namespace, plan, hf_config: dict, tokenizer, prompts: list, *, group_size: int = 1
) -> list:
    """Hidden states of `group_size` responses to each prompt, by an engine that drafts nothing."""
    from tlt.build import stop_token_ids
    from tlt.config import RolloutConfig
    from tlt.types import SamplingConfig

    engine = make_engine(
        RolloutConfig(max_model_len=args.max_model_len, max_response_tokens=args.max_tokens),
        hf_model=args.model, dtype=args.dtype, plan=plan,
        stop_token_ids=stop_token_ids(Path(args.model), hf_config, tokenizer),
    )  # fmt: skip
    sampling = SamplingConfig(temperature=args.temperature, max_response_tokens=args.max_tokens)
    engine.generate(prompts, sampling, group_size=group_size, seed=args.seed, on_finished=lambda *_: None)
    samples = engine.hidden_state_samples()
    engine.close()
    return samples


def main(argv: list[str]) -> int:
    args = arguments(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch
    from transformers import AutoTokenizer

    from tlt.config import SpecConfig, read_hf_config
    from tlt.drafter.model import load_head
    from tlt.provenance import git_commit
    from tlt.rollout.vllm.speculation import read_spec_plan
    from tlt.spec.randomness import request_seed
    from tlt.types import prompt_id_of

    try:
        hf_config = read_hf_config(args.model)
        head = load_head(args.drafter, flag="--drafter", target_config=hf_config, dtype=torch.float32)
        spec = SpecConfig(hidden_states_mib=4096)
        plan = read_spec_plan(spec, target_config=hf_config, dtype=getattr(torch, args.dtype), tp_size=1)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        prompts = prompt_stream(args, prompt_builder(args, tokenizer)).next_batch(args.prompts)
    except ValueError as error:
        print(f"replay_trees.py: error: {error}", file=sys.stderr)
        return 2
    start_ranks()
    samples = responses(args, plan, hf_config, tokenizer, prompts)
    target = make_target(*read_rows(args.model, hf_config), head.draft_token_ids, temperature=args.temperature)
    with torch.no_grad():
        seeds = [request_seed(args.seed, prompt_id_of(sample.request_id), 0) for sample in samples]
        found = [
            paths_of(head, sample, seed, target=target, depth=args.depth)
            for sample, seed in zip(samples, seeds, strict=True)
        ]  # fmt: skip
    result = [
        row for kind in ("coupled", "one-hot") for row in rows(kind, [own[kind] for own in found], depth=args.depth)
    ]  # fmt: skip
    columns = ("drafts", "verified", "chain", "tree", "deepest")
    print(
        "| drafts | tokens to verify | tokens a step, chain | tree | its depth | tree / chain |\n" + "|---" * 6 + "|"
    )
    for row in result:
        cells = [f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        print("| " + " | ".join(cells) + f" | {row['tree'] / row['chain']:.3f} |")
    if args.json:
        about = {"commit": git_commit(), "command": argv, "responses": len(found)}
        args.json.write_text(json.dumps({"about": about, "rows": result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
