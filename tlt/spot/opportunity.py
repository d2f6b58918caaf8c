"""When training on an idle rank is worth it: what it gained lately, and whether the tail is long enough.

No clock, no store and no random number is read here: decisions are functions of what they are given.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean, median

from tlt.spot.judgement import Judgement

SESSIONS = 3
"""Trainings that are judged before one is skipped, and over which gains are averaged."""
PATIENCE_STEPS = 64
"""Optimizer steps of all ranks before the same: a tail has some ten, a fresh optimizer warms up in the first ones, and
the average of weights that is judged follows later still."""
MIN_INTERVAL, MAX_INTERVAL = 2, 8
"""Policy versions between two trainings while none pays, at least and at most: the policy moves."""
LASTING = 8
"""Rollouts that a gain is counted for: later ones have it too, while the policy moves away from what was learned."""
SWITCHES = 5
"""Last switches that the median is taken of."""
DOUBT = 0.8
"""What is left of a switch's seconds when a tail was skipped for them."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One training that was judged where all ranks met. Shares are of the tokens that one verification gives."""

    policy_version: int
    gain_frac: float
    error_frac: float
    cost_frac: float | None
    """Seconds that ranks last spent on averaging, judging and loading, as a share of a rollout; None before the first
    such meeting of a start."""


class GainRecord:
    """What the last trainings gained, and what drafts lost while the policy moved on.

    Equal on all ranks that count the same; `min_gain_frac` is what a gain must exceed at least.
    """

    def __init__(self, *, min_gain_frac: float):
        self.min_gain_frac = min_gain_frac
        self.sessions: deque[Session] = deque(maxlen=SESSIONS)
        self.losses_frac: deque[float] = deque(maxlen=SESSIONS)
        """For each policy version that passed since the weights that draft were published."""
        self._published: tuple[int, float] | None = None
        self._carried = 0.0
        """Gain of the trained weights that was judged and counted, and not published: the next one contains it."""
        self._num_steps = 0.0

    def count(
        self, judged: Judgement, *, policy_version: int, cost_frac: float | None, num_steps: float
    ) -> dict[str, float]:  # fmt: skip
        """A training of so many optimizer steps was judged; metrics. It gained what trained weights are better by than
        they were before it."""
        self._num_steps += num_steps
        added = judged.gain - self._carried
        metrics = {
            "spot/gain": judged.gain, "spot/added_gain": added, "spot/live_score": judged.live,
            "spot/candidate_score": judged.candidate, "spot/judges": float(judged.num_judges),
        }  # fmt: skip
        if math.isfinite(judged.error):  # else nothing tells a gain from chance
            metrics["spot/gain_error"] = judged.error
            self._carried = judged.gain
            self.sessions.append(
                Session(
                    policy_version=policy_version, gain_frac=judged.frac(added),
                    error_frac=judged.frac(judged.error), cost_frac=cost_frac,
                )
            )  # fmt: skip
        if self._published is not None and policy_version > self._published[0]:
            version, score = self._published
            metrics["spot/staleness"] = score - judged.live
            self.losses_frac.append(judged.frac(score - judged.live) / (policy_version - version))
        return metrics

    def published(self, judged: Judgement, *, policy_version: int) -> None:
        """The trained weights draft from now on."""
        self._published = (policy_version, judged.candidate)
        self._carried = 0.0

    def withdrawn(self) -> None:
        """What was published does not draft any more: its score says nothing of the weights that do."""
        self._published = None

    def begun_anew(self) -> None:
        """The trained weights were dropped for those that draft."""
        self._carried = 0.0

    def tried_anew(self) -> None:
        """Training goes on in another way: what the last ones gained does not say what it will."""
        self.sessions.clear()

    def state_dict(self) -> dict:
        """What a resumed run decides by; plain values."""
        return {
            "sessions": [asdict(session) for session in self.sessions],
            "losses_frac": list(self.losses_frac),
            "published": self._published,
            "carried": self._carried,
            "num_steps": self._num_steps,
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Take the place of what is held; the least gain stays this run's own."""
        self.sessions = deque((Session(**fields) for fields in state["sessions"]), maxlen=SESSIONS)
        self.losses_frac = deque(state["losses_frac"], maxlen=SESSIONS)
        self._published, self._carried, self._num_steps = state["published"], state["carried"], state["num_steps"]

    @property
    def needed_frac(self) -> float:
        """Gain that pays for a training: so many rollouts, shorter by this share each, make good what the ranks'
        meeting took. The mean of the last meetings: one short rollout must not make the next ones look dear."""
        costs = [session.cost_frac for session in self.sessions if session.cost_frac is not None]
        return max(self.min_gain_frac, fmean(costs) / LASTING) if costs else self.min_gain_frac

    @property
    def is_measurable(self) -> bool:
        """Whether the last trainings together gained what pays, and more than their standard error."""
        error_frac = math.sqrt(sum(session.error_frac**2 for session in self.sessions)) / len(self.sessions)
        return fmean(session.gain_frac for session in self.sessions) > max(error_frac, self.needed_frac)

    @property
    def interval(self) -> int:
        """Policy versions after which a head that is good enough is expected to have lost what is worth training."""
        loss_frac = fmean(self.losses_frac) if self.losses_frac else 0.0
        if loss_frac * MAX_INTERVAL <= self.needed_frac:
            return MAX_INTERVAL
        return max(math.ceil(self.needed_frac / loss_frac), MIN_INTERVAL)

    def is_due(self, policy_version: int) -> bool:
        """Whether idle ranks should train on responses of this policy."""
        if len(self.sessions) < SESSIONS or self._num_steps < PATIENCE_STEPS or self.is_measurable:
            return True
        return policy_version - self.sessions[-1].policy_version >= self.interval


class SwitchCost:
    """Seconds of one rank between its last response and its first optimizer step: a shorter tail gives nothing."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=SWITCHES)

    @property
    def seconds(self) -> float:
        """Median of the last; 0 before the first."""
        return median(self._seconds) if self._seconds else 0.0

    def observe(self, seconds: float) -> None:
        """A first optimizer step was reached."""
        self._seconds.append(seconds)

    def observe_none(self, seconds: float) -> None:
        """The tail ended after so many seconds, before the first optimizer step."""
        self._seconds.append(max(seconds, self.seconds))

    def skipped(self) -> None:
        """A tail was never long enough: nothing was measured, so what once was is held on to the less. The first
        switches hold what is paid but once, and would else be the last ones."""
        self._seconds = deque((DOUBT * seconds for seconds in self._seconds), maxlen=SWITCHES)

    def fits(self, remaining_s: float | None) -> bool:
        """Whether a tail that is expected to last so long gives one optimizer step; None is not known."""
        return remaining_s is None or remaining_s >= self.seconds
