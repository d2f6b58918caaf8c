"""What a run achieved: held-out accuracy before and after, time, and where its files are."""

import argparse
import json
import sys
from pathlib import Path


def summary(folder: Path) -> str:
    """Text to print; raises ValueError where the run has fewer than two evaluations."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{folder} is not a run: metrics.jsonl is missing")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    evaluations = [record for record in records if "eval/greedy_accuracy" in record]
    if len(evaluations) < 2:
        raise ValueError(f"{path} has {len(evaluations)} evaluations; a comparison needs two")
    first, last = evaluations[0], evaluations[-1]
    before, after = first["eval/greedy_accuracy"], last["eval/greedy_accuracy"]
    seconds = sum(
        record.get(name, 0.0)
        for record in records
        for name in ("rollout/duration_s", "policy/logprobs_s", "policy/update_s", "weight_sync/push_s")
    )
    return "\n".join(
        [
            f"held-out greedy accuracy: {before:.3f} before, {after:.3f} after {last['iteration']} iterations "
            f"({100 * (after - before):+.1f} points, {first['eval/num_prompts']:.0f} problems)",
            f"rollout, logprobs, update and sync: {seconds:.0f} s",
            f"files: {folder}/metrics.jsonl, {folder}/run.json, {folder}/trace/, "
            f"{folder}/tensorboard/, {folder}/iter_*/",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run (--save)")
    args = parser.parse_args()
    try:
        print(summary(args.run))
    except ValueError as error:
        print(f"show_run.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
