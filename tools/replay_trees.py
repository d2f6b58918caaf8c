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
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.head_responses import add_response_flags, read_head_and_prompts  # noqa: E402

MAX_RANK = 8
"""Candidates of a node that are told apart."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
"""Nodes; up to --depth, or a chain of as many would be cut short."""


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_response_flags(parser)
    parser.add_argument("--prompts", type=int, default=64, help="one response each (default: 64)")
    parser.add_argument("--depth", type=int, default=12, help="of the deepest node (default: 12)")
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


def main(argv: list[str]) -> int:
    args = arguments(argv)
    try:
        found = read_head_and_prompts(args)
        texts, target = found.responses(group_size=1), found.target()
    except ValueError as error:
        print(f"replay_trees.py: error: {error}", file=sys.stderr)
        return 2
    import torch

    from tlt.provenance import git_commit

    with torch.no_grad():
        paths = [paths_of(found.head, text.sample, text.seed, target=target, depth=args.depth) for text in texts]
    result = [
        row for kind in ("coupled", "one-hot") for row in rows(kind, [own[kind] for own in paths], depth=args.depth)
    ]  # fmt: skip
    columns = ("drafts", "verified", "chain", "tree", "deepest")
    print(
        "| drafts | tokens to verify | tokens a step, chain | tree | its depth | tree / chain |\n" + "|---" * 6 + "|"
    )
    for row in result:
        cells = [f"{row[name]:.3f}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        print("| " + " | ".join(cells) + f" | {row['tree'] / row['chain']:.3f} |")
    if args.json:
        about = {"commit": git_commit(), "command": argv, "responses": len(texts)}
        args.json.write_text(json.dumps({"about": about, "rows": result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
