"""Picture of what each rank of a run did when: phases, running requests and acceptance length over time.

tools/plot_trace.py RUN --out PREFIX [--iterations A:B]

PREFIX.png for documents; PREFIX.html to zoom into, one file that needs no network; PREFIX.trace.json for
ui.perfetto.dev or chrome://tracing.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

from tlt.timeline import picture  # noqa: E402
from tlt.timeline.chrome_trace import chrome_trace  # noqa: E402
from tlt.timeline.page import page  # noqa: E402
from tlt.timeline.phases import Timeline, timeline  # noqa: E402
from tlt.timeline.records import complete_iterations, read_trace  # noqa: E402

DEFAULT_ITERATIONS = 3


def choose(text: str | None, available: Sequence[int]) -> list[int]:
    """Iterations that --iterations asks for, of those that are there. Raises ValueError naming the flag."""
    if text is None:
        return list(available[-DEFAULT_ITERATIONS:])
    match = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(match[1]), int(match[2])) if match else (1, 0)
    if first > last:
        raise ValueError(f"--iterations must be A:B, the first and the last iteration, got {text!r}")
    if first not in available or last not in available:
        raise ValueError(
            f"--iterations {text} must lie in {available[0]}:{available[-1]}, the iterations that all ranks completed"
        )
    return [iteration for iteration in available if first <= iteration <= last]


def acceptance_by_iteration(run: Path) -> dict[int, float]:
    """Mean acceptance lengths of the run's metrics; {} where nothing was drafted or metrics are missing."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    name = "spec/acceptance_length"
    return {record["iteration"]: record[name] for record in records if name in record}


def read(run: Path, iterations: str | None) -> Timeline:
    """Of a run's folder. Raises ValueError where there is nothing to draw."""
    if not run.is_dir():
        raise ValueError(f"RUN {run} must be the folder of a run (--save), there is none")
    traces = read_trace(run / "trace")
    available = list(complete_iterations(traces))
    if not available:
        raise ValueError(f"RUN {run} has no iteration that all {len(traces)} ranks completed")
    return timeline(traces, choose(iterations, available), acceptance=acceptance_by_iteration(run))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run (--save)")
    parser.add_argument("--out", type=Path, required=True, help="prefix of the .png, .html and .trace.json written")
    parser.add_argument("--iterations", help=f"A:B, first and last (default: the last {DEFAULT_ITERATIONS})")
    args = parser.parse_args()
    try:
        found = read(args.run, args.iterations)
    except ValueError as error:
        print(f"plot_trace.py: error: {error}", file=sys.stderr)
        return 2
    title = f"{args.run.resolve().name}: what each rank did"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture.draw(found, Path(f"{args.out}.png"), title=title)
    Path(f"{args.out}.html").write_text(page(found, title=title), encoding="utf-8")
    Path(f"{args.out}.trace.json").write_text(json.dumps(chrome_trace(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
