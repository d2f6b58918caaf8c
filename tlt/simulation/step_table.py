"""What an engine step brings and takes at each batch size under a strategy: all that a simulated replica asks.

Choices are made by the product's own policies and router, at the moment's acceptance. A policy that learns is first
replayed (tlt/spec/replay.py) and then asked once for each batch size as a batch drains. `adaptive` is asked with what
it would have learned of the drafters on average: requests do not differ here, so what it gains by telling them apart
is left out. Shapes: N requests that run at most, K draft tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tlt.drafter.calibration import NUM_CONFIDENCES, Calibration
from tlt.drafter.router import MATCHES, NUM_DEPTHS, SUFFIX, Candidate, DraftRouter
from tlt.spec.cost_model import CostModel, bin_of
from tlt.spec.policy import BEG_MAB, COST_MODEL, parse_policy
from tlt.spec.replay import Drift, Lengths, World, replay
from tlt.spec.step_model import StepModel, Times
from tlt.spec.strategy import ADAPTIVE, HEADS, StrategyPolicy
from tlt.types import OFF, SpecStrategy

WARM_ROLLOUTS = 3
"""Rollouts of the replay that a learning policy has seen before it is asked."""
WARM_LONGEST = 1024
"""Tokens at which its responses are cut: choices depend on batch sizes alone."""


@dataclass(frozen=True, kw_only=True)
class StepTable:
    """Of one replica; entry 0 is of no requests."""

    tokens: list[float]  # [N + 1] that each request gets of a step
    seconds: list[float]  # [N + 1] of a step, without attention to earlier tokens
    context_s: float = 0.0
    """Seconds that each token of context of the running requests adds to a step."""
    read: Times
    """Seconds in which so many tokens of prompts are read."""
    choices: tuple[str, ...] = ()  # [N + 1]
    """What is drafted, for reports."""

    @property
    def max_running(self) -> int:
        return len(self.tokens) - 1

    def decode_s(self, num_tokens: float, *, context: float) -> float:
        """Seconds of an engine step of so many requests with so long contexts, or beyond the most that can run of a
        prompt with so many tokens: what a replica weighs a move by (`worth_moving`)."""
        below = int(num_tokens)
        if below > self.max_running:
            return self.read.seconds(num_tokens)
        return self.seconds[below] + self.context_s * below * context


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What a table is made of."""

    model: StepModel
    context_s: float
    max_running: int
    contexts: Callable[[int], float]
    """Tokens of context that a request has on average while so many run."""
    lengths: Lengths
    """That a learning policy is replayed with."""


def step_table(engine: Engine, strategy: str, flag: str, *, max_running_requests: int | None = None,
               share: float = 1.0) -> StepTable:  # fmt: skip
    """Under a strategy as --spec-strategy names it; `share` is what is left of the heads' acceptance.

    Raises ValueError naming the flag."""
    policy, arms = parse_policy(strategy, flag, max_running_requests=max_running_requests)
    known = {*engine.model.drafters, ADAPTIVE}
    unknown = sorted({arm.method for arm in arms if arm.num_draft_tokens} - known)
    if unknown:
        raise ValueError(
            f"{flag} must draft with {sorted(known)}, which the costs know, got {unknown} in {strategy!r}"
        )
    if strategy.startswith((BEG_MAB, COST_MODEL)):
        warm(policy, engine, arms, share=share)
    sizes = table_sizes(engine.max_running)
    steps, names = {}, {}
    for size in reversed(sizes):  # as a batch drains
        choice = policy.choose(size)
        names[size] = str(choice)
        if choice.method == ADAPTIVE:
            steps[size] = routed(engine, size, choice.num_draft_tokens, share=share)
        else:
            share_of = share if choice.method in HEADS else 1.0
            steps[size] = engine.model.expected(choice, size, share=share_of)
    return StepTable(
        tokens=[1.0, *interpolated({size: tokens / size for size, (tokens, _) in steps.items()}, names)],
        seconds=[0.0, *interpolated({size: seconds for size, (_, seconds) in steps.items()}, names)],
        context_s=engine.context_s, read=engine.model.steps,
        choices=("", *(names[max(known for known in sizes if known <= size)] for size in range(1, sizes[-1] + 1))),
    )  # fmt: skip


def table_sizes(largest: int) -> list[int]:
    """Batch sizes that are worked out: one of each bin of the cost model, and the largest."""
    firsts = {bin_of(size): size for size in range(largest, 0, -1)}
    return sorted({*firsts.values(), largest})


