"""A run's time as phases: at any moment a rank is in one at most, and waiting for the slowest rollout is one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tlt.timeline.records import EngineSteps, RankTrace, Span, complete_iterations

TAIL = "tail: waiting"
PHASES = {
    "rollout": ("rollout",),
    TAIL: (),
    "tail: drafter training": ("spot_training",),
    "drafter publish": ("spot_publish",),
    "reward": ("reward",),
    "old logprobs": ("old_logprobs",),
    "reference logprobs": ("ref_logprobs",),
    "update": ("update",),
    "weight sync": ("weight_sync",),
    "evaluation": ("evaluation",),
    "checkpoint": ("save",),
}
"""Names of the spans that a phase is made of. Spans within one of these count as part of it."""
PHASE_OF = {name: phase for phase, names in PHASES.items() for name in names}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A rank was in a phase; wall-clock seconds."""

    phase: str
    rank: int
    begin_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Neighbouring iterations of a run."""

    iterations: dict[int, tuple[float, float]]
    """(begin, end) of each in wall-clock seconds: first rank's begin, last rank's end."""
    ranks: tuple[int, ...]
    bars: tuple[Bar, ...]
    """Of one rank they do not overlap."""
    spans: tuple[Span, ...]
    """As traced, nested."""
    steps: tuple[EngineSteps, ...]
    acceptance: dict[int, float] = field(default_factory=dict)
    """Mean acceptance length by iteration, from the run's metrics."""

    @property
    def begin_s(self) -> float:
        return min(begin_s for begin_s, _ in self.iterations.values())

    @property
    def end_s(self) -> float:
        return max(end_s for _, end_s in self.iterations.values())

    def seconds(self) -> dict[str, dict[int, float]]:
        """By phase and rank; phases that take no time are left out."""
        total: dict[str, dict[int, float]] = {}
        for phase in PHASES:
            bars = [bar for bar in self.bars if bar.phase == phase]
            if bars:
                total[phase] = {
                    rank: sum(bar.end_s - bar.begin_s for bar in bars if bar.rank == rank) for rank in self.ranks
                }
        return total


def timeline(
    traces: Sequence[RankTrace], iterations: Sequence[int], *, acceptance: dict[int, float] | None = None
) -> Timeline:
    """Of `iterations`, which must be complete."""
    complete = complete_iterations(traces)
    chosen = {iteration: complete[iteration] for iteration in iterations}
    bars, spans, steps = [], [], []
    for windows in chosen.values():
        parts = [
            [span for span in trace.spans if window.holds(span)]
            for trace, window in zip(traces, windows, strict=True)
        ]  # fmt: skip
        outer = [outermost(part) for part in parts]
        bars += [bar for part in outer for bar in as_bars(part)]
        bars += tails(outer)
        spans += [span for part in parts for span in part]
        steps += [
            each
            for trace, window in zip(traces, windows, strict=True)
            for each in trace.steps
            if window.holds(each)
        ]  # fmt: skip
    return Timeline(
        iterations={
            iteration: (min(span.begin_s for span in windows), max(span.end_s for span in windows))
            for iteration, windows in chosen.items()
        },
        ranks=tuple(trace.rank for trace in traces),
        bars=tuple(bars),
        spans=tuple(spans),
        steps=tuple(steps),
        acceptance={key: value for key, value in (acceptance or {}).items() if key in chosen},
    )


def outermost(spans: Iterable[Span]) -> list[Span]:
    """Spans of phases that lie within no other phase's, of one rank's in the order in which they began."""
    found: list[Span] = []
    for span in spans:
        if span.name in PHASE_OF and not (found and found[-1].holds(span)):
            found.append(span)
    return found


def as_bars(spans: Iterable[Span]) -> list[Bar]:
    """One for each span of a phase."""
    return [
        Bar(phase=PHASE_OF[span.name], rank=span.rank, begin_s=span.begin_s, end_s=span.end_s) for span in spans
    ]  # fmt: skip


def tails(ranks: Sequence[Sequence[Span]]) -> list[Bar]:
    """Each rank's waiting between the end of its own rollout and the last rank's, without what it does meanwhile.

    `ranks` has an iteration's outermost spans of each rank. An iteration may have several rollouts, all of all ranks.
    """
    rollouts = [[span for span in spans if span.name == "rollout"] for spans in ranks]
    bars = []
    for together in zip(*rollouts, strict=True):
        end_s = max(span.end_s for span in together)
        for own, spans in zip(together, ranks, strict=True):
            busy = [span for span in spans if own.end_s <= span.begin_s < end_s]
            begins = [own.end_s, *(span.end_s for span in busy)]
            ends = [*(span.begin_s for span in busy), end_s]
            bars += [
                Bar(phase=TAIL, rank=own.rank, begin_s=first_s, end_s=last_s)
                for first_s, last_s in zip(begins, ends, strict=True)
                if first_s < last_s
            ]
    return bars
