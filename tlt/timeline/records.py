"""What a run's trace folder holds: spans of each rank, and its engine steps."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ENGINE_STEPS = "engine_steps"


@dataclass(frozen=True, kw_only=True)
class Span:
    """A rank did something; times are wall-clock seconds."""

    name: str
    rank: int
    begin_s: float
    end_s: float
    iteration: int | None = None
    """Where the span names one."""
    has_failed: bool = False

    def holds(self, other: "Span | EngineSteps") -> bool:
        """The other lies within this one's time."""
        return self.begin_s <= other.begin_s and other.end_s <= self.end_s


@dataclass(frozen=True, kw_only=True)
class EngineSteps:
    """All engine steps of one rollout of a rank, N of them."""

    rank: int
    begins_s: tuple[float, ...]  # [N] wall-clock seconds
    end_s: float
    running: tuple[int, ...]  # [N] requests
    drafts: tuple[int, ...]  # [N] verified; all 0 where nothing was drafted
    accepted: tuple[int, ...]  # [N] draft tokens that stood

    @property
    def begin_s(self) -> float:
        return self.begins_s[0]


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """One rank's file."""

    rank: int
    spans: tuple[Span, ...]
    """In the order in which they began, outer ones first."""
    steps: tuple[EngineSteps, ...]


def read_trace(folder: Path) -> list[RankTrace]:
    """Of all ranks that took part in the newest start of the run, by rank. Raises ValueError where there is none."""
    files = sorted(folder.glob("rank*.jsonl"), key=lambda path: int(path.stem.removeprefix("rank")))
    traces = [trace for trace in map(read_rank, files) if trace.spans]
    if not traces:
        raise ValueError(f"{folder} holds no trace: a run writes rank<N>.jsonl there")
    # A run resumed on fewer ranks leaves the files of the others behind.
    newest = max((span.begin_s for span in traces[0].spans if span.name == "iteration"), default=0.0)
    return [trace for trace in traces if trace.spans[-1].end_s >= newest]


def read_rank(path: Path) -> RankTrace:
    """Raises ValueError naming file and line; the last line may be unfinished, of a rank that writes or was killed."""
    rank = int(path.stem.removeprefix("rank"))
    spans, steps = [], []
    for number, line in enumerate(path.read_text().split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
            if record["name"] == ENGINE_STEPS:
                steps.append(engine_steps(record))
            else:
                spans.append(
                    Span(
                        name=record["name"], rank=rank, begin_s=record["begin_s"], end_s=record["end_s"],
                        iteration=record.get("iteration"), has_failed="error" in record,
                    )
                )  # fmt: skip
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a record as a run writes them ({error!r})") from None
    spans.sort(key=lambda span: (span.begin_s, -span.end_s))
    return RankTrace(rank=rank, spans=tuple(spans), steps=tuple(steps))


def engine_steps(record: dict) -> EngineSteps:
    """Of the record that the collector writes."""
    nothing = [0] * len(record["running"])
    return EngineSteps(
        rank=record["rank"],
        begins_s=tuple(record["begin_s"] + each / 1e3 for each in record["begin_ms"]),
        end_s=record["end_s"],
        running=tuple(record["running"]),
        drafts=tuple(record.get("drafts", nothing)),
        accepted=tuple(record.get("accepted", nothing)),
    )


def complete_iterations(traces: Sequence[RankTrace]) -> dict[int, list[Span]]:
    """The span of each rank, by iteration, of those that all ranks completed; of one that was done again after a
    resume, the last."""
    spans: dict[int, dict[int, Span]] = {}
    for trace in traces:
        for span in trace.spans:
            if span.name == "iteration" and span.iteration is not None and not span.has_failed:
                spans.setdefault(span.iteration, {})[trace.rank] = span
    return {
        iteration: list(by_rank.values())
        for iteration, by_rank in sorted(spans.items())
        # Where a killed start completed it on some ranks only, theirs is another time than the others'.
        if len(by_rank) == len(traces)
        and max(span.begin_s for span in by_rank.values()) < min(span.end_s for span in by_rank.values())
    }
