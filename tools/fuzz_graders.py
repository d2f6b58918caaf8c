"""Put malformed and hostile responses through the scoring processes and say what became of each kind.

python tools/fuzz_graders.py --num 100000 --timeout-s 2 --memory-mib 1500. Every response must come back with a reward
of 0 or 1; what hangs or eats memory costs its own reward only. Status 1 where one did not.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder

BATCH = 500
"""Responses that are scored between two looks at them."""
GOLDS = (
    {"kind": "math", "gold": "42"},
    {"kind": "math", "gold": "\\frac{1}{3}"},
    {"kind": "reasoning-gym", "task": "chain_sum", "config": {}, "seed": 3, "index": 5},
    {"kind": "reasoning-gym", "task": "gcd", "config": {}, "seed": 3, "index": 5},
    {"kind": "reasoning-gym", "task": "word_sorting", "config": {}, "seed": 3, "index": 5},
)
MEGABYTE = 2**20
PIECES = (
    "42", "-1", "<answer>", "</answer>", "\\boxed{", "}", "$", "$$", "\\frac{", "}{", "\\sqrt{", "^{", "_{", "\\left(",
    "\\right)", "\\begin{matrix}", "\\end{matrix}", "&", "\\\\", "x", "=", "+", "*", "/", "!", "**", "1e999", "nan",
    "infinity", "\\infty", "\\int", "\\sum_{i=1}^{n}", "\x00", "\n", "\t", "\u202e", "\U0001f600", "\ud7ff", "0x1f",
    "%",
    "1,000", "..", "[", "]", "(", ")", "{", "\\text{", "import os", "__import__('os')", "lambda: 0", "\\", "'", '"',
)  # fmt: skip


def make_response(generator: random.Random, kind: str) -> str:
    """One response; a function of the generator's state."""
    number = generator.randrange(1, 400)
    if kind == "pieces":
        return "".join(generator.choice(PIECES) for _ in range(number))
    if kind == "characters":
        return "".join(
            chr(generator.choice((generator.randrange(128), generator.randrange(0xD800)))) for _ in range(number)
        )
    if kind == "nested":
        opening, closing = generator.choice(
            (("\\frac{1}{", "}"), ("\\sqrt{", "}"), ("(", ")"), ("{", "}"), ("^{", "}"))
        )
        return "\\boxed{" + opening * number + "2" + closing * generator.choice((number, number - 1)) + "}"
    if kind == "huge number":
        digits = "".join(generator.choice("0123456789") for _ in range(20 * number))
        return generator.choice(("$%s$", "\\boxed{%s}", "<answer>%s</answer>", "%s", "$0.%s$", "$1e%s$")) % digits
    if kind == "tower":
        tower = "^{".join([str(generator.randrange(2, 100))] * generator.randrange(2, 8))
        return f"$\\boxed{{{tower}{'}' * tower.count('^')}}}$"
    if kind == "factorial":
        return f"$\\boxed{{{number * 1000}{'!' * generator.randrange(1, 4)}}}$"
    if kind == "null bytes":
        return "\x00" * number + "42" + "\x00" * number
    piece = generator.choice(PIECES)  # a megabyte
    return piece * (MEGABYTE // len(piece))


KINDS = {
    "pieces": 0.4, "characters": 0.2, "nested": 0.15, "huge number": 0.15, "null bytes": 0.08, "tower": 0.009,
    "factorial": 0.009, "megabyte": 0.002,
}  # fmt: skip
"""Shares of the responses."""


def responses(num: int, seed: int) -> Iterator[tuple[str, dict, str]]:
    """(kind, what a prompt knows of its answer, response)."""
    generator = random.Random(seed)
    for _ in range(num):
        (kind,) = generator.choices(list(KINDS), weights=list(KINDS.values()))
        yield kind, generator.choice(GOLDS), make_response(generator, kind)


def fuzz(num: int, *, seed: int, timeout_s: float, memory_mib: int, workers: int) -> Counter:
    """Counts of (kind, reward) and of what the pool counted."""
    from tlt.config import RewardConfig
    from tlt.rewards.pool import RewardPool
    from tlt.types import Prompt, Rollout, RolloutGroup

    counts: Counter = Counter()
    pool = RewardPool(RewardConfig(workers=workers, timeout_s=timeout_s, memory_mib=memory_mib))
    stream = responses(num, seed)
    try:
        for batch in range(0, num, BATCH):
            kinds, groups = [], []
            for index, (kind, answer, text) in zip(range(min(BATCH, num - batch)), stream, strict=False):
                prompt = Prompt(prompt_id=f"{batch}/{index}", source="fuzz", token_ids=(1,), text="", answer=answer)
                rollout = Rollout(
                    token_ids=(1,), logprobs=(-1.0,), text=text, finish_reason="stop", policy_version=0
                )  # fmt: skip
                pool.submit(prompt, 0, rollout)
                groups.append(RolloutGroup(prompt=prompt, rollouts=(rollout,)))
                kinds.append(kind)
            for kind, group in zip(kinds, pool.collect(groups), strict=True):
                counts[kind, group.rewards[0]] += 1
            for name, value in pool.stats().items():
                if not name.endswith("_s"):
                    counts[name] += int(value)
    finally:
        pool.close()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=100_000, help="responses")
    parser.add_argument("--seed", type=int, default=0, help="of the responses")
    parser.add_argument("--timeout-s", type=float, default=2.0, help="seconds for each")
    parser.add_argument("--memory-mib", type=int, default=1500, help="MiB for a scoring process")
    parser.add_argument("--workers", type=int, default=1, help="scoring processes")
    args = parser.parse_args()
    begin_s = time.monotonic()
    counts = fuzz(
        args.num, seed=args.seed, timeout_s=args.timeout_s, memory_mib=args.memory_mib, workers=args.workers
    )  # fmt: skip
    print(f"{args.num} responses in {time.monotonic() - begin_s:.0f} s")
    for key in sorted(counts, key=str):
        print(f"{key if isinstance(key, str) else f'{key[0]}: reward {key[1]:g}'}: {counts[key]}")
    num_scored = sum(value for key, value in counts.items() if not isinstance(key, str) and key[1] in (0.0, 1.0))
    return int(num_scored != args.num)


if __name__ == "__main__":
    sys.exit(main())
