"""What an engine step and a drafter's pass cost, measured as they run: seconds by verified tokens and by drafted rows.

Measured medians, not a formula: the same number of tokens costs another time on every machine, with kinks where a
kernel changes its blocking. Times are given by the caller, so decisions can be replayed and tested without a clock.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median

import numpy as np

WINDOW = 15
"""Times of a bin that its median is taken of: the newest, since contexts grow and machines are shared."""
EXACT = 8
"""Sizes up to this have bins of their own; above, bins grow by an eighth."""
RIDGE_TOKENS = 12
"""Before a second size was measured, so many tokens more are taken to double a step's time: dear, so that little is
drafted until a probe has shown what it costs (on an H100 it is 200 to 300, on a CPU core 10 to 14)."""

RATE_DECAY, MIN_RATE_STEPS = 0.97, 8
"""What a rate's past weighs after one more step, and the steps before it counts."""


def bin_of(size: int) -> int:
    """Bins as wide as an eighth of their size."""
    if size <= EXACT:
        return size
    shift = max(size.bit_length() - 4, 0)
    return (size >> shift) + (EXACT << shift)  # leading four bits and the magnitude: distinct for distinct bins


@dataclass
class Curve:
    """Seconds by size: medians of bins, the nearest ones that rise, linear between them."""

    window: int | None = WINDOW
    """Times that a bin keeps; None for all."""
    _bins: dict[int, deque[tuple[int, float]]] = field(default_factory=dict)
    _medians: dict[int, tuple[float, float, int]] = field(default_factory=dict)
    _changed: set[int] = field(default_factory=set)
    """Bins whose medians are made when they are asked for: most strategies ask for no price."""
    _points: np.ndarray = field(default_factory=lambda: np.zeros((2, 0)))

    def observe(self, size: int, seconds: float) -> None:
        found = bin_of(size)
        self._bins.setdefault(found, deque(maxlen=self.window)).append((size, seconds))
        self._changed.add(found)

    def state_dict(self) -> dict:
        """JSON types."""
        return {"times": [list(time) for times in self._bins.values() for time in times]}

    def load_state_dict(self, state: Mapping) -> None:
        """Observe what another curve kept."""
        for size, seconds in state["times"]:
            self.observe(size, seconds)

    def _rising_points(self) -> np.ndarray:
        """[2, bins] mean size and seconds of each bin, by size."""
        if self._changed:
            for changed in self._changed:
                times = self._bins[changed]
                sizes = sum(size for size, _ in times)
                self._medians[changed] = (sizes / len(times), median(seconds for _, seconds in times), len(times))
            self._changed.clear()
            medians = sorted(self._medians.values())
            levels = rising([y for _, y, _ in medians], [count for _, _, count in medians])
            self._points = np.array([[x for x, _, _ in medians], levels])
        return self._points

    def seconds(self, size: float) -> float:
        """Of that size; beyond the largest measured one the line from the smallest goes on. 0 if nothing is known."""
        return float(self.seconds_of(np.array([size], dtype=float))[0])

    def seconds_of(self, sizes: np.ndarray) -> np.ndarray:
        """[N] of the sizes [N]."""
        x, y = self._rising_points()
        if not len(x):
            return np.zeros(len(sizes))
        rises = x[-1] > x[0] and y[-1] > y[0]
        slope = (y[-1] - y[0]) / (x[-1] - x[0]) if rises else y[-1] / (x[-1] + RIDGE_TOKENS)
        return np.interp(sizes, x, y) + slope * np.maximum(sizes - x[-1], 0)


