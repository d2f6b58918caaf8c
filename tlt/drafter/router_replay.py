"""What a router could make of one head, by replay: the head's drafts at every position of real responses, real costs.

Responses that were drawn together decode together, as an engine's do, and every choice of how much to draft walks the
same text. A routed choice knows of a token what a signal told of drafts in other groups; a foreseen one knows which
tokens will stand, which no router can. Not replayed: other drafters, trust in single requests, learning, probes.

Shapes: N positions of a response at which a draft may begin, D depths, B responses that still run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tlt.drafter.calibration import PRIOR_WEIGHT
from tlt.drafter.router import NUM_DEPTHS
from tlt.drafter.worth import worth_a_pass, worth_verifying

FOLDS = 4
"""Groups are split into so many; what is known of a fold's tokens comes from the others."""
PRIOR = 0.8
"""Of each cell."""
ROUNDS = 3
"""A rate is what steps came to in the round before."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Response:
    """Drafts of a head along one response: row n is the one that begins when all but N - n tokens are known."""

    fold: int
    stands: np.ndarray  # [N, D] bool: the token is the text's, if those before it are
    num_left: np.ndarray  # [N] tokens of the text that a draft at that row can be compared with, at most D
    signals: Mapping[str, np.ndarray]  # [N, D] in (0, 1) each
    runs: np.ndarray = field(init=False)  # [N] first tokens of a draft that stand

    def __post_init__(self) -> None:
        count = np.minimum(np.logical_and.accumulate(self.stands, axis=1).sum(1), self.num_left)
        object.__setattr__(self, "runs", count)

    def decided(self, depth: int) -> np.ndarray:
        """Rows whose token at this depth a verification of the whole draft would decide on."""
        return np.flatnonzero((self.runs >= depth) & (self.num_left > depth))


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds: of a step by verified tokens, and of a pass by rows, both from 0 on."""

    step_s: np.ndarray
    pass_s: np.ndarray


Choice = Callable[[Sequence[tuple[int, int]], Sequence[Response]], tuple[np.ndarray, list[int]]]
"""((index in the group, row) of each that runs, the group) -> ([B] tokens to verify, rows of each pass)."""


def fixed(count: int) -> Choice:
    """Always so many."""

    def choose(running, group):
        passes = [len(running)] * count
        return np.full(len(running), count), passes

    return choose


def foreseen(longest: int, costs: Costs) -> Choice:
    """Only what will stand, as deep as gives most tokens a second in this step: greedy, so not quite the best."""

    def choose(running, group):
        runs = np.minimum([group[index].runs[row] for index, row in running], longest)
        ways = [np.minimum(runs, depth) for depth in range(int(runs.max()) + 1)]
        passes = [[int((way > depth).sum()) for depth in range(way.max())] for way in ways]
        seconds = [
            costs.step_s[len(runs) + way.sum()] + costs.pass_s[own].sum()
            for way, own in zip(ways, passes, strict=True)
        ]
        best = int(np.argmax([(len(runs) + way.sum()) / each for way, each in zip(ways, seconds, strict=True)]))
        return ways[best], passes[best]

    return choose


class Routed:
    """As `DraftRouter` with one head: passes while they are expected to pay, then the cut."""

    def __init__(self, estimates: Mapping[Response, np.ndarray], depths: np.ndarray, longest: int, costs: Costs):
        self.estimates = estimates  # [N, D]: that a drafted token stands if those before it do
        self.depths = depths  # [D] the same before it is drafted
        self.longest = longest
        self.costs = costs
        self.rates: dict[int, float] = {}
        """Tokens a second by responses that run."""

    def __call__(self, running, group):
        size, step_s, pass_s = len(running), self.costs.step_s, self.costs.pass_s
        rate = self.rates.get(size, 0.0)
        token_s = (step_s[5 * size] - step_s[size]) / (4 * size)
        row_s = (pass_s[size] - pass_s[1]) / max(size - 1, 1)
        worth = np.zeros((size, self.longest))
        standing, passes = np.ones(size), []
        for depth in range(self.longest):
            worth_now = standing * self.depths[depth]
            wants = worth_a_pass(worth_now, rate * (token_s + row_s), rate * (pass_s[1] - row_s))
            if not wants.any():
                break
            passes.append(int(wants.sum()))
            told = np.array([self.estimates[group[index]][row, depth] for index, row in running])
            standing = np.where(wants, standing * told, 0.0)
            worth[:, depth] = standing
        rows, _ = np.nonzero(worth)
        order = np.argsort(-worth[worth > 0], kind="stable")
        falling = worth[worth > 0][order]
        kept = worth_verifying(
            falling, step_s[size : size + len(falling) + 1], sure=size, passes_s=float(pass_s[passes].sum()), rate=rate
        )
        return np.bincount(rows[order[:kept]], minlength=size), passes


