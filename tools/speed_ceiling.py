"""How fast rollouts could be: the measured costs of a recording with drafts that always stand, or cost nothing.

tools/speed_ceiling.py RECORDING [--ranks 2] [--stands 0.92] [--pass-ms MS] [--max-draft-tokens 8]

RECORDING is of tools/bench_rollout.py --record, where --ranks neighbouring ranks belong together: a rollout lasts as
long as the slowest. Each step takes the measured time of verifying so many tokens, and of so many passes of the head
at so many requests. Each token is drawn once to stand as a draft or not, the same for all rows of the table. Drafts
have a single length, or the best one for the number of running requests; or it is foreseen which tokens will stand:
then no other is verified, and there are as many passes as give most tokens a second. That is what no router can know;
still it is greedy, and of one drafter, so no proof of what is impossible. Not modelled: prompts, requests that differ.
Prints a table; `measured` is what the recording's own policies came to in the steps that only decoded.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder

Seconds = Callable[[int], float]
"""By size."""
Choice = Callable[[Sequence[int], Sequence[int], Seconds, Seconds], list[int]]
"""(drafts of each request that would stand, drafts that it has room for, seconds of a step, of a pass) -> drafts."""


def free(size: int) -> float:
    """Seconds of a pass that costs nothing."""
    return 0.0


def single(count: int, standing: Sequence[int], room: Sequence[int], step_s: Seconds, pass_s: Seconds) -> list[int]:
    """Always so many, as far as there is room."""
    return [min(count, own) for own in room]


def best_for_batch(
    stands: float, longest: int, standing: Sequence[int], room: Sequence[int], step_s: Seconds, pass_s: Seconds
) -> list[int]:
    """What gives most tokens a second if each token stands with probability `stands`."""
    size = len(room)

    def rate(count: int) -> float:
        return sum(stands**depth for depth in range(count + 1)) / (step_s(size * (count + 1)) + count * pass_s(size))

    return single(max(range(longest + 1), key=rate), standing, room, step_s, pass_s)


def foreseen(
    longest: int, standing: Sequence[int], room: Sequence[int], step_s: Seconds, pass_s: Seconds
) -> list[int]:
    """Only what stands, as deep as gives most tokens a second."""
    size = len(room)
    ways = [[min(depth, *own) for own in zip(standing, room, strict=True)] for depth in range(longest + 1)]

    def rate(way: list[int]) -> float:
        return (size + sum(way)) / (step_s(size + sum(way)) + max(way) * pass_s(size))

    return max(ways, key=rate)


def runs(length: int, *, stands: float, longest: int, seed: int) -> list[int]:
    """[length] how many drafts behind each token would stand, `longest` or more counting as that."""
    generator = random.Random(seed)
    found = [longest]
    for _ in range(length - 1):
        found.append(min(found[-1] + 1, longest) if generator.random() < stands else 0)
    return found[::-1]


def decode_s(
    lengths: Sequence[int], step_s: Seconds, choose: Choice, *, stands: float = 1.0, pass_s: Seconds = free,
    longest: int = 8, seed: int = 0,
) -> float:  # fmt: skip
    """Seconds of one rank's rollout of responses of these lengths, their first tokens being there."""
    standing = [
        runs(length, stands=stands, longest=longest, seed=1000 * seed + row) for row, length in enumerate(lengths)
    ]
    done, seconds = [1] * len(lengths), 0.0
    while running := [row for row, length in enumerate(lengths) if done[row] < length]:
        own = [standing[row][done[row] - 1] for row in running]
        counts = choose(own, [lengths[row] - done[row] - 1 for row in running], step_s, pass_s)
        seconds += step_s(len(running) + sum(counts)) + max(counts) * pass_s(len(running))
        for row, count, stood in zip(running, counts, own, strict=True):
            done[row] += 1 + min(count, stood)
    return seconds


