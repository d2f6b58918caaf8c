"""How long training is held by a save of a drafter's state: whole and synchronous, asynchronous, selective.

tools/bench_drafter_checkpoint.py --model DIR [--repetitions 10]

`full` writes what a framework saves that does not know what is frozen: embedding, LM head (two tensors also where the
policy ties them, as vLLM's drafters are stored), the head and its optimizer, and waits for the disk. `async` copies
the same into memory and writes in the background; `selective async` has what is trained alone, as this project saves
it. Kinds alternate; a save begins when the disk is done with the one before. One head of the model's size, random
weights, one optimizer step behind it.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder
from tools.random_drafter import make_sample, make_trainer  # noqa: E402


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face directory of the target")
    parser.add_argument("--folder", type=Path, help="to write to (default: a temporary one)")
    parser.add_argument("--repetitions", type=int, default=10, help="default: 10; one more goes uncounted before")
    return parser.parse_args()


def make_states(model: str) -> tuple[dict, dict]:
    """(what is trained, that and what is frozen), after one optimizer step."""
    from tlt.drafter.batch import whole

    trainer = make_trainer(model)
    trainer.step([whole(make_sample(8, 64, trainer.head.shape.hidden_size))])
    selective = trainer.state_dict()
    embedding = trainer.target.embedding
    return selective, {**selective, "embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}


def main() -> int:
    args = arguments()
    from tlt.drafter.checkpoint import DrafterCheckpointer, write_atomically
    from tlt.provenance import git_commit

    selective, full = make_states(args.model)
    folder = args.folder or Path(tempfile.mkdtemp())
    background = {name: DrafterCheckpointer(folder / f"{name}.pt") for name in ("async", "selective async")}
    states = {"async": full, "selective async": selective}
    held_ms: dict[str, list[float]] = {"full": [], **{name: [] for name in background}}
    for _ in range(args.repetitions + 1):
        begin_s = time.perf_counter()
        write_atomically(full, folder / "full.pt")
        held_ms["full"].append(1e3 * (time.perf_counter() - begin_s))
        for name, checkpointer in background.items():
            begin_s = time.perf_counter()
            checkpointer.save(states[name])
            held_ms[name].append(1e3 * (time.perf_counter() - begin_s))
            checkpointer.wait()
    rows = {
        name: {
            "median_ms": statistics.median(times[1:]), "min_ms": min(times[1:]), "max_ms": max(times[1:]),
            "mib": (folder / f"{name}.pt").stat().st_size / 2**20,
        }
        for name, times in held_ms.items()
    }  # fmt: skip
    print("| save | MiB | held, median ms | min | max | full / this |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        ratio = rows["full"]["median_ms"] / row["median_ms"]
        print(
            f"| {name} | {row['mib']:.0f} | {row['median_ms']:.0f} | {row['min_ms']:.0f} | {row['max_ms']:.0f} "
            f"| {ratio:.1f} |"
        )
    print(
        json.dumps({"commit": git_commit(), "cpus": os.cpu_count(), "repetitions": args.repetitions}), file=sys.stderr
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
