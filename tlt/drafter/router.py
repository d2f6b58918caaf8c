"""Who drafts for each request, and how many tokens: what each draft token is worth against what it costs.

A draft token is worth the probability that it and all before it stand; it costs the seconds of one more verified
token and of the pass that drafts it, at the rate of tokens a second that steps of so many requests came to lately, or
that this one can come to if that is less. Taking what is worth more than it costs maximises tokens over seconds
(Dinkelbach, Management Science 13(7), 1967): over all steps, not in each, or a step of sure drafts would refuse what
a poor one takes. Probabilities come from verified drafts: a calibration of each drafter's own confidence, times how
this request, and the group it is in, kept to it so far.

Nothing here knows the token that is being verified or reads a clock: decisions are functions of past drafts, past
tokens and of prices that all ranks share. Shapes: B requests, K draft tokens, M confidence cells.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from tlt.drafter.calibration import NUM_CONFIDENCES, Calibration, cell_centres
from tlt.drafter.trust import Trust
from tlt.drafter.worth import paying_depth, take, trusted, worth_a_pass, worth_verifying
from tlt.spec.cost_model import NO_PRICES, Prices

SUFFIX = "suffix"
MATCHES = (2, 3, 4, 5, 7, 10, 16)
MATCH_EDGES = np.array(MATCHES)
"""Borders of the match-length kinds of suffix drafts."""
NUM_DEPTHS = 6
"""Kinds of learned drafts: their depths, the last one for all deeper tokens."""
SPARE = 0.5
"""Share of its price that a suffix token must be worth to be proposed; which ones are verified is decided later."""
PROBE_STEPS, PROBE_TOKENS = 64, 2
"""Every so many engine steps (and at EARLY_PROBES) drafts are made whatever they cost, so that a drafter that was not
worth it can show that it is now."""
EARLY_PROBES = (4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One request that may get drafts."""

    name: str
    group: str
    room: int
    """Draft tokens of use."""
    is_random: bool
    match_length: int = 0
    probs: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """[K] of its suffix draft, by the tree's counts."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """One request's drafter and draft tokens at most."""

    drafter: str
    num_draft_tokens: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to draft for all rows."""

    drafters: list[str]  # [B]
    num: np.ndarray  # [B] draft tokens
    net: float
    """Worth beyond the price, in tokens."""
    gain: float
    """Expected accepted tokens."""
    passes_s: float
    """Seconds of the heads' passes."""
    cost_s: float
    """These and the verification."""


def suffix_prior() -> np.ndarray:
    """[match kinds, M]: a short match's counts mean little."""
    trust = np.array([0.35, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95])
    return trust[:, None] * cell_centres()[None, :]


