"""The simulator against a real run: each iteration predicted from what all others measured, then compared.

What is taken from the iteration itself is which replica had which responses and how long these were; step times and
tokens a step by running requests, and the time around decoding, are the other iterations'. Two more tell where an
error comes from: one with the iteration's own step times, which leaves the model's error and none of a machine that
was faster or slower than before; and one that knows no length either, and draws them from the others' responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import numpy as np

from tlt.drafter.history import SuffixHistory
from tlt.rollout.outlook import Outlook
from tlt.simulation.measured import MeasuredIteration, MeasuredRun, Steps
from tlt.simulation.moves import Moves, NoMoves
from tlt.simulation.rollout import NoTraining, roll_out
from tlt.simulation.step_table import StepTable
from tlt.spec.cost_model import bin_of
from tlt.spec.step_model import Line
from tlt.types import Prompt, prompt_id_of

NUM_DRAWS = 20
"""Rollouts with drawn lengths that a mean is taken of."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds of one iteration."""

    number: int
    rollout_s: float
    predicted_rollout_s: float
    iteration_s: float
    predicted_iteration_s: float
    own_rollout_s: float
    """As the model gives it from the iteration's own step times."""
    drawn_rollout_s: float
    """Mean predicted where lengths are not known."""

    @property
    def rollout_error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_rollout_s / self.rollout_s - 1

    @property
    def own_error(self) -> float:
        """Of the model with the iteration's own step times."""
        return self.own_rollout_s / self.rollout_s - 1

    @property
    def iteration_error(self) -> float:
        return self.predicted_iteration_s / self.iteration_s - 1


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Of a run."""

    comparisons: tuple[Comparison, ...]

    @property
    def rollout_error(self) -> float:
        """Median of absolute errors."""
        return median(abs(one.rollout_error) for one in self.comparisons)

    @property
    def iteration_error(self) -> float:
        return median(abs(one.iteration_error) for one in self.comparisons)

    @property
    def own_error(self) -> float:
        return median(abs(one.own_error) for one in self.comparisons)

    @property
    def total_error(self) -> float:
        """Of the run's rollouts together."""
        predicted, measured = (
            sum(getattr(one, name) for one in self.comparisons) for name in ("predicted_rollout_s", "rollout_s")
        )
        return predicted / measured - 1

    @property
    def drawn_error(self) -> float:
        """Of the mean rollout where lengths are not known."""
        predicted, measured = (
            sum(getattr(one, name) for one in self.comparisons) for name in ("drawn_rollout_s", "rollout_s")
        )
        return predicted / measured - 1


def validate(run: MeasuredRun, flag: str) -> Validation:
    """Raises ValueError naming the flag where there is nothing to learn from."""
    if len(run.iterations) < 2:
        raise ValueError(f"{flag}: to predict one iteration from others takes 2, the run has {len(run.iterations)}")
    return Validation(
        comparisons=tuple(
            compare(run, one, [other for other in run.iterations if other is not one]) for one in run.iterations
        )
    )


def compare(run: MeasuredRun, one: MeasuredIteration, others: Sequence[MeasuredIteration]) -> Comparison:
    """`one` as predicted from `others`."""
    steps = [each for other in others for each in other.steps]
    largest = max(len(own) for iteration in (one, *others) for own in iteration.requests)
    max_running = min(largest, run.max_running)
    table, own_table = (measured_table(each, max_running=max_running) for each in (steps, one.steps))
    around_s, own_around_s = around(steps), around(one.steps)
    earlier = [other for other in others if other.number < one.number]
    predicted_s = predict(run, table, one, earlier, around_s)
    rng = np.random.default_rng(one.number)
    drawn = [predict(run, table, with_drawn_lengths(one, others, rng), earlier, around_s) for _ in range(NUM_DRAWS)]
    return Comparison(
        number=one.number, rollout_s=one.rollout_s, predicted_rollout_s=predicted_s, iteration_s=one.iteration_s,
        predicted_iteration_s=predicted_s + rest_s(others, one.num_tokens),
        own_rollout_s=predict(run, own_table, one, earlier, own_around_s), drawn_rollout_s=fmean(drawn),
    )  # fmt: skip