def ratios(plain: Sequence[float], other: Sequence[float], *, num_ranks: int) -> tuple[float, float]:
    """(median of rollouts, of sums): how many times as fast as plain, a rollout being its slowest rank."""
    first, second = (
        [max(times[begin : begin + num_ranks]) for begin in range(0, len(times), num_ranks)]
        for times in (plain, other)
    )
    return statistics.median(a / b for a, b in zip(first, second, strict=True)), sum(first) / sum(second)


def rows(
    recorded: Sequence, *, num_ranks: int, stands: float, longest: int, pass_s: Seconds | None
) -> list[tuple[str, float, float]]:
    """(what is assumed, x plain in the median, of sums). Raises ValueError without `pass_s` where no head drafted."""
    from tlt.spec.step_model import fit_model

    model = fit_model(recorded)
    if pass_s is None:
        head = model.first_head()
        if head is None:
            raise ValueError("no rollout of the recording had a head alone: --pass-ms is needed")
        pass_s = head.passes.seconds
    policies: dict[str, list] = {}
    for rollout in recorded:
        policies.setdefault(rollout.policy, []).append(rollout)
    lengths = [rollout.response_tokens for rollout in next(iter(policies.values()))]  # all policies drew the same
    largest = max(map(len, lengths))
    steps = {size: model.steps.seconds(size) for size in range(1, 1 + largest * (longest + 1))}
    passes = {size: pass_s(size) for size in range(1, 1 + largest)}

    def times(choose: Choice, *, stands: float, pass_s: Seconds) -> list[float]:
        return [
            decode_s(own, steps.__getitem__, choose, stands=stands, pass_s=pass_s, longest=longest, seed=seed)
            for seed, own in enumerate(lengths)
        ]

    plain = times(partial(single, 0), stands=1.0, pass_s=free)
    alike = {"stands": stands, "pass_s": passes.__getitem__}
    singles = [times(partial(single, count), **alike) for count in range(longest + 1)]
    assumed = {
        "every draft stands, drafts are free": times(partial(best_for_batch, 1.0, longest), stands=1.0, pass_s=free),
        f"{stands:g} of a token stands, drafts are free": times(
            partial(best_for_batch, stands, longest), stands=stands, pass_s=free
        ),
        f"{stands:g} of a token stands, it is foreseen which": times(partial(foreseen, longest), **alike),
        f"{stands:g} of a token stands, best length for so many requests": times(
            partial(best_for_batch, stands, longest), **alike
        ),
        f"{stands:g} of a token stands, best single length": max(
            singles, key=lambda own: ratios(plain, own, num_ranks=num_ranks)
        ),
        **{
            f"measured, {policy}": [sum(step.seconds for step in rollout.steps) for rollout in own]
            for policy, own in policies.items()
        },
    }  # fmt: skip
    return [(name, *ratios(plain, other, num_ranks=num_ranks)) for name, other in assumed.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", type=Path, metavar="RECORDING", help="file of tools/bench_rollout.py --record")
    parser.add_argument("--ranks", type=int, default=2, help="of a rollout (default: 2)")
    parser.add_argument("--stands", type=float, default=0.92, help="probability of a draft token (default: 0.92)")
    parser.add_argument("--pass-ms", type=float, help="of a draft token (default: as the head's in the recording)")
    parser.add_argument("--max-draft-tokens", type=int, default=8, help="of a request and step (default: 8)")
    args = parser.parse_args()
    from tlt.spec.recording import read_recording

    pass_s = None if args.pass_ms is None else lambda size: args.pass_ms / 1e3
    try:
        found = rows(
            read_recording(args.recording, "RECORDING"), num_ranks=args.ranks, stands=args.stands,
            longest=args.max_draft_tokens, pass_s=pass_s,
        )  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    print("| assumed | x plain, median | of sums |\n|---|---|---|")
    for name, median, of_sums in found:
        print(f"| {name} | {median:.2f} | {of_sums:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