def interpolated(values: dict[int, float], names: dict[int, str]) -> list[float]:
    """[N] between the sizes that were worked out; where choices differ, the smaller size's holds up to the next."""
    sizes = sorted(values)
    found: list[float] = []
    for size, next_size in zip(sizes, [*sizes[1:], sizes[-1] + 1], strict=True):
        low, high = values[size], values.get(next_size, values[size])
        slope = (high - low) / (next_size - size) if names[size] == names.get(next_size, "") else 0.0
        found += [low + slope * step for step in range(next_size - size)]
    return found


def warm(policy: StrategyPolicy, engine: Engine, arms: tuple[SpecStrategy, ...], *, share: float) -> None:
    """Let a policy learn from rollouts of the model, without attention to earlier tokens."""

    def short(rng: np.random.Generator, count: int) -> np.ndarray:
        return np.minimum(engine.lengths(rng, count), WARM_LONGEST)

    world = World(
        model=engine.model, arms=(OFF, *(arm for arm in arms if arm != OFF)),
        drift=Drift(fall=1 - share, recovery=np.inf), lengths=short, num_requests=engine.max_running,
    )  # fmt: skip
    replay(policy, world, iterations=WARM_ROLLOUTS, seed=0)


def routed(engine: Engine, num_running: int, longest: int, *, share: float) -> tuple[float, float]:
    """(tokens, seconds) of a step of so many requests that the router plans and cuts."""
    drafters = engine.model.drafters
    heads = [name for name in HEADS if name in drafters]
    router = DraftRouter(heads, max_draft_tokens=longest)
    router.begin({"": ""})
    for name in heads:
        stands = share * np.array([*drafters[name].stands, *[drafters[name].stands[-1]] * NUM_DEPTHS])[:NUM_DEPTHS]
        router.depth_rates[name, True] = Calibration(np.repeat(stands[:, None], NUM_CONFIDENCES, axis=1))
        router.calibrations[name, True] = router.depth_rates[name, True]
    candidates = [
        Candidate(
            name=str(row), group="", room=longest, is_random=True, **suffix_draft(engine, row, num_running, longest)
        )
        for row in range(num_running)
    ]
    if SUFFIX in drafters:
        stands = np.full((len(MATCHES) + 1, NUM_CONFIDENCES), drafters[SUFFIX].stands[0])
        router.calibrations[SUFFIX, True] = Calibration(stands)
    counts, passes_s, standings = [0] * num_running, 0.0, [np.zeros(0)] * num_running
    measured = costs(engine, num_running, longest)
    for _ in range(2):  # the price of a token is taken at the number that was planned last
        prices = measured.prices(num_running, router.num_planned, max_draft_tokens=num_running * longest)
        router.step = 0  # no probe
        routes = router.plan(candidates, prices, num_running=num_running)
        standings = [
            np.zeros(0) if route is None else router.standing(
                route.drafter, request="", group="", is_random=True, match_length=candidate.match_length,
                confidences=np.full(route.num_draft_tokens, 0.5),
            ) for route, candidate in zip(routes, candidates, strict=True)
        ]  # fmt: skip
        counts = router.cut(standings, [False] * num_running)
        passes_s = drafting_s(engine, [(route.drafter, route.num_draft_tokens) for route in routes if route])
    accepted = sum(float(standing[:count].sum()) for standing, count in zip(standings, counts, strict=True))
    return num_running + accepted, engine.model.steps.seconds(num_running + sum(counts)) + passes_s


def suffix_draft(engine: Engine, row: int, num_running: int, longest: int) -> dict:
    """What a request's suffix tree has found: a draft for the share of requests that the model covers."""
    has_draft = SUFFIX in engine.model.drafters and (
        row < round(engine.model.drafters[SUFFIX].covers[0] * num_running)
    )  # fmt: skip
    return {"match_length": MATCHES[-1], "probs": np.full(longest, 0.5)} if has_draft else {}


def costs(engine: Engine, num_running: int, longest: int) -> CostModel:
    """As the engine would have measured them: with the attention of so many requests in every step."""
    found = CostModel()
    attention_s = engine.context_s * num_running * engine.contexts(num_running)
    sizes = {bin_of(size): size for size in range(1, num_running * (1 + longest) + 1)}
    for size in sizes.values():
        found.observe_step(size, engine.model.steps.seconds(size) + attention_s)
    for name, drafter in engine.model.drafters.items():
        if name in HEADS:
            for size in {1, num_running}:
                found.observe_pass(name, size, drafter.passes.seconds(size))
    return found


def drafting_s(engine: Engine, routes: list[tuple[str, int]]) -> float:
    """Seconds of making the drafts (drafter, tokens): a head makes a pass for each depth."""
    seconds = 0.0
    for name in {drafter for drafter, _ in routes}:
        depths = [count for drafter, count in routes if drafter == name]
        passes = max(depths) if name in HEADS else 1
        seconds += passes * engine.model.drafters[name].passes.seconds(len(depths))
    return seconds
