"""Speed of drafter training on responses of a real run: packed, against batches padded to their longest sequence.

tools/bench_drafter_packing.py --model DIR --lengths FILE... [--batch-size 8] [--minutes 2]

`--lengths` are the responses of a run (<save>/rollouts/*.jsonl, or the output of tools/rollout.py). Three ways train
the same head with the same depths and losses on the same tokens: `padded` computes all positions of every sequence,
the prompt's and the padding's too, as batched trainers do; `padded starts` only positions from the first draft on, and
the padding; `packed` is what this project does. Ways alternate over micro-steps of about the same number of sequences;
hidden states and weights are random, which changes no time. Rates are of useful starts, in processor time of this
process on the CPU, so that what else runs on the machine counts little.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.random_drafter import make_sample, make_trainer  # noqa: E402

WAYS = ("packed", "padded starts", "padded")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory of the target")
    parser.add_argument("--lengths", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL of responses")
    parser.add_argument("--prompt-tokens", type=int, default=40, help="where a line does not tell (default: 40)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a micro-step (default: 8)")
    parser.add_argument("--num-depths", type=int, default=4, help="default: 4")
    parser.add_argument("--minutes", type=float, default=2.0, help="default: 2")
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    return parser.parse_args()


def read_lengths(paths: Sequence[Path], prompt_tokens: int) -> list[tuple[int, int]]:
    """(tokens of prompt, of prompt and response) of every response. Raises ValueError naming the file."""
    lengths = []
    for path in paths:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            prompt = record.get("prompt_token_ids")
            prompt = prompt_tokens if prompt is None else len(prompt)
            lengths.append((prompt, prompt + len(record["token_ids"])))
    if not lengths:
        raise ValueError(f"--lengths {' '.join(map(str, paths))} hold no response")
    return lengths


def padded(samples: Sequence, *, whole_sequences: bool) -> list:
    """Pieces of the batch as it is when all sequences have the length of the longest; what is padding weighs 0."""
    import torch

    from tlt.drafter.batch import whole

    longest = max(len(sample.token_ids) for sample in samples)
    pieces = []
    for sample in samples:
        num_tokens, hidden = len(sample.token_ids), sample.last_hidden_states
        weights = torch.zeros(longest)
        weights[max(sample.num_prompt_tokens - 1, 0) : num_tokens - 2] = 1
        filled = replace(
            sample, token_ids=torch.nn.functional.pad(sample.token_ids, (0, longest - num_tokens)),
            last_hidden_states=torch.nn.functional.pad(hidden, (0, 0, 0, longest - num_tokens)),
            num_prompt_tokens=1 if whole_sequences else sample.num_prompt_tokens,
        )  # fmt: skip
        pieces.append(whole(filled, weights=weights))
    return pieces


def main() -> int:
    args = arguments()
    import torch

    from tlt.drafter.batch import starts_of, whole
    from tlt.provenance import git_commit

    try:
        lengths = read_lengths(args.lengths, args.prompt_tokens)
    except (ValueError, OSError) as error:
        print(f"bench_drafter_packing.py: error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(args.seed)
    trainer = make_trainer(args.model, num_depths=args.num_depths)
    hidden_size = trainer.head.shape.hidden_size
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    starts: list[int] = []
    begin_s = time.perf_counter()
    while not starts or time.perf_counter() - begin_s < args.minutes * 60:
        chosen = torch.randint(len(lengths), (args.batch_size,)).tolist()
        samples = [make_sample(*lengths[index], hidden_size) for index in chosen]
        starts.append(sum(len(starts_of(sample)) for sample in samples))
        pieces = {
            "packed": [whole(sample) for sample in samples],
            "padded starts": padded(samples, whole_sequences=False),
            "padded": padded(samples, whole_sequences=True),
        }
        first = len(starts) % len(WAYS)
        for way in WAYS[first:] + WAYS[:first]:
            trainer.optimizer.zero_grad(set_to_none=True)
            step_s = time.process_time()
            trainer.micro_step(pieces[way])
            seconds[way].append(time.process_time() - step_s)
    if len(starts) > 1:  # the first is uncounted: memory is touched for the first time
        starts, seconds = starts[1:], {way: times[1:] for way, times in seconds.items()}
    print("| way | useful starts/s | median CPU ms of a micro-step | x padded |\n|---|---|---|---|")
    for way in WAYS:
        ratio = sum(seconds["padded"]) / sum(seconds[way])
        rate = sum(starts) / sum(seconds[way])
        print(f"| {way} | {rate:.0f} | {1e3 * statistics.median(seconds[way]):.0f} | {ratio:.2f} |")
    about = {
        "commit": git_commit(), "cpus": os.cpu_count(), "micro_steps": len(starts), "batch_size": args.batch_size,
        "responses": len(lengths), "mean_tokens": statistics.mean(total for _, total in lengths),
    }  # fmt: skip
    print(json.dumps(about), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
