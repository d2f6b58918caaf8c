"""What a router of one head's draft lengths could come to, by replay of real responses (tlt/drafter/router_replay.py).

tools/replay_router.py --model DIR --drafter DIR --sources 'reasoning-gym:...' --recording FILE --prompts 40

Groups of responses are sampled, the head drafts at each of their positions, and the walks of each group under fixed
lengths, under a router that knows a token's probability, its lead or its confidence (tlt/spec/race.py), and under one
that knows what will stand take the times of --recording, which tools/bench_rollout.py wrote with a head alone among
its --strategies. One group a rank; a rollout lasts as long as the slower of --ranks neighbouring ones.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.head_responses import add_response_flags, read_head_and_prompts  # noqa: E402
from tools.speed_ceiling import ratios  # noqa: E402

FIXED = (1, 2, 3, 4, 5, 6, 8)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_response_flags(parser)
    parser.add_argument("--recording", type=Path, required=True, metavar="FILE", help="costs of steps and passes")
    parser.add_argument("--prompts", type=int, default=40, help="groups (default: 40)")
    parser.add_argument("--group-size", type=int, default=8, help="responses to a prompt (default: 8)")
    parser.add_argument("--ranks", type=int, default=2, help="of a rollout (default: 2)")
    parser.add_argument(
        "--longest", nargs="+", type=int, default=[8, 12, 16], metavar="N", help="drafts of the router"
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raises ValueError naming the flag."""
    from tlt.config import require

    for name in ("prompts", "group_size", "ranks"):
        value = getattr(args, name)
        require(value >= 1, "--" + name.replace("_", "-"), value, "at least 1")
    require(args.prompts >= args.ranks, "--prompts", args.prompts, f"at least --ranks ({args.ranks})")
    require(min(args.longest) >= 1, "--longest", min(args.longest), "at least 1")


def costs_of(path: Path, group_size: int, longest: int):
    """Costs of a recording. Raises ValueError naming the flag."""
    import numpy as np

    from tlt.drafter.router_replay import Costs
    from tlt.spec.recording import read_recording
    from tlt.spec.step_model import fit_model

    model = fit_model(read_recording(path, "--recording"))
    head = model.first_head()
    if head is None:
        raise ValueError(f"--recording {path}: no rollout of it had a head alone (--strategies eagle:N)")
    tokens = group_size * (longest + 1)
    return Costs(
        step_s=np.array([model.steps.seconds(size) for size in range(tokens + 1)]),
        pass_s=np.array([head.passes.seconds(size) for size in range(group_size + 1)]),
    )


def response_of(head, text, *, target, depth: int, fold: int):
    """Response of a SampledText; None where nothing can be drafted."""
    import numpy as np
    import torch

    from tlt.drafter.batch import pack, whole
    from tlt.drafter.losses import readout
    from tlt.drafter.router_replay import Response
    from tlt.drafter.unroll import unroll
    from tlt.spec.race import confidence, race_with_leads
    from tlt.spec.randomness import TOKEN

    sample = text.sample
    piece = whole(sample)
    if piece.num_starts == 0:
        return None
    batch = pack([piece], num_depths=depth, reads=head.reads)
    num_starts = len(batch.starts)
    ids = torch.arange(len(target.output_weight)) if head.draft_token_ids is None else head.draft_token_ids
    stands = np.zeros((num_starts, depth), dtype=bool)
    leads, chances = np.zeros((2, num_starts, depth))
    for index, step in enumerate(unroll(head, batch, target.embedding, num_depths=depth)):
        probs = readout(step.output, target.output_weight, temperature=target.temperature).softmax(1)
        position = batch.row_position_ids[step.rows] + 2  # of the token that is drafted
        drawn, lead = race_with_leads(
            probs, [text.seed] * len(position), position.tolist(), stream=TOKEN, token_ids=head.draft_token_ids
        )
        rows = step.starts.numpy()
        stands[rows, index] = (ids[drawn] == sample.token_ids.long()[position]).numpy()
        leads[rows, index], chances[rows, index] = lead, probs.gather(1, drawn[:, None]).squeeze(1).numpy()
    left = len(sample.token_ids) - (piece.first + 2) - np.arange(num_starts)
    return Response(
        fold=fold, stands=stands, num_left=np.clip(left, 0, depth),
        signals={"probability": chances, "lead": leads, "confidence": confidence(leads, chances)},
    )  # fmt: skip