def around(steps: Sequence[Steps]) -> tuple[float, float]:
    """Seconds before a replica decodes alone, their mean, and after it did: the least, as others may have waited to
    take over responses."""
    return fmean(each.begin_s for each in steps), min(each.end_s for each in steps)


def measured_table(steps: Sequence[Steps], *, max_running: int) -> StepTable:
    """Mean seconds and mean tokens of the steps of each batch size, neighbouring sizes together; linear between, and
    as at the end beyond the smallest and largest. Means, not medians: a rollout takes their sum, slow ones too."""
    sums: dict[int, np.ndarray] = {}
    for each in steps:
        for running, seconds, tokens in zip(each.running, each.seconds, each.tokens, strict=True):
            if running > 0:
                found = sums.setdefault(bin_of(running), np.zeros(4))
                found += (1, running, seconds, tokens)
    if not sums:
        raise ValueError("an iteration of the run, or all others, have no engine step that only decoded")
    count, running, seconds, tokens = np.array(sorted(sums.values(), key=lambda each: each[1] / each[0])).T
    at = np.arange(1, max_running + 1)
    step_s = np.interp(at, running / count, seconds / count)
    read = Line(float(step_s[0]), max(float(step_s[-1] - step_s[0]) / max(max_running - 1, 1), 0.0))
    per_request = np.interp(at, running / count, tokens / running)
    return StepTable(tokens=[1.0, *per_request.tolist()], seconds=[0.0, *step_s.tolist()], read=read)


def predict(
    run: MeasuredRun, table: StepTable, one: MeasuredIteration, earlier: Sequence[MeasuredIteration],
    around_s: tuple[float, float],
) -> float:  # fmt: skip
    """Seconds of the rollout."""
    moves = Moves(expectation(run, one, earlier)) if run.consolidates else NoMoves()
    # The step that read its prompt gave each response its first token.
    requests = [[replace(request, num_done=min(1, request.length)) for request in own] for own in one.requests]
    begin_s = [around_s[0] if own else 0.0 for own in requests]
    return roll_out(table, requests, moves=moves, training=NoTraining(), begin_s=begin_s).duration_s + around_s[1]


def expectation(run: MeasuredRun, one: MeasuredIteration, earlier: Sequence[MeasuredIteration]) -> Outlook:
    """What the run's history told of lengths by then."""
    history = SuffixHistory(64 * 2**20)
    keys = {
        prompt_id: prompt_of(prompt_id, text)
        for other in (*earlier, one)
        for prompt_id, text in other.questions.items()
    }
    for other in earlier:
        for request in (request for own in other.requests for request in own):
            key = keys[prompt_id_of(request.name)].problem_key
            history.add(key, np.zeros(request.length, dtype=np.int32), policy_version=other.number)
    outlook = Outlook(history, tell=lambda seconds: None)
    outlook.begin([keys[prompt_id] for prompt_id in one.questions], max_response_tokens=run.longest)
    return outlook


def prompt_of(prompt_id: str, question: str) -> Prompt:
    """Equal questions are equal problems."""
    tokens = tuple(question.encode())
    return Prompt(prompt_id=prompt_id, source="", token_ids=tokens, text=question, answer={})


def with_drawn_lengths(
    one: MeasuredIteration, others: Sequence[MeasuredIteration], rng: np.random.Generator
) -> MeasuredIteration:
    """The same requests with lengths of others' responses."""
    known = [request.length for other in others for own in other.requests for request in own]
    return replace(
        one,
        requests=tuple(
            tuple(replace(request, length=int(rng.choice(known))) for request in own) for own in one.requests
        ),
    )


def rest_s(others: Sequence[MeasuredIteration], num_tokens: int) -> float:
    """Seconds of an iteration beside its rollout: a line over response tokens through the others', or their mean where
    they are fewer than three."""
    rests = np.array([other.iteration_s - other.rollout_s for other in others])
    tokens = np.array([other.num_tokens for other in others], dtype=float)
    if len(others) < 3 or np.ptp(tokens) == 0:
        return float(rests.mean())
    slope, offset = np.polyfit(tokens, rests, 1)
    return max(float(offset + slope * num_tokens), 0.0)
