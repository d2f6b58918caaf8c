"""Numbers over time that a picture shows below the phases. Times are wall-clock seconds."""

import math

from tlt.timeline.phases import Timeline
from tlt.timeline.records import EngineSteps

NUM_BINS = 150
"""Over the whole picture: a step's few drafts say little, and a line that jumps at each says nothing."""


def running_requests(timeline: Timeline, rank: int) -> tuple[list[float], list[int]]:
    """(times [M], requests [M]): from each time on, until the next, that many ran; 0 outside rollouts."""
    times, values = [timeline.begin_s], [0]
    for steps in steps_of(timeline, rank):
        for time_s, value in [*zip(steps.begins_s, steps.running, strict=True), (steps.end_s, 0)]:
            if value != values[-1]:
                times.append(time_s)
                values.append(value)
    return [*times, timeline.end_s], [*values, 0]


def acceptance_lengths(timeline: Timeline, rank: int) -> tuple[list[float], list[float]]:
    """(times [M], lengths [M]): mean tokens per verification around each time, NaN where nothing was verified."""
    width_s = (timeline.end_s - timeline.begin_s) / NUM_BINS
    drafts, accepted = [0] * NUM_BINS, [0] * NUM_BINS
    for steps in steps_of(timeline, rank):
        for begin_s, num_drafts, num_accepted in zip(steps.begins_s, steps.drafts, steps.accepted, strict=True):
            index = min(int((begin_s - timeline.begin_s) / width_s), NUM_BINS - 1)
            drafts[index] += num_drafts
            accepted[index] += num_accepted
    return (
        [timeline.begin_s + (index + 0.5) * width_s for index in range(NUM_BINS)],
        [1 + accepted[index] / drafts[index] if drafts[index] else math.nan for index in range(NUM_BINS)],
    )


def steps_of(timeline: Timeline, rank: int) -> list[EngineSteps]:
    """A rank's rollouts, in order."""
    return [steps for steps in timeline.steps if steps.rank == rank]


def iteration_lengths(timeline: Timeline) -> list[tuple[float, float, float]]:
    """(begin, end, mean acceptance length) of each iteration's rollouts, where the run's metrics have it."""
    found = []
    for iteration, length in timeline.acceptance.items():
        begin_s, end_s = timeline.iterations[iteration]
        rollouts = [bar for bar in timeline.bars if bar.phase == "rollout" and begin_s <= bar.begin_s < end_s]
        if rollouts:
            found.append((min(bar.begin_s for bar in rollouts), max(bar.end_s for bar in rollouts), length))
    return found


def has_running_requests(timeline: Timeline) -> bool:
    """The trace has engine steps."""
    return bool(timeline.steps)


def has_drafts(timeline: Timeline) -> bool:
    """The trace has engine steps that verified drafts."""
    return any(any(steps.drafts) for steps in timeline.steps)
