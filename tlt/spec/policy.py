"""Reads what --spec-strategy says: one strategy, a schedule by batch size, or the arms of a policy that learns.

`eagle:4`, `off`; `schedule@1=eagle:6/5=eagle:3/17=off`; `beg-mab@1=eagle:6|suffix:8/5=eagle:3|suffix:4`;
`cost-model@eagle:2|eagle:6|suffix:8`.
"""

from collections.abc import Sequence

from tlt.config.requirement import is_count, require
from tlt.spec.bandit import BegMab
from tlt.spec.cost_policy import CostModelPolicy
from tlt.spec.strategy import ADAPTIVE, METHODS, FixedStrategy, Schedule, StrategyPolicy, parse_strategy
from tlt.types import SpecStrategy

SCHEDULE, BEG_MAB, COST_MODEL = "schedule@", "beg-mab@", "cost-model@"
ONE_DRAFTER = tuple(method for method in METHODS if method != ADAPTIVE)
"""A cost model knows an arm by its drafter's record; `adaptive` mixes drafters."""
EPSILON, WINDOW = 0.05, 50
"""Of the bandit: share of random choices, and steps of an arm that its median is taken of."""


def parse_policy(
    text: str, flag: str, *, max_running_requests: int | None = None, seed: int = 0
) -> tuple[StrategyPolicy, tuple[SpecStrategy, ...]]:
    """(policy, all strategies it may choose). Raises ValueError naming the flag."""
    require(
        max_running_requests is None or takes_threshold(text),
        "--spec-max-running-requests",
        max_running_requests,
        f"left out with {flag} {text}, which decides at each batch size itself",
    )
    if text.startswith(SCHEDULE):
        rows = [(first, only(arms, text, flag)) for first, arms in parse_rows(text.removeprefix(SCHEDULE), flag)]
        return named(flag, lambda: Schedule(rows)), tuple(strategy for _, strategy in rows)
    if text.startswith(BEG_MAB):
        buckets = parse_rows(text.removeprefix(BEG_MAB), flag)
        policy = named(flag, lambda: BegMab(buckets, epsilon=EPSILON, window=WINDOW, seed=seed))
        return policy, tuple(arm for _, arms in buckets for arm in arms)
    if text.startswith(COST_MODEL):
        arms = [parse_strategy(arm, flag, methods=ONE_DRAFTER) for arm in text.removeprefix(COST_MODEL).split("|")]
        return CostModelPolicy(arms), tuple(arms)
    strategy = parse_strategy(text, flag)
    return FixedStrategy(strategy, max_running_requests=max_running_requests), (strategy,)


def takes_threshold(text: str) -> bool:
    """Whether a number of running requests, above which it is off, means anything to a policy."""
    return not text.startswith((SCHEDULE, BEG_MAB, COST_MODEL))


def parse_rows(text: str, flag: str) -> list[tuple[int, list[SpecStrategy]]]:
    """(smallest batch, its strategies) of `<batch>=<strategy>|<strategy>/...`."""
    rows = []
    for row in text.split("/"):
        first, equals, arms = row.partition("=")
        if not equals or not is_count(first):
            raise ValueError(f"{flag}: a row must be `<smallest batch>=<strategy>`, got {row!r}")
        rows.append((int(first), [parse_strategy(arm, flag) for arm in arms.split("|")]))
    return rows


def only(arms: Sequence[SpecStrategy], text: str, flag: str) -> SpecStrategy:
    """The one strategy of a schedule's row."""
    if len(arms) != 1:
        raise ValueError(f"{flag}: a schedule has one strategy for each batch size, got {text!r}")
    return arms[0]


def named(flag: str, make):
    """Build, with the flag's name in front of what is wrong."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
