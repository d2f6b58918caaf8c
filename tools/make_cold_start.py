"""Examples for a cold start: problems of reasoning-gym with generated chains of thought whose lengths vary widely.

A chain of thought makes deterministic steps; words at forks are drawn, a wrong step now and then is noticed and put
right, and now and then the whole is checked once more. The length is what the problem needs (number of terms of
`chain_sum`, number of subtractions of `gcd`), so reinforcement learning cannot remove it by being brief. A share of
the sums (--quick-frac) is answered at a glance instead, which a small model gets wrong more often: whether to take the
trouble is what reinforcement learning can then find out. Problems of the files written here are to be kept from RL
with --data-exclude.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder

WRONG_STEP_PROB = 0.05
CHECK_PROB = 0.1
MAX_DRAWS_PER_EXAMPLE = 200

OPENINGS = (
    "Let me work through this step by step.",
    "I will go through the terms from left to right.",
    "Let us keep a running total.",
    "We take the numbers in order.",
    "Okay, one piece at a time.",
)
STARTS = ("The first number is {}.", "We start with {}.", "Start at {}.", "It begins with {}.")
CHUNKS = (
    "Next we have{}:",
    "Then comes{}:",
    "Now take{}:",
    "After that,{}:",
    "The following part is{}:",
    "Continue with{}:",
)
JOINTS = (", ", ", then ", "; ", ", and ", ". Then ", ". Now ", ", so ")
REGRETS = (", no, ", ". Wait, that is not right: ", ". Hmm, let me redo that: ", ", or rather ")
CHECKS = (
    "Let me check this again.",
    "Wait, let me verify that.",
    "To be sure, once more.",
    "Let me go over it again.",
)
CLOSINGS = (
    "The answer is {}.",
    "So the answer is {}.",
    "Therefore the answer is {}.",
    "That makes {}.",
    "The result is {}.",
)
QUICK_OPENINGS = (
    "This can be added up at a glance.",
    "I will do this one in my head.",
    "A quick look is enough here.",
    "No need to write the steps down.",
)
GCD_OPENINGS = (
    "Let me subtract the smaller number from the larger one until both are equal.",
    "I will use repeated subtraction.",
    "We keep subtracting the smaller from the larger.",
    "Euclid's method by subtraction works here.",
)
GCD_JOINTS = (". Then ", ". Next, ", ". Now ", ". So ", ". After that, ", ". Continuing, ")
GCD_EQUAL = ("Both are {} now.", "Now both numbers are {}.", "They are equal at {}.", "We are left with {} twice.")
GCD_CLOSINGS = (
    "The GCD is {}.",
    "So the GCD is {}.",
    "Therefore the greatest common divisor is {}.",
    "The answer is {}.",
)


def step(rng: Random, left: int, sign: str, right: int) -> str:
    """`7 - 2 = 5`, now and then with a wrong result first, which is noticed."""
    result = left + right if sign == "+" else left - right
    text = f"{left} {sign} {right} = {result}"
    if rng.random() >= WRONG_STEP_PROB:
        return text
    wrong = result + rng.choice((-2, -1, 1, 2, 10))
    return f"{left} {sign} {right} = {wrong}{rng.choice(REGRETS)}{text}"


def chain_sum(question: str, rng: Random, *, quick_frac: float = 0.0) -> str:
    """Terms copied a few at a time, then added one by one to the running total; or the result at a glance."""
    expression = re.search(r"(-?\d+(?: [+-] \d+)+)", question)[1]
    first, *rest = re.findall(r"(?:^-?|[+-] )\d+", expression)
    terms = [(term[0], int(term[2:])) for term in rest]
    if rng.random() < quick_frac:
        total = int(first) + sum(value if sign == "+" else -value for sign, value in terms)
        return f"{rng.choice(QUICK_OPENINGS)}\n{expression} = {total}.\n{rng.choice(CLOSINGS).format(total)}"

    def once() -> tuple[list[str], int]:
        total, position = int(first), 0
        parts = [rng.choice(STARTS).format(total)]
        while position < len(terms):
            chunk = terms[position : position + rng.choice((1, 2, 3, 3, 4))]
            position += len(chunk)
            copied = "".join(f" {sign} {value}" for sign, value in chunk)
            steps = ""
            for index, (sign, value) in enumerate(chunk):
                steps += (rng.choice(JOINTS) if index else "") + step(rng, total, sign, value)
                total += value if sign == "+" else -value
            parts.append(f"{rng.choice(CHUNKS).format(copied)} {steps}.")
        return parts, total

    return repeated(once, OPENINGS, CLOSINGS, rng)


def gcd(question: str, rng: Random, *, quick_frac: float = 0.0) -> str:
    """Euclid by subtraction: as many steps as the partial quotients of the continued fraction add up to.

    Never at a glance: small numbers have a divisor that is right so often that guessing would pay.
    """
    first, second = map(int, re.search(r"numbers: (\d+), (\d+)", question).groups())

    def once() -> tuple[list[str], int]:
        large, small = max(first, second), min(first, second)
        text = ""
        while large != small:
            text += (rng.choice(GCD_JOINTS) if text else "") + step(rng, large, "-", small)
            large, small = max(large - small, small), min(large - small, small)
        equal = rng.choice(GCD_EQUAL).format(small)
        return [f"{text}.", equal] if text else [equal], small

    return repeated(once, GCD_OPENINGS, GCD_CLOSINGS, rng)


def repeated(
    once: Callable[[], tuple[list[str], int]], openings: Sequence[str], closings: Sequence[str], rng: Random
) -> str:
    """An opening, the steps, now and then all steps again as a check, and the answer."""
    parts, result = once()
    lines = [rng.choice(openings), *parts]
    while rng.random() < CHECK_PROB:
        lines += [rng.choice(CHECKS), *once()[0]]
    return "\n".join([*lines, rng.choice(closings).format(result)])


WRITERS: dict[str, Callable[..., str]] = {"chain_sum": chain_sum, "gcd": gcd}
"""Task of reasoning-gym -> chain of thought of one of its questions."""


def is_for_cold_start(question: str) -> bool:
    """Half of all questions, by hash: a small task keeps the other half for RL and evaluation."""
    from tlt.data.source import question_key

    return hashlib.sha256(question_key(question).encode()).digest()[0] % 2 == 0


def examples(
    specs: Sequence[str], weights: Sequence[float], *, num_examples: int, seed: int, quick_frac: float = 0.0
) -> list[dict]:
    """Distinct problems, sources drawn by weight; every response earns reward 1. ValueError names --sources."""
    from tlt.data.source import derive_seed, parse_source, question_key
    from tlt.rewards.scoring import score

    sources = [parse_source(spec, "--sources", seed=derive_seed(seed, "cold start")) for spec in specs]
    for source in sources:
        if source.name.removeprefix("reasoning-gym:") not in WRITERS:
            raise ValueError(f"--sources: a chain of thought can be written for {sorted(WRITERS)}, got {source.name}")
    choose = Random(derive_seed(seed, "mixture"))
    positions = [0] * len(sources)
    found: dict[str, dict] = {}
    for _ in range(num_examples * MAX_DRAWS_PER_EXAMPLE):
        index = choose.choices(range(len(sources)), weights=weights)[0]
        problem = sources[index].problem(positions[index])
        positions[index] += 1
        key = question_key(problem.question)
        if key in found or not is_for_cold_start(problem.question):
            continue
        task = sources[index].name.removeprefix("reasoning-gym:")
        response = WRITERS[task](problem.question, Random(derive_seed(seed, "words", key)), quick_frac=quick_frac)
        if score(problem.answer, response) != 1.0:
            raise RuntimeError(f"the chain of thought of {problem.question!r} is wrong: {response!r}")
        found[key] = {"prompt": problem.question, "response": response, "task": task}
        if len(found) == num_examples:
            return list(found.values())
    raise ValueError(f"--sources have too few distinct problems: {len(found)} of --num-examples {num_examples}")


def write(path: Path, records: Sequence[dict]) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records))
    partial.rename(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and held_out.jsonl")
    parser.add_argument("--sources", nargs="+", required=True, metavar="X", help="as --data-train of pretrain_rl.py")
    parser.add_argument("--weights", nargs="+", type=float, metavar="X", help="share of each source (default: even)")
    parser.add_argument("--num-examples", type=int, default=1000, help="examples to train on (default: 1000)")
    parser.add_argument("--num-held-out", type=int, default=64, help="examples to measure on (default: 64)")
    parser.add_argument(
        "--quick-frac", type=float, default=0.0, help="share of sums answered at a glance, in [0, 1] (default: 0)"
    )
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    args = parser.parse_args()
    weights = args.weights or [1.0] * len(args.sources)
    try:
        if len(weights) != len(args.sources) or min(weights) <= 0:
            raise ValueError(f"--weights must be {len(args.sources)} positive numbers, one per source, got {weights}")
        if args.num_examples < 1 or args.num_held_out < 0:
            raise ValueError("--num-examples must be at least 1 and --num-held-out at least 0")
        if not 0 <= args.quick_frac <= 1:
            raise ValueError(f"--quick-frac must be in [0, 1], got {args.quick_frac}")
        total = args.num_examples + args.num_held_out
        records = examples(args.sources, weights, num_examples=total, seed=args.seed, quick_frac=args.quick_frac)
    except ValueError as error:
        print(f"make_cold_start.py: error: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "held_out.jsonl", records[: args.num_held_out])
    write(args.out / "train.jsonl", records[args.num_held_out :])
    lengths = sorted(len(record["response"]) for record in records)
    print(
        f"wrote {args.num_examples} and {args.num_held_out} examples to {args.out}; characters of a response: "
        f"median {lengths[len(lengths) // 2]}, p99 {lengths[int(0.99 * len(lengths))]}, longest {lengths[-1]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
