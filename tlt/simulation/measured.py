"""What a real run's folder says of its iterations: who generated what, how long its engine steps took, and in all.

Read from `run.json`, `metrics.jsonl`, `rollouts/train_*.jsonl` (--rollout-save-interval 1) and `trace/`.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tlt.simulation.lengths import ROLLOUTS
from tlt.simulation.replica import Request
from tlt.timeline.records import RankTrace, Span, complete_iterations, read_trace
from tlt.types import rollout_name

APART = ("evaluation", "save")
"""Spans that not every iteration has."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Engine steps of one replica in one rollout, M of them, the prompts' apart."""

    running: tuple[int, ...]  # [M] requests
    seconds: tuple[float, ...]  # [M] from a step's beginning to the next one's
    tokens: tuple[int, ...]  # [M] of all requests
    begin_s: float
    """From the beginning of the world's rollout to the first step that only decoded: its prompts."""
    end_s: float
    """From the last step's end to the replica's."""


@dataclass(frozen=True, kw_only=True)
class MeasuredIteration:
    """Of a run; R replicas."""

    number: int
    requests: tuple[tuple[Request, ...], ...]  # [R]
    questions: dict[str, str]
    """By prompt id: what is the same whenever a problem comes again."""
    steps: tuple[Steps, ...]  # [R]
    rollout_s: float
    iteration_s: float
    """From the first rank's beginning to the last one's end, without evaluation and checkpoint."""

    @property
    def num_tokens(self) -> int:
        return sum(request.length for own in self.requests for request in own)


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """Iterations that can be compared, and why the others cannot."""

    strategy: str
    consolidates: bool
    max_running: int
    longest: int
    iterations: tuple[MeasuredIteration, ...]
    left_out: dict[int, str]


def read_run(folder: Path, flag: str) -> MeasuredRun:
    """Raises ValueError naming the flag where the folder lacks what is needed."""
    for name in ("run.json", "metrics.jsonl", "trace", ROLLOUTS):
        if not (folder / name).exists():
            raise ValueError(f"{flag} {folder} has no {name}; a run with --rollout-save-interval 1 has all")
    start = json.loads((folder / "run.json").read_text())["starts"][-1]
    rollout = start["config"]["rollout"]
    tp_size = rollout["tensor_parallel_size"]
    metrics = {one["iteration"]: one for one in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    traces = read_trace(folder / "trace")
    windows = complete_iterations(traces)
    iterations, left_out = [], {}
    for number, spans in windows.items():
        path = folder / ROLLOUTS / f"train_{number:07d}.jsonl"
        if number not in metrics or not path.is_file():
            left_out[number] = "its responses or metrics were not logged"
        elif metrics[number].get("rl/sampling_rounds", 1.0) > 1:
            left_out[number] = "it has several rollouts (--rl-refill-rounds)"
        else:
            records = [json.loads(line) for line in path.read_text().splitlines()]
            measured_s = metrics[number]["rollout/duration_s"]
            iterations.append(
                measured_iteration(number, records, traces[::tp_size], spans[::tp_size], rollout_s=measured_s)
            )
    if not iterations:
        raise ValueError(f"{flag} {folder} has no iteration to compare: {left_out or 'no rank completed one'}")
    return MeasuredRun(
        strategy=start["config"]["spec"]["strategy"], consolidates=rollout["consolidate_tail"] == "on",
        max_running=rollout["max_num_seqs"], longest=rollout["max_response_tokens"],
        iterations=tuple(iterations), left_out=left_out,
    )  # fmt: skip


def measured_iteration(
    number: int, records: Sequence[dict], traces: Sequence[RankTrace], windows: Sequence[Span], *, rollout_s: float
) -> MeasuredIteration:
    """`traces` and `windows` are those of each replica's first rank."""
    requests = placed(records, len(traces))
    spans = [first_rollout(trace, window) for trace, window in zip(traces, windows, strict=True)]
    begin_s = min(span.begin_s for span in spans)
    return MeasuredIteration(
        number=number, requests=requests,
        questions={record["prompt_id"]: record["question"] for record in records},
        steps=tuple(
            decode_steps(trace, span, begin_s=begin_s) for trace, span in zip(traces, spans, strict=True)
        ),
        rollout_s=rollout_s,
        iteration_s=max(span.end_s for span in windows) - min(span.begin_s for span in windows)
        - sum(span.end_s - span.begin_s for span in traces[0].spans if span.name in APART and windows[0].holds(span)),
    )  # fmt: skip


def placed(records: Sequence[dict], num_replicas: int) -> tuple[tuple[Request, ...], ...]:
    """[R] requests of each replica: a group begins on one, where most of its responses ended."""
    groups: dict[str, list[dict]] = {}
    for record in records:
        groups.setdefault(record["prompt_id"], []).append(record)
    requests: list[list[Request]] = [[] for _ in range(num_replicas)]
    for prompt_id, group in groups.items():
        ((replica, _),) = Counter(record["replica"] for record in group).most_common(1)
        requests[replica] += [
            Request(
                name=rollout_name(prompt_id, record["sample"]), num_prompt_tokens=len(record["prompt_token_ids"]),
                length=len(record["token_ids"]),
            ) for record in group
        ]  # fmt: skip
    return tuple(map(tuple, requests))


def first_rollout(trace: RankTrace, window: Span) -> Span:
    """Of an iteration: an evaluation's rollouts come after it."""
    return next(span for span in trace.spans if span.name == "rollout" and window.holds(span))


def decode_steps(trace: RankTrace, span: Span, *, begin_s: float) -> Steps:
    """Of a replica's rollout. The trace notes how many requests are left after each step, which the next one has."""
    steps = next((each for each in trace.steps if span.holds(each)), None)
    if steps is None:
        return Steps(running=(), seconds=(), tokens=(), begin_s=span.end_s - begin_s, end_s=0.0)
    first, last = num_reading(steps.running), len(steps.running) - 1
    bounds = [*steps.begins_s, steps.end_s]
    # After a step that left nothing a replica may have waited for responses to take over: not the step's time.
    chosen = [index for index in range(first, last + 1) if steps.running[index] > 0 or index == last]
    return Steps(
        running=tuple(steps.running[index - 1] for index in chosen),
        seconds=tuple(bounds[index + 1] - bounds[index] for index in chosen),
        tokens=tuple(steps.running[index - 1] + steps.accepted[index] for index in chosen),
        begin_s=bounds[first] - begin_s,
        end_s=span.end_s - steps.end_s,
    )


def num_reading(running: Sequence[int]) -> int:
    """Steps at the beginning that read prompts, by the requests left after each: the first, and those after which more
    run than before. Responses that a replica takes over later are no prompts."""
    last = 0
    for index, (before, after) in enumerate(pairwise(running), start=1):
        if after < before:
            break
        if after > before:
            last = index
    return last + 1
