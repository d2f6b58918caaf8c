"""Curve of a drafter that idle ranks train and of the same one frozen, judged on the same held-out responses.

tools/plot_heads.py RUN --out PICTURE.png

RUN was made with --spot-training on --spot-compare-first on. Acceptance lengths are expected ones of sampled drafts: 1
and the accepted tokens of a draft. Writes a table to standard output besides.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that it runs from any folder

CURVES = {"frozen": "spot/first_score", "drafts": "spot/live_score", "trained": "spot/candidate_score"}
NEEDED = (*CURVES.values(), "spot/steps", "spot/published")


def read(run: Path) -> list[dict]:
    """Metrics of the iterations whose tails were trained in. Raises ValueError where there are none."""
    from tlt.report.run import read_metrics

    found = [record for record in read_metrics(run / "metrics.jsonl") if all(name in record for name in NEEDED)]
    if not found:
        raise ValueError(f"RUN {run} has no trained tail that judged the first head (--spot-compare-first on)")
    return found


def table(records: list[dict]) -> str:
    """A row an iteration."""
    lines = ["| iteration | steps | frozen | drafts | trained | published |", "|---|---|---|---|---|---|"]
    for record in records:
        lengths = " | ".join(f"{1 + record[name]:.2f}" for name in CURVES.values())
        published = "yes" if record["spot/published"] else "no"
        lines.append(f"| {record['iteration']} | {record['spot/steps']:.0f} | {lengths} | {published} |")
    return "\n".join(lines)


def draw(records: list[dict], path: Path) -> dict[str, list[float]]:
    """One curve a head, by its name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    iterations = [record["iteration"] for record in records]
    curves = {label: [1 + record[name] for record in records] for label, name in CURVES.items()}
    for label, lengths in curves.items():
        axis.plot(iterations, lengths, ".-", label=label)
    axis.set_ylim(bottom=1)
    axis.set_xlabel("iteration")
    axis.set_ylabel("expected acceptance length, held-out responses")
    axis.legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return curves


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder given by --save")
    parser.add_argument("--out", type=Path, required=True, metavar="PICTURE.png", help="file to write")
    args = parser.parse_args()
    try:
        records = read(args.run)
    except ValueError as error:
        parser.error(str(error))
    draw(records, args.out)
    print(table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