class DraftRouter:
    """Of one engine; `learned` names its heads in the order of preference where their worth is equal."""

    def __init__(self, learned: Sequence[str], *, max_draft_tokens: int):
        self.learned = tuple(learned)
        self.max_draft_tokens = max_draft_tokens
        depths = np.repeat(cell_centres()[None, :], NUM_DEPTHS, axis=0)
        # Tables of greedy and of random text apart: an evaluation must not spoil what training needs.
        self.calibrations = {
            (name, is_random): Calibration(suffix_prior() if name == SUFFIX else depths)
            for name in (SUFFIX, *self.learned) for is_random in (False, True)
        }  # fmt: skip
        # Before a head has drafted its confidence is unknown: then its depths alone tell, a table of one column.
        self.depth_rates = {
            (name, is_random): Calibration(np.full((NUM_DEPTHS, NUM_CONFIDENCES), 0.7))
            for name in self.learned for is_random in (False, True)
        }  # fmt: skip
        self.requests: dict[tuple[str, str], Trust] = {}
        self.groups: dict[tuple[str, str], Trust] = {}
        self.sources: dict[tuple[str, str], Trust] = {}
        """Of data sources, which outlive a rollout: a head trained on one may be worth little on another."""
        self.source_of: Mapping[str, str] = {}
        self.step = 0
        self.is_probe = False
        self.prices = NO_PRICES
        self.rate = self.passes_s = 0.0
        self.num_running = 0
        self.num_planned = 0
        """Draft tokens that were verified last: about so many will be in the next step."""

    def begin(self, sources: Mapping[str, str]) -> None:
        """A rollout begins: requests and groups are new; `sources` names each group's data source."""
        self.source_of = sources
        self.requests.clear()
        self.groups.clear()

    def drafter_changed(self, name: str, *, share: float = 0.2) -> None:
        """A head was replaced: little of what is known of it holds."""
        for is_random in (False, True):
            self.calibrations[name, is_random].doubt(share)
            self.depth_rates[name, is_random].doubt(share)
        self.sources = {key: trust for key, trust in self.sources.items() if key[0] != name}

    def state_dict(self) -> dict:
        """What outlives a rollout, JSON types."""
        return {
            "step": self.step,
            "tables": [
                {"drafter": name, "is_random": is_random, "confidences": table.state_dict()}
                | ({"depths": self.depth_rates[name, is_random].state_dict()} if name in self.learned else {})
                for (name, is_random), table in self.calibrations.items()
            ],
            "sources": [
                {"drafter": name, "source": source, "trust": asdict(trust)}
                for (name, source), trust in self.sources.items()
            ],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping) -> None:
        """Go on with what was learned of the drafters that are here too."""
        self.step = state["step"]
        for row in state["tables"]:
            key = row["drafter"], row["is_random"]
            if key in self.calibrations:
                self.calibrations[key].load_state_dict(row["confidences"])
            if key in self.depth_rates:
                self.depth_rates[key].load_state_dict(row["depths"])
        self.sources = {(row["drafter"], row["source"]): Trust(**row["trust"]) for row in state["sources"]}

    def plan(self, candidates: Sequence[Candidate], prices: Prices, *, num_running: int) -> list[Route | None]:
        """[B] routes for one engine step; None drafts nothing."""
        self.step += 1
        if not candidates:
            return []
        self.prices, self.is_probe = prices, is_probe(self.step)
        worth = {SUFFIX: self._suffix_worth(candidates)} | {
            name: self._learned_worth(name, candidates) for name in self.learned
        }
        rate = num_running / prices.step_s if prices.step_s > 0 else 0.0
        # The rate that a plan reaches is the rate at which it should have weighed costs: three rounds are near enough.
        for _ in range(1 if self.is_probe else 3):
            self.rate = 0.0 if self.is_probe else rate
            routes, best = self._choose(candidates, worth)
            rate = (num_running + best.gain) / (prices.step_s + best.cost_s) if prices.step_s > 0 else 0.0
        if prices.rate is not None and prices.rate < self.rate:
            self.rate = prices.rate
            routes, best = self._choose(candidates, worth)
        self.num_running, self.passes_s = num_running, best.passes_s
        return routes

    def _choose(self, candidates: Sequence[Candidate], worth: dict) -> tuple[list[Route | None], "Plan"]:
        """(routes, the plan that they come of) at the present rate: the best of what the drafters can do."""
        longest = PROBE_TOKENS if self.is_probe else self.max_draft_tokens
        suffix = take(worth[SUFFIX], self.rate * self.prices.token_s, longest)
        plans = [
            self._evaluate(heads, suffix, worth, longest)
            for heads in self._assignments(suffix, worth, longest, len(candidates))
        ]
        best = max(plans, key=lambda plan: plan.net)
        num = best.num
        if not self.is_probe:
            # A suffix draft is there whole; how much of it is verified is decided with all drafts at hand.
            spare = take(worth[SUFFIX], SPARE * self.rate * self.prices.token_s, longest)[0]
            num = np.where([name == SUFFIX for name in best.drafters], spare, num)
        routes = [
            Route(drafter=name, num_draft_tokens=int(count)) if count else None
            for name, count in zip(best.drafters, num, strict=True)
        ]
        return routes, best

    def cut(self, standings: Sequence[np.ndarray], is_fixed: Sequence[bool]) -> list[int]:
        """How many tokens of each draft to verify: those that together are worth most beyond the measured time of
        verifying so many. `standings` [K] of each draft are `standing`; a fixed one is verified whole."""
        counts = np.array([len(one) for one in standings])
        if not self.is_probe and self.prices.verify_s and self.prices.step_s > 0:
            free = [row for row in range(len(standings)) if not is_fixed[row]]
            worth = np.concatenate([np.zeros(0), *(standings[row] for row in free)])
            order = np.argsort(-worth, kind="stable")  # stable: tokens of a draft stay in order
            rows = np.repeat(free, counts[free])[order] if free else np.zeros(0, dtype=int)
            fixed = int(counts.sum()) - len(worth)
            verify_s = np.array(self.prices.verify_s[fixed : fixed + len(worth) + 1])
            sure = self.num_running + sum(float(one.sum()) for row, one in enumerate(standings) if is_fixed[row])
            count = worth_verifying(worth[order], verify_s, sure=sure, passes_s=self.passes_s, rate=self.rate)
            kept = np.bincount(rows[:count], minlength=len(standings))
            counts = np.where(is_fixed, counts, kept)
        self.num_planned = int(counts.sum())
        return counts.tolist()

    def standing(
        self, drafter: str, *, request: str, group: str, is_random: bool, match_length: int, confidences: np.ndarray
    ) -> np.ndarray:
        """[K] probability that each token of a draft and all before it stand."""
        kinds = token_kinds(drafter, match_length, len(confidences))
        stands = self.calibrations[drafter, is_random].estimate(np.array(kinds, dtype=int), confidences)
        return np.cumprod(trusted(stands, self.factor(drafter, request, group)))

    def _assignments(
        self, suffix: tuple[np.ndarray, np.ndarray, np.ndarray], worth: dict, longest: int, num_rows: int
    ) -> list[list[str]]:
        """Ways to give heads to rows, "" being none: none, each head where it beats the suffix draft, and each row its
        best. At a probe every second row has a head, another one each time."""
        if self.is_probe and self.learned:
            turn = probes_until(self.step)
            name = self.learned[turn // 2 % len(self.learned)]
            return [[name if (row + turn) % 2 == 0 else "" for row in range(num_rows)]]
        nets = {
            name: take(worth[name], self.rate * self._row_s(name), longest)[1] for name in self.learned
        }  # fmt: skip
        ways = [[""] * num_rows]
        ways += [[name if own > other else "" for own, other in zip(net, suffix[1], strict=True)]
                 for name, net in nets.items()]  # fmt: skip
        if len(self.learned) > 1:
            stacked = np.stack([suffix[1], *nets.values()])
            ways.append([("", *self.learned)[index] for index in stacked.argmax(0)])
        return ways

    def _evaluate(self, heads: list[str], suffix: tuple, worth: dict, longest: int) -> "Plan":
        """What an assignment brings; a head whose rows do not pay for one pass leaves them to the suffix drafter."""
        num, net, gain = (part.copy() for part in suffix)
        drafters = [SUFFIX] * len(heads)
        passes_s = rows_s = 0.0
        for name in sorted(set(heads) - {""}):
            mine = np.array([head == name for head in heads])
            price, pass_price = self.rate * self._row_s(name), self.rate * self.prices.pass_s.get(name, 0.0)
            wanted = take(worth[name], price, longest)[0] * mine
            depth = paying_depth(worth[name], wanted, price, pass_price, net * mine)
            if self.is_probe:
                depth = longest
            own_num, own_net, own_gain = take(worth[name], price, min(longest, depth))
            mine &= own_num > 0
            if depth == 0 or not mine.any():
                continue
            num, gain = np.where(mine, own_num, num), np.where(mine, own_gain, gain)
            net = np.where(mine, own_net, net)
            net[np.argmax(mine)] -= pass_price * depth
            passes_s += depth * self.prices.pass_s.get(name, 0.0)
            rows_s += float(own_num[mine].sum()) * self.prices.row_s.get(name, 0.0)
            drafters = [name if one else drafter for one, drafter in zip(mine, drafters, strict=True)]
        passes_s += rows_s
        cost_s = float(num.sum()) * self.prices.token_s + passes_s
        return Plan(
            drafters=drafters, num=num, net=float(net.sum()), gain=float(gain.sum()), passes_s=passes_s, cost_s=cost_s
        )  # fmt: skip

    def _row_s(self, name: str) -> float:
        """Seconds of one more token that a head drafts and the policy verifies, its pass being made anyway."""
        return self.prices.token_s + self.prices.row_s.get(name, 0.0)

    def _suffix_worth(self, candidates: Sequence[Candidate]) -> np.ndarray:
        """[B, K] probability that each token of the suffix draft and all before it stand; 0 behind its end."""
        width = self.max_draft_tokens
        confidence = np.zeros((len(candidates), width))
        for row, candidate in enumerate(candidates):
            count = min(len(candidate.probs), candidate.room, width)
            confidence[row, :count] = candidate.probs[:count]
        matches = np.array([candidate.match_length for candidate in candidates])
        kinds = match_kinds(matches[:, None] + np.arange(width))
        stands = np.empty(confidence.shape)
        for kind in {candidate.is_random for candidate in candidates}:
            rows = np.array([candidate.is_random == kind for candidate in candidates])
            stands[rows] = self.calibrations[SUFFIX, kind].estimate(kinds[rows], confidence[rows])
        return self._chained(SUFFIX, candidates, stands) * (confidence > 0)

    def _learned_worth(self, name: str, candidates: Sequence[Candidate]) -> np.ndarray:
        """[B, K] the same of a head that has not drafted yet, by its depths."""
        width = self.max_draft_tokens
        kinds = np.minimum(np.arange(width), NUM_DEPTHS - 1)
        rates = {
            kind: self.depth_rates[name, kind].table()[kinds, 0]
            for kind in {candidate.is_random for candidate in candidates}
        }
        stands = np.stack([rates[candidate.is_random] for candidate in candidates])
        room = np.array([candidate.room for candidate in candidates])
        return self._chained(name, candidates, stands) * (np.arange(width) < room[:, None])

    def _chained(self, name: str, candidates: Sequence[Candidate], stands: np.ndarray) -> np.ndarray:
        """[B, K] that a token and all before it stand, from [B, K] that it does if they do, before trust."""
        factors = np.array([self.factor(name, candidate.name, candidate.group) for candidate in candidates])
        return np.cumprod(trusted(stands, factors[:, None]), axis=1)

    def factor(self, drafter: str, request: str, group: str) -> float:
        """How a request kept to what was expected of a drafter's tokens; at first as its group did, and that as its
        data source."""
        factor = 1.0
        for table, name in self._levels(request, group):
            if (drafter, name) in table:
                factor = table[drafter, name].factor(factor)
        return factor

    def _levels(self, request: str, group: str) -> tuple[tuple[dict[tuple[str, str], Trust], str], ...]:
        """Tables of trust and the name in each, from the one that knows least of the request."""
        return (self.sources, self.source_of[group]), (self.groups, group), (self.requests, request)

    def goes_on(
        self, name: str, depth: int, standing: np.ndarray, is_random: np.ndarray, factors: np.ndarray
    ) -> np.ndarray:
        """[B] which rows of a head get a token more, `depth` of them drafted; standing [B] is the probability that all
        of these stand. None unless all together pay for the pass."""
        if self.is_probe:
            return np.full(len(standing), depth < PROBE_TOKENS)
        kind = min(depth, NUM_DEPTHS - 1)
        rate = [self.depth_rates[name, one].table()[kind, 0] for one in (False, True)]
        worth = standing * trusted(np.where(is_random, rate[1], rate[0]), factors)
        return worth_a_pass(worth, self.rate * self._row_s(name), self.rate * self.prices.pass_s.get(name, 0.0))

    def stands(self, name: str, depth: int, is_random: bool, confidences: np.ndarray) -> np.ndarray:
        """[B] probability that a head's tokens at this depth stand, by its confidence, before trust."""
        kinds = np.full(len(confidences), min(depth, NUM_DEPTHS - 1))
        return self.calibrations[name, is_random].estimate(kinds, confidences)

    def verified(
        self, drafter: str, *, request: str, group: str, is_random: bool, match_length: int, confidences: np.ndarray,
        num_stood: int,
    ) -> None:  # fmt: skip
        """Learn from one verified draft [K]."""
        calibration = self.calibrations.get((drafter, is_random))
        if calibration is None or not len(confidences):
            return
        kinds = token_kinds(drafter, match_length, min(num_stood + 1, len(confidences)))
        if drafter != SUFFIX:
            self.depth_rates[drafter, is_random].observe(kinds, [0.0] * len(kinds), num_stood)
        expected = calibration.observe(kinds, confidences.tolist(), num_stood)
        for table, name in self._levels(request, group):
            table.setdefault((drafter, name), Trust()).count(expected, num_stood)


def token_kinds(drafter: str, match_length: int, count: int) -> list[int]:
    """Kinds of one draft's first tokens: of the suffix drafter by how many tokens before them match, else by depth."""
    if drafter == SUFFIX:
        return [bisect_right(MATCHES, match_length + step) for step in range(count)]
    return [min(step, NUM_DEPTHS - 1) for step in range(count)]


def match_kinds(match_lengths: np.ndarray) -> np.ndarray:
    """Kind of a suffix draft's tokens by how many tokens before them match."""
    return np.searchsorted(MATCH_EDGES, match_lengths, side="right")


def is_probe(step: int) -> bool:
    """Steps that draft whatever it costs."""
    return step % PROBE_STEPS == 0 or step in EARLY_PROBES


def probes_until(step: int) -> int:
    """How many probes there were, this one included."""
    return step // PROBE_STEPS + bisect_right(EARLY_PROBES, step)
