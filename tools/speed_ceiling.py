"""How fast rollouts could be: the measured costs of a recording with drafts that always stand, or cost nothing.

tools/speed_ceiling.py RECORDING [--ranks 2] [--stands 0.92] [--pass-ms 4] [--max-draft-tokens 8]

RECORDING is of tools/bench_rollout.py --record, where --ranks neighbouring ranks belong together: a rollout lasts as
long as the slowest. Each step takes the measured time of verifying so many tokens, every request advances by what its
draft is expected to give, and the draft length is the best one for so many running requests; the best single length is
that of the whole recording. Whoever foresees what stands makes no pass and verifies no token in vain: no choice of
drafts for single requests can do better. Not modelled: prompts, requests that differ. Prints a table; `measured` is
what the recording's own policies came to in the steps that only decoded.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder


def decode_s(
    lengths: Sequence[int], step_s: Callable[[int], float], *, stands: float, pass_s: float, counts: Sequence[int]
) -> float:
    """Seconds of one rank's rollout of responses of these lengths, their first tokens being there.

    A draft token stands with probability `stands` where all before it do; `step_s` of verified tokens; each draft
    token takes a pass; drafts are of one of these `counts` of tokens, the best one for each number of requests.
    """
    left, seconds = [float(length - 1) for length in lengths if length > 1], 0.0
    gains = {count: sum(stands**depth for depth in range(count + 1)) for count in counts}
    while left:
        costs = {count: step_s(len(left) * (count + 1)) + count * pass_s for count in counts}
        best = max(counts, key=lambda count: gains[count] / costs[count])
        seconds += costs[best]
        left = [tokens - gains[best] for tokens in left if tokens > gains[best]]
    return seconds


def foreseen_s(
    lengths: Sequence[int], step_s: Callable[[int], float], *, stands: float, pass_s: float, longest: int, seed: int
) -> float:
    """The same where each step is known to come out as it does (drawn with `seed`): only what stands is verified, and
    the number of passes is the best one for these outcomes."""
    generator = random.Random(seed)
    left, seconds = [length - 1 for length in lengths if length > 1], 0.0
    while left:
        outcomes = [next((n for n in range(longest) if generator.random() >= stands), longest) for _ in left]
        ways = [[min(outcome, depth) for outcome in outcomes] for depth in range(longest + 1)]
        costs = [step_s(len(left) + sum(way)) + max(way) * pass_s for way in ways]
        best = max(range(longest + 1), key=lambda depth: (len(left) + sum(ways[depth])) / costs[depth])
        seconds += costs[best]
        left = [tokens - 1 - stood for tokens, stood in zip(left, ways[best], strict=True) if tokens > 1 + stood]
    return seconds


def ratios(plain: Sequence[float], other: Sequence[float], *, num_ranks: int) -> tuple[float, float]:
    """(median of rollouts, of sums): how many times as fast as plain, a rollout being its slowest rank."""
    first, second = (
        [max(times[begin : begin + num_ranks]) for begin in range(0, len(times), num_ranks)]
        for times in (plain, other)
    )
    return statistics.median(a / b for a, b in zip(first, second, strict=True)), sum(first) / sum(second)


def rows(
    recorded: Sequence, *, num_ranks: int, stands: float, pass_s: float, longest: int
) -> list[tuple[str, float, float]]:
    """(what is assumed, x plain in the median, of sums)."""
    from tlt.spec.step_model import fit_model

    steps = fit_model(recorded).steps
    policies: dict[str, list] = {}
    for rollout in recorded:
        policies.setdefault(rollout.policy, []).append(rollout)
    lengths = [rollout.response_tokens for rollout in next(iter(policies.values()))]  # all policies drew the same
    seconds = {size: steps.seconds(size) for size in range(1, 1 + max(map(len, lengths)) * (longest + 1))}

    def times(**assumed: Any) -> list[float]:
        values = {"stands": 1.0, "pass_s": 0.0, "counts": range(longest + 1)} | assumed
        return [decode_s(own, seconds.__getitem__, **values) for own in lengths]

    plain = times(counts=(0,))
    measured = {"stands": stands, "pass_s": pass_s}
    foreseen = [
        foreseen_s(own, seconds.__getitem__, **measured, longest=longest, seed=seed)
        for seed, own in enumerate(lengths)
    ]
    single = [times(**measured, counts=(count,)) for count in range(longest + 1)]
    as_measured = f"{stands:g} of a token stands, {1e3 * pass_s:g} ms a pass"
    assumed = {
        "every draft stands, drafts are free": times(),
        f"{stands:g} of a token stands, drafts are free": times(stands=stands),
        f"{as_measured}, it is foreseen which": foreseen,
        f"{as_measured}, best length for so many requests": times(**measured),
        f"{as_measured}, best single length": max(single, key=lambda one: ratios(plain, one, num_ranks=num_ranks)),
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
    parser.add_argument("--pass-ms", type=float, default=4.0, help="of a draft token (default: 4)")
    parser.add_argument("--max-draft-tokens", type=int, default=8, help="of a request and step (default: 8)")
    args = parser.parse_args()
    from tlt.spec.recording import read_recording

    try:
        recorded = read_recording(args.recording, "RECORDING")
    except ValueError as error:
        parser.error(str(error))
    found = rows(
        recorded, num_ranks=args.ranks, stands=args.stands, pass_s=args.pass_ms / 1e3, longest=args.max_draft_tokens
    )  # fmt: skip
    print("| assumed | x plain, median | of sums |\n|---|---|---|")
    for name, median, of_sums in found:
        print(f"| {name} | {median:.2f} | {of_sums:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
