"""A timeline in the Trace Event Format, which ui.perfetto.dev and chrome://tracing open.

Format: "Trace Event Format", docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from tlt.timeline.phases import Timeline

PHASES_ROW, SPANS_ROW = 0, 1


def chrome_trace(timeline: Timeline) -> dict:
    """JSON object. A rank is a process; its threads are its phases and its spans; its counters are by engine step."""
    events: list[dict] = []

    def microseconds(time_s: float) -> float:
        return round(1e6 * (time_s - timeline.begin_s), 1)

    def interval(name: str, rank: int, row: int, begin_s: float, end_s: float) -> dict:
        times = {"ts": microseconds(begin_s), "dur": round(1e6 * (end_s - begin_s), 1)}
        return {"ph": "X", "name": name, "pid": rank, "tid": row, **times}

    for rank in timeline.ranks:
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for row, name in ((PHASES_ROW, "phases"), (SPANS_ROW, "spans")):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": {"name": name}})
    events += [interval(bar.phase, bar.rank, PHASES_ROW, bar.begin_s, bar.end_s) for bar in timeline.bars]
    for span in timeline.spans:
        event = interval(span.name, span.rank, SPANS_ROW, span.begin_s, span.end_s)
        events.append(event if span.iteration is None else event | {"args": {"iteration": span.iteration}})
    for steps in timeline.steps:
        for begin_s, running, drafts, accepted in zip(
            steps.begins_s, steps.running, steps.drafts, steps.accepted, strict=True
        ):
            counter = {"ph": "C", "pid": steps.rank, "ts": microseconds(begin_s)}
            events.append(counter | {"name": "running requests", "args": {"requests": running}})
            if drafts:
                length = round(1 + accepted / drafts, 3)
                events.append(counter | {"name": "acceptance length", "args": {"tokens": length}})
        end = {"ph": "C", "pid": steps.rank, "ts": microseconds(steps.end_s)}
        events.append(end | {"name": "running requests", "args": {"requests": 0}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
