"""Seconds of an iteration by phase, as the whole job waits for them, and what became of its ranks' time."""

from collections.abc import Sequence
from dataclasses import dataclass

from tlt.timeline.phases import TAIL, Bar, Timeline

ITERATION, ROLLOUT, TAIL_OF_ROLLOUT, OTHER = "iteration", "rollout", "tail", "other"
COLLECTIVE = {
    "publish": ("drafter publish",),
    "logprobs": ("old logprobs", "reference logprobs"),
    "update": ("update",),
    "sync": ("weight sync",),
}
"""Phases that all ranks are in together, and the timeline's phases that they are made of."""
PHASES = (ROLLOUT, TAIL_OF_ROLLOUT, "reward", *COLLECTIVE, OTHER, ITERATION)
UNCOUNTED = ("evaluation", "checkpoint")
"""Of the timeline: not part of what an iteration costs."""
TRAINING = "tail: drafter training"


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """One iteration of a run."""

    seconds: dict[str, float]
    """By phase. `rollout`: from the first rank's begin to the last one's end; `tail`: the part of it in which a rank
    had ended; `reward`: what is left of scoring after that; those of COLLECTIVE: mean over ranks; `other`: what no
    span names (exchange, batch building, logging); `iteration`: all of it, without evaluation and checkpoint. All but
    `tail` add up to it."""
    idle_frac: float
    """Share of rank time in which a rank waited for others' rollouts and did nothing."""
    training_frac: float
    """Share of rank time in which a rank trained the drafter instead."""


def breakdown(found: Timeline) -> Breakdown:
    """Of a timeline that has one iteration. Raises ValueError where it has several."""
    if len(found.iterations) != 1:
        raise ValueError(f"a breakdown is of one iteration, got {sorted(found.iterations)}")
    rounds = rollouts(found)
    last_ends = [max(bar.end_s for bar in together) for together in rounds]
    seconds = {
        ROLLOUT: sum(
            end_s - min(bar.begin_s for bar in together) for together, end_s in zip(rounds, last_ends, strict=True)
        ),
        TAIL_OF_ROLLOUT: sum(
            end_s - min(bar.end_s for bar in together) for together, end_s in zip(rounds, last_ends, strict=True)
        ),
        "reward": late_rewards(found, rounds),
        **{phase: sum(mean_s(found, part) for part in parts) for phase, parts in COLLECTIVE.items()},
    }
    whole_s = found.end_s - found.begin_s - sum(mean_s(found, phase) for phase in UNCOUNTED)
    named_s = sum(value for phase, value in seconds.items() if phase != TAIL_OF_ROLLOUT)
    rank_s = len(found.ranks) * whole_s
    return Breakdown(
        seconds={**seconds, OTHER: whole_s - named_s, ITERATION: whole_s},
        idle_frac=sum(each.end_s - each.begin_s for each in of_phase(found, TAIL)) / rank_s,
        training_frac=sum(each.end_s - each.begin_s for each in of_phase(found, TRAINING)) / rank_s,
    )


def of_phase(found: Timeline, phase: str, rank: int | None = None) -> list[Bar]:
    """Bars of a phase, of all ranks or of one."""
    return [bar for bar in found.bars if bar.phase == phase and rank in (None, bar.rank)]


def rollouts(found: Timeline) -> list[tuple[Bar, ...]]:
    """The bars of each rollout, one a rank, in order."""
    return list(zip(*(of_phase(found, ROLLOUT, rank) for rank in found.ranks), strict=True))


def mean_s(found: Timeline, phase: str) -> float:
    """Seconds of a rank in it. Of ranks that wait for each other now in one phase, now in the next, the longest
    times would add up to more than passed."""
    return sum(bar.end_s - bar.begin_s for bar in of_phase(found, phase)) / len(found.ranks)


def late_rewards(found: Timeline, rounds: Sequence[Sequence[Bar]]) -> float:
    """Seconds of scoring after rollouts' ends, of the slowest rank each time; scoring in the tail costs nothing."""
    total_s = 0.0
    for index, together in enumerate(rounds):
        end_s = max(bar.end_s for bar in together)
        following = rounds[index + 1] if index + 1 < len(rounds) else [None] * len(together)
        late_s = [
            bar.end_s - max(bar.begin_s, end_s)
            for own, after in zip(together, following, strict=True)
            for bar in of_phase(found, "reward", own.rank)
            if own.end_s <= bar.begin_s and (after is None or bar.begin_s < after.begin_s)
        ]
        total_s += max(0.0, *late_s) if late_s else 0.0
    return total_s
