"""The arm of a batch with the most expected tokens a second, from measured costs and measured acceptance.

What is learned is shared: a step's time is one curve over verified tokens whatever drafted them, and all arms of a
drafter share its acceptance at each depth. So an arm is judged at a batch size at which it never ran, where a bandit
starts anew in each bucket. Pure functions of what was observed; no clock, no random numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from tlt.spec.cost_model import Curve
from tlt.spec.strategy import HEADS, DecodeStep
from tlt.types import OFF, SpecStrategy

TRIES = 3
"""Steps of each arm before any is judged: the median of three times survives one outlier."""
FADE = 0.998
"""What a count weighs after one more engine step, whatever that step drafted: about 500 steps count."""
PRIOR_RATE, PRIOR_COUNT = 0.7, 4.0
"""With which a depth's acceptance begins, and to which it fades while no one looks: an arm that lost is tried again
when what is known of it has grown old."""
BONUS = 0.25
"""Standard deviations of its estimate by which a depth's acceptance is taken higher: what is uncertain is worth a
try (discounted UCB, Garivier and Moulines, arXiv 0805.3415). The prior is hopeful already: twice this lost more in
replays (docs/log.md)."""
MARGIN = 0.03
"""Another arm takes over where it is expected to be better by this share, so that noise does not flip them."""


@dataclass
class Depths:
    """Counts of one drafter's drafts by depth, fading. K draft tokens."""

    requests: list[float] = field(default_factory=list)  # [K] that might have had a token there
    drafted: list[float] = field(default_factory=list)  # [K] that had one
    reached: list[float] = field(default_factory=list)  # [K] whose draft stood up to the depth before
    stood: list[float] = field(default_factory=list)  # [K] whose draft stood up to this one

    def fade(self) -> None:
        """An engine step more has passed."""
        for counts in (self.requests, self.drafted, self.reached, self.stood):
            counts[:] = [FADE * count for count in counts]

    def observe(self, step: DecodeStep) -> None:
        """A step that verified this drafter's drafts."""
        longest = step.strategy.num_draft_tokens
        for counts in (self.requests, self.drafted, self.reached, self.stood):
            counts.extend([0.0] * (longest - len(counts)))
        before = step.num_running
        for depth in range(longest):
            stood = step.accepted[depth] if depth < len(step.accepted) else 0
            self.requests[depth] += step.num_running
            self.drafted[depth] += step.drafted[depth] if depth < len(step.drafted) else 0
            self.reached[depth] += before
            self.stood[depth] += stood
            before = stood

    def expected(self, num_draft_tokens: int) -> tuple[float, float]:
        """(tokens drafted, tokens that stand at best) for one request that is given so many."""
        drafted = stands = 0.0
        chance = 1.0
        for depth in range(num_draft_tokens):
            requests, reached, stood = (
                (self.requests[depth], self.reached[depth], self.stood[depth])
                if depth < len(self.requests) else (0.0, 0.0, 0.0)
            )  # fmt: skip
            mean = (stood + PRIOR_COUNT * PRIOR_RATE) / (reached + PRIOR_COUNT)
            deviation = (mean * (1 - mean) / (reached + PRIOR_COUNT)) ** 0.5
            chance *= min(mean + BONUS * deviation, 1.0)
            stands += chance
            drafted += self.drafted[depth] / requests if requests else 1.0
        return drafted, stands


class CostModelPolicy:
    """One policy of an engine; its choice is made on the first rank and broadcast, so times need not agree."""

    def __init__(self, arms: Sequence[SpecStrategy]):
        """`off` is always an arm."""
        self.all_arms = [*(arm for arm in arms if arm != OFF), OFF]
        self.max_draft_tokens = max(arm.num_draft_tokens for arm in self.all_arms)
        self.num_tries = dict.fromkeys(self.all_arms, 0)
        self.steps = Curve()
        self.passes = {arm.method: Curve() for arm in self.all_arms if arm != OFF}
        self.depths = {arm.method: Depths() for arm in self.all_arms if arm != OFF}
        self.current = OFF

    def arms(self, num_running: int) -> Sequence[SpecStrategy]:
        """The same at every batch size."""
        return self.all_arms

    def choose(self, num_running: int) -> SpecStrategy:
        """For an engine step with so many running requests."""
        untried = [arm for arm in self.all_arms if self.num_tries[arm] < TRIES]
        if untried:
            return untried[0]
        rates = {arm: self.rate(arm, num_running) for arm in self.all_arms}
        best = max(self.all_arms, key=rates.__getitem__)
        if rates[best] > (1 + MARGIN) * rates[self.current]:
            self.current = best
        return self.current

    def rate(self, arm: SpecStrategy, num_running: int) -> float:
        """Tokens a second that the arm may reach, its uncertainty taken as luck."""
        if arm == OFF:
            return num_running / self.steps.seconds(num_running)
        drafted, stands = self.depths[arm.method].expected(arm.num_draft_tokens)
        verify_s = self.steps.seconds(num_running * (1 + drafted))
        return num_running * (1 + stands) / (verify_s + num_passes(arm) * self.passes[arm.method].seconds(num_running))

    def observe(self, step: DecodeStep) -> None:
        """Learn from a step, whatever chose its strategy."""
        if step.verify_s <= 0:  # a clock too coarse to tell
            return
        self.steps.observe(step.num_verified, step.verify_s)
        for depths in self.depths.values():
            depths.fade()
        if step.strategy not in self.num_tries:
            return
        self.num_tries[step.strategy] += 1
        if step.strategy != OFF:
            self.depths[step.strategy.method].observe(step)
            self.passes[step.strategy.method].observe(step.num_running, step.draft_s / num_passes(step.strategy))

    def state_dict(self) -> dict:
        """JSON types."""
        return {
            "num_tries": {str(arm): count for arm, count in self.num_tries.items()},
            "steps": self.steps.state_dict(),
            "passes": {method: curve.state_dict() for method, curve in self.passes.items()},
            "depths": {method: asdict(depths) for method, depths in self.depths.items()},
            "current": str(self.current),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on with what a policy of the same arms gave."""
        arms = {str(arm): arm for arm in self.all_arms}
        self.num_tries = {arm: state["num_tries"][text] for text, arm in arms.items()}
        self.steps.load_state_dict(state["steps"])
        for method, curve in self.passes.items():
            curve.load_state_dict(state["passes"][method])
        self.depths = {method: Depths(**counts) for method, counts in state["depths"].items()}
        self.current = arms[state["current"]]


def num_passes(strategy: SpecStrategy) -> int:
    """Times that the drafter runs over the batch: a head once for each draft token, a look-up once."""
    return strategy.num_draft_tokens if strategy.method in HEADS else 1