def rollout_s(group: Sequence[Response], choose: Choice, costs: Costs, counts: dict[int, list] | None = None) -> float:
    """Seconds until all responses of one rank are done; [tokens, seconds] by responses that run are added to
    `counts`."""
    rows, seconds = [0] * len(group), 0.0
    while running := [(index, rows[index]) for index, one in enumerate(group) if rows[index] < len(one.runs)]:
        drafted, passes = choose(running, group)
        step = float(costs.step_s[len(running) + int(drafted.sum())] + costs.pass_s[passes].sum())
        given = [
            1 + min(int(count), int(group[index].runs[row]))
            for (index, row), count in zip(running, drafted, strict=True)
        ]
        for (index, _), tokens in zip(running, given, strict=True):
            rows[index] += tokens
        seconds += step
        if counts is not None:
            tokens_and_s = counts.setdefault(len(running), [0, 0.0])
            tokens_and_s[0] += sum(given)
            tokens_and_s[1] += step
    return seconds


def routed_s(groups: Sequence[Sequence[Response]], routed: Routed, costs: Costs) -> list[float]:
    """Seconds of each rank's rollout once rates are known."""
    for _ in range(ROUNDS):
        counts: dict[int, list] = {}
        seconds = [rollout_s(group, routed, costs, counts) for group in groups]
        routed.rates = {size: tokens / spent for size, (tokens, spent) in counts.items()}
    return seconds


def calibrated(responses: Sequence[Response], signal: str, edges: np.ndarray) -> dict[Response, np.ndarray]:
    """[N, D] estimates of each response: how often tokens of its depth and its signal's cell stood in the other
    folds."""
    tables = {}
    for fold in range(FOLDS):
        decided, stood = np.zeros((2, NUM_DEPTHS, len(edges) + 1))
        for one in responses:
            for depth in range(one.stands.shape[1] if one.fold != fold else 0):
                rows, kind = one.decided(depth), min(depth, NUM_DEPTHS - 1)
                cells = np.searchsorted(edges, one.signals[signal][rows, depth], side="right")
                np.add.at(decided[kind], cells, 1)
                np.add.at(stood[kind], cells, one.stands[rows, depth])
        tables[fold] = (stood + PRIOR_WEIGHT * PRIOR) / (decided + PRIOR_WEIGHT)
    kinds = np.minimum(np.arange(responses[0].stands.shape[1]), NUM_DEPTHS - 1)
    return {
        one: tables[one.fold][kinds, np.searchsorted(edges, one.signals[signal], side="right")]
        for one in responses
    }  # fmt: skip


def depth_rates(responses: Sequence[Response]) -> np.ndarray:
    """[D] how often a token stands if those before it do."""
    found = []
    for depth in range(responses[0].stands.shape[1]):
        own = [one.stands[one.decided(depth), depth] for one in responses]
        found.append((sum(int(each.sum()) for each in own) + 1) / (sum(map(len, own)) + 1.25))
    return np.array(found)


def explained(responses: Sequence[Response], estimates: Mapping[Response, np.ndarray]) -> float:
    """Share of the variance of standing or not that estimates explain, of all tokens that are decided on."""
    told, stood = [], []
    for one in responses:
        for depth in range(one.stands.shape[1]):
            rows = one.decided(depth)
            told.append(estimates[one][rows, depth])
            stood.append(one.stands[rows, depth])
    told, stood = np.concatenate(told), np.concatenate(stood)
    return float(1 - ((told - stood) ** 2).mean() / stood.var())
