"""How many ranks have left the present rollout, on the job's own key-value store: no collective, no extra service.

A rank writes once when its replica is done and reads as often as it likes; no one ever waits for anyone here.
"""

from typing import Protocol


class Store(Protocol):
    """Part of torch.distributed's stores."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that begins at 0; returns its new value."""


class TailBoard:
    """One counter for each rollout of the run; rollouts have the same numbers on all ranks, since all begin all."""

    def __init__(self, store: Store, *, world_size: int):
        self.store = store
        self.world_size = world_size
        self.rollout = 0

    def begin(self) -> None:
        """The next rollout of the world begins; all ranks call."""
        self.rollout += 1

    def ended(self) -> None:
        """This rank's replica is done, or was told to stop."""
        self.store.add(self._key, 1)

    def all_ended(self) -> bool:
        """Whether no rank decodes any more."""
        return self.store.add(self._key, 0) == self.world_size

    @property
    def _key(self) -> str:
        return f"spot/ended/{self.rollout}"
