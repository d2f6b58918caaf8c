"""Report on runs as one HTML file: curves, time by phase, drafters, decisions, what each rank did, settings.

tools/report.py RUN... --out FILE.html
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs from any folder

from tlt.report.document import document  # noqa: E402
from tlt.report.run import read_run  # noqa: E402


def names_of(folders: Sequence[Path]) -> list[str]:
    """Of runs: the last parts of their paths, as many as tell them apart. Raises ValueError where a run is twice
    there."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise ValueError("RUN: the same folder is given twice")
    count = next(
        count for count in range(1, 1 + max(map(len, parts))) if len({p[-count:] for p in parts}) == len(parts)
    )
    return ["/".join(part[-count:]) for part in parts]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a run (--save)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="HTML to write")
    parser.add_argument("--last-iterations", type=int, default=2, metavar="N",
                        help="that are drawn rank by rank (default: 2)")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        if args.last_iterations < 1:
            raise ValueError(f"--last-iterations must be at least 1, got {args.last_iterations}")
        runs = [read_run(folder, name) for folder, name in zip(args.runs, names_of(args.runs), strict=True)]
    except ValueError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    title = f"{len(runs)} runs" if len(runs) > 1 else f"Run {runs[0].name}"
    args.out.write_text(document(runs, title=title, last_iterations=args.last_iterations), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
