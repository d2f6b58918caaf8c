"""What an engine step and a drafter's pass cost, measured as they run: seconds by verified tokens and by drafted rows.

Measured medians, not a formula: the same number of tokens costs another time on every machine, with kinks where a
kernel changes its blocking. Times are given by the caller, so decisions can be replayed and tested without a clock.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import median

WINDOW = 15
"""Times of a bin that its median is taken of: the newest, since contexts grow and machines are shared."""
EXACT = 8
"""Sizes up to this have bins of their own; above, bins grow by an eighth."""
RIDGE_TOKENS = 12
"""Before a second size was measured, so many tokens more are taken to double a step's time: dear, so that little is
drafted until a probe has shown what it costs (on an H100 it is 200 to 300, on a CPU core 10 to 14)."""


def bin_of(size: int) -> int:
    """Bins as wide as an eighth of their size."""
    if size <= EXACT:
        return size
    shift = max(size.bit_length() - 4, 0)
    return (size >> shift) + (EXACT << shift)  # leading four bits and the magnitude: distinct for distinct bins


@dataclass
class Curve:
    """Seconds by size: medians of bins, made to rise, linear between them."""

    window: int | None = WINDOW
    """Times that a bin keeps; None for all."""
    _bins: dict[int, deque[tuple[int, float]]] = field(default_factory=dict)
    _medians: dict[int, tuple[float, float]] = field(default_factory=dict)
    _changed: set[int] = field(default_factory=set)
    """Bins whose medians are made when they are asked for: most strategies ask for no price."""
    _points: list[tuple[float, float]] = field(default_factory=list)

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

    def _rising_points(self) -> list[tuple[float, float]]:
        """(mean size, seconds) of each bin, by size."""
        if self._changed:
            for changed in self._changed:
                times = self._bins[changed]
                sizes = sum(size for size, _ in times)
                self._medians[changed] = (sizes / len(times), median(seconds for _, seconds in times))
            self._changed.clear()
            medians = sorted(self._medians.values())
            highest = accumulate((y for _, y in medians), max)
            self._points = [(x, y) for (x, _), y in zip(medians, highest, strict=True)]
        return self._points

    def seconds(self, size: float) -> float:
        """Of that size; beyond the largest measured one the line from the smallest goes on. 0 if nothing is known."""
        points = self._rising_points()
        if not points:
            return 0.0
        (first_x, first_y), (last_x, last_y) = points[0], points[-1]
        if size <= first_x:
            return first_y
        if size >= last_x:
            if last_x > first_x and last_y > first_y:
                slope = (last_y - first_y) / (last_x - first_x)
            else:
                slope = last_y / (last_x + RIDGE_TOKENS)
            return last_y + slope * (size - last_x)
        index = bisect_left(points, (size, 0.0))
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


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


NO_PRICES = Prices(step_s=0.0, token_s=0.0, pass_s={}, row_s={})
"""Where no one asks."""


@dataclass
class CostModel:
    """Learns the prices of one engine."""

    steps: Curve = field(default_factory=Curve)
    passes: dict[str, Curve] = field(default_factory=dict)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """An engine step without prefill, without its drafting; one token of each request is among those verified."""
        self.steps.observe(num_tokens, seconds)

    def observe_pass(self, drafter: str, num_rows: int, seconds: float) -> None:
        """One forward of a learned drafter."""
        self.passes.setdefault(drafter, Curve()).observe(num_rows, seconds)

    def state_dict(self) -> dict:
        """JSON types."""
        return {
            "steps": self.steps.state_dict(),
            "passes": {name: curve.state_dict() for name, curve in self.passes.items()},
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Go on with what `state_dict` gave."""
        self.steps.load_state_dict(state["steps"])
        for name, times in state["passes"].items():
            self.passes.setdefault(name, Curve()).load_state_dict(times)

    def prices(self, num_running: int, num_draft_tokens: int) -> Prices:
        """For so many requests, where about `num_draft_tokens` will be drafted in all."""
        step_s = self.steps.seconds(num_running)
        more = max(num_draft_tokens, num_running, 1)
        pass_s, row_s = {}, {}
        for name, curve in self.passes.items():
            one = curve.seconds(1)
            row_s[name] = max(curve.seconds(num_running) - one, 0.0) / max(num_running - 1, 1)
            pass_s[name] = max(one - row_s[name], 0.0)
        return Prices(
            step_s=step_s, token_s=(self.steps.seconds(num_running + more) - step_s) / more, pass_s=pass_s,
            row_s=row_s,
        )  # fmt: skip