def table(groups: list, costs, *, longest: list[int], num_ranks: int) -> list[dict]:
    """Rows of what each choice comes to, against plain decoding and the best fixed length."""
    from tlt.drafter.calibration import CONFIDENCE_EDGES
    from tlt.drafter.router_replay import (
        Routed,
        calibrated,
        depth_rates,
        explained,
        fixed,
        foreseen,
        rollout_s,
        routed_s,
    )

    every = [one for group in groups for one in group]
    plain = [rollout_s(group, fixed(0), costs) for group in groups]
    lengths = {count: [rollout_s(group, fixed(count), costs) for group in groups] for count in FIXED}
    best = max(lengths, key=lambda count: ratios(plain, lengths[count], num_ranks=num_ranks)[1])
    walks = [(f"always {count}", None, own) for count, own in lengths.items()]
    rates = depth_rates(every)
    for signal in every[0].signals:
        estimates = calibrated(every, signal, CONFIDENCE_EDGES)
        told = explained(every, estimates)
        for count in longest:
            router = Routed(estimates, rates, count, costs)
            walks.append((f"router, {signal}, at most {count}", told, routed_s(groups, router, costs)))
    walks += [
        (f"foreseen, at most {count}", 1.0, [rollout_s(group, foreseen(count, costs), costs) for group in groups])
        for count in longest
    ]
    result = []
    for name, told, own in walks:
        median, of_sums = ratios(plain, own, num_ranks=num_ranks)
        best_median, best_sums = ratios(lengths[best], own, num_ranks=num_ranks)
        result.append(
            {"choice": name, "explained": told, "x plain": median, "of sums": of_sums,
             f"x always {best}": best_median, f"x always {best}, of sums": best_sums}
        )  # fmt: skip
    return result


def main(argv: list[str]) -> int:
    args = arguments(argv)
    depth = max(*args.longest, *FIXED)
    try:
        check(args)
        costs = costs_of(args.recording, args.group_size, depth)
        read = read_head_and_prompts(args)
        texts, target = read.responses(group_size=args.group_size), read.target()
    except ValueError as error:
        print(f"replay_router.py: error: {error}", file=sys.stderr)
        return 2
    import torch

    from tlt.drafter.router_replay import FOLDS
    from tlt.provenance import git_commit
    from tlt.types import prompt_id_of

    folds = {prompt.prompt_id: index % FOLDS for index, prompt in enumerate(read.prompts)}
    groups: dict[str, list] = {}
    with torch.no_grad():
        for text in texts:
            prompt_id = prompt_id_of(text.sample.request_id)
            found = response_of(read.head, text, target=target, depth=depth, fold=folds[prompt_id])
            if found is not None:
                groups.setdefault(prompt_id, []).append(found)
    ranks = list(groups.values())[: len(groups) // args.ranks * args.ranks]
    result = table(ranks, costs, longest=args.longest, num_ranks=args.ranks)
    print("| " + " | ".join(result[0]) + " |\n" + "|---" * len(result[0]) + "|")
    for row in result:
        cells = ["-" if one is None else f"{one:.3f}" if isinstance(one, float) else one for one in row.values()]
        print("| " + " | ".join(cells) + " |")
    if args.json:
        about = {"commit": git_commit(), "command": argv, "responses": sum(map(len, ranks)), "ranks": len(ranks)}
        args.json.write_text(json.dumps({"about": about, "rows": result}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