def rising(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The nearest values that never fall, by weighted least squares: neighbours that fall are pooled into their mean
    (Ayer et al., Ann. Math. Statist. 26, 1955). A running maximum would let one slow bin raise all above it."""
    pools: list[list[float]] = []  # [mean, weight, number of values]
    for value, weight in zip(values, weights, strict=True):
        pools.append([value, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            mean, total, count = pools.pop()
            before = pools[-1]
            before[0] = (before[0] * before[1] + mean * total) / (before[1] + total)
            before[1] += total
            before[2] += count
    return [mean for mean, _, count in pools for _ in range(int(count))]


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Of one engine step; equal on all ranks of a replica."""

    step_s: float
    """Without drafts."""
    token_s: float
    """One more token to verify."""
    pass_s: Mapping[str, float]
    """One pass of each learned drafter, whatever its rows."""
    row_s: Mapping[str, float]
    """One more row in such a pass."""
    verify_s: tuple[float, ...] = ()
    """[N + 1] of a step that verifies 0 to N draft tokens in all; empty where no one measured: then nothing is cut."""
    rate: float | None = None
    """Tokens a second that steps of so many requests came to lately; None while too few were seen."""


NO_PRICES = Prices(step_s=0.0, token_s=0.0, pass_s={}, row_s={})
"""Where no one asks."""


@dataclass
class Rate:
    """Tokens a second of the last steps, drafting included."""

    tokens: float = 0.0
    seconds: float = 0.0
    num_steps: int = 0

    def observe(self, tokens: int, seconds: float) -> None:
        self.tokens = RATE_DECAY * self.tokens + tokens
        self.seconds = RATE_DECAY * self.seconds + seconds
        self.num_steps += 1

    @property
    def value(self) -> float | None:
        return self.tokens / self.seconds if self.num_steps >= MIN_RATE_STEPS else None


@dataclass
class CostModel:
    """Learns the prices of one engine."""

    steps: Curve = field(default_factory=Curve)
    passes: dict[str, Curve] = field(default_factory=dict)
    rates: dict[int, Rate] = field(default_factory=dict)
    """By running requests."""

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """An engine step without prefill, without its drafting; one token of each request is among those verified."""
        self.steps.observe(num_tokens, seconds)

    def observe_pass(self, drafter: str, num_rows: int, seconds: float) -> None:
        """One forward of a learned drafter."""
        self.passes.setdefault(drafter, Curve()).observe(num_rows, seconds)

    def observe_rate(self, num_running: int, num_tokens: int, seconds: float) -> None:
        """A step of `adaptive` gave so many tokens; seconds with the drafting of what it verified."""
        self.rates.setdefault(num_running, Rate()).observe(num_tokens, seconds)

    def state_dict(self) -> dict:
        """JSON types."""
        return {
            "steps": self.steps.state_dict(),
            "passes": {name: curve.state_dict() for name, curve in self.passes.items()},
            "rates": [[num_running, asdict(rate)] for num_running, rate in self.rates.items()],
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on with what `state_dict` gave."""
        self.steps.load_state_dict(state["steps"])
        for name, times in state["passes"].items():
            self.passes.setdefault(name, Curve()).load_state_dict(times)
        self.rates |= {num_running: Rate(**rate) for num_running, rate in state["rates"]}

    def prices(self, num_running: int, num_draft_tokens: int, *, max_draft_tokens: int) -> Prices:
        """For so many requests, where about `num_draft_tokens` will be drafted in all and at most
        `max_draft_tokens`."""
        verify_s = tuple(self.steps.seconds_of(num_running + np.arange(max_draft_tokens + 1)).tolist())
        step_s = verify_s[0]
        more = max(num_draft_tokens, num_running, 1)
        pass_s, row_s = {}, {}
        for name, curve in self.passes.items():
            one = curve.seconds(1)
            row_s[name] = max(curve.seconds(num_running) - one, 0.0) / max(num_running - 1, 1)
            pass_s[name] = max(one - row_s[name], 0.0)
        return Prices(
            step_s=step_s, token_s=(self.steps.seconds(num_running + more) - step_s) / more, pass_s=pass_s,
            row_s=row_s, verify_s=verify_s, rate=self.rates[num_running].value if num_running in self.rates else None,
        )  # fmt: skip
