"""Notices that a newly loaded drafter is worse than the one before it; text is never affected, only speed."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class Watchdog:
    """Compares the acceptance rate since a swap with that before it; a pure function of counted tokens.

    A new drafter is judged once, after `window` drafted tokens: below `collapse_frac` of its predecessor's rate it has
    collapsed. Rates of fewer than `window` tokens are no baseline.
    """

    collapse_frac: float
    window: int = 256
    num_drafted: int = 0
    num_accepted: int = 0
    baseline: float | None = None
    is_on_trial: bool = False

    def drafter_changed(self) -> None:
        """A drafter was loaded: what was counted so far becomes the rate to compare with."""
        if self.num_drafted >= self.window and not self.is_on_trial:
            self.baseline = self.num_accepted / self.num_drafted
        self.num_drafted = self.num_accepted = 0
        self.is_on_trial = self.baseline is not None

    def withdrawn(self) -> None:
        """The drafter that collapsed was taken back: its tokens are no baseline for the next one."""
        self.num_drafted = self.num_accepted = 0

    def count(self, num_drafted: int, num_accepted: int) -> bool:
        """Count verified draft tokens; True where the drafter on trial has collapsed."""
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        if not self.is_on_trial or self.num_drafted < self.window:
            return False
        self.is_on_trial = False
        return self.num_accepted / self.num_drafted < self.collapse_frac * self.baseline
