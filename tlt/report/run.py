"""A run's folder as reports read it: its metrics, what it was, and its trace."""

import json
from dataclasses import dataclass
from pathlib import Path

from tlt.timeline.breakdown import Breakdown, breakdown
from tlt.timeline.phases import Timeline, timeline
from tlt.timeline.records import RankTrace, complete_iterations, read_trace

Point = tuple[float, float]
"""(iteration, value)"""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run left behind."""

    name: str
    metrics: tuple[dict, ...]
    """Of each iteration, 0 (the evaluation before the first) included."""
    starts: tuple[dict, ...]
    """run.json, the newest start last."""
    traces: tuple[RankTrace, ...]

    def series(self, metric: str) -> list[Point]:
        """A metric's values, where the run has them."""
        return [
            (float(record["iteration"]), float(record[metric]))
            for record in self.metrics
            if record.get(metric) is not None
        ]  # fmt: skip

    def mean(self, metric: str, iterations: set[int] | None = None) -> float | None:
        """Of a metric over iterations (all that have it); None where there is none."""
        values = [value for iteration, value in self.series(metric) if iterations is None or iteration in iterations]
        return sum(values) / len(values) if values else None

    def names(self) -> list[str]:
        """Of all metrics, in order of appearance."""
        return list(dict.fromkeys(name for record in self.metrics for name in record))

    def complete_iterations(self) -> list[int]:
        """Those that all ranks completed, as far as the trace says."""
        return list(complete_iterations(self.traces))

    def warm_iterations(self) -> set[int]:
        """Complete ones but for the first of each start, which has whatever a start leaves for the first use."""
        first = self.traces[0].spans
        starts = [span.end_s for span in first if span.name == "build_engine"]
        begins = [span.begin_s for span in first if span.name == "iteration"]
        cold = {min((begin for begin in begins if begin >= start), default=None) for start in starts}
        complete = complete_iterations(self.traces)
        return {iteration for iteration, spans in complete.items() if spans[0].begin_s not in cold}

    def timeline(self, iterations: list[int]) -> Timeline:
        """Of iterations that are complete."""
        acceptance = {int(iteration): length for iteration, length in self.series("spec/acceptance_length")}
        return timeline(self.traces, iterations, acceptance=acceptance)

    def breakdowns(self) -> dict[int, Breakdown]:
        """Of every complete iteration."""
        return {iteration: breakdown(self.timeline([iteration])) for iteration in self.complete_iterations()}


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """Of a folder given by --save. Raises ValueError naming the file that is missing or is not what a run writes."""
    if not folder.is_dir():
        raise ValueError(f"RUN {folder} must be the folder of a run (--save), there is none")
    return RunRecord(
        name=name or folder.resolve().name,
        metrics=tuple(read_metrics(folder / "metrics.jsonl")),
        starts=tuple(read_starts(folder / "run.json")),
        traces=tuple(read_trace(folder / "trace")),
    )


def read_metrics(path: Path) -> list[dict]:
    """One object an iteration; an unfinished last line, of a run that writes, is left out."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: a run writes it after its first evaluation or iteration")
    records = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            record["iteration"] + 0
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not metrics as a run writes them ({error!r})") from None
        records.append(record)
    return records


def read_starts(path: Path) -> list[dict]:
    """All starts of a run."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: a run writes it when it starts")
    try:
        return json.loads(path.read_text())["starts"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not what a run writes ({error!r})") from None
