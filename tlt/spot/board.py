"""How many ranks have left the present rollout, and how long the others expect to decode, on the job's own key-value
store: no collective, no extra service.

A rank writes what it knows of itself and reads as often as it likes; no one ever waits for anyone here.
"""

from typing import Protocol


class Store(Protocol):
    """Part of torch.distributed's stores."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that begins at 0; returns its new value."""


class TailBoard:
    """Counters of each rollout of the run; rollouts have the same numbers on all ranks, since all begin all."""

    def __init__(self, store: Store, *, rank: int, world_size: int, replica_size: int = 1):
        self.store = store
        self.rank = rank
        self.world_size = world_size
        self.replica_size = replica_size
        """Neighbouring ranks that decode together."""
        self.replica, self.num_replicas = rank // replica_size, world_size // replica_size
        self.rollout = 0
        self._told_ms = 0

    def begin(self) -> None:
        """The next rollout of the world begins; all ranks call."""
        self.rollout += 1
        self._told_ms = 0

    def ended(self) -> None:
        """This rank's replica is done, or was told to stop."""
        self._tell_ms(0)
        if self.replica_size == 1 or self._is_first_of_replica():
            self.store.add(self._key, 1)

    def all_ended(self) -> bool:
        """Whether no replica decodes any more."""
        return self.store.add(self._key, 0) == self.num_replicas

    def tell_remaining(self, seconds: float) -> None:
        """This rank's replica expects to decode for so long from now on."""
        self._tell_ms(max(round(seconds * 1e3), 1))

    def remaining_s(self) -> float | None:
        """Seconds until the last rank is expected to be done, as told lately; None where no one that decodes told."""
        told_ms = max(self.store.add(self._remaining_key(rank), 0) for rank in range(self.world_size))
        return told_ms / 1e3 if told_ms > 0 else None

    def _is_first_of_replica(self) -> bool:
        """The ranks of a replica end together: none of them trains while another is about to say so."""
        return self.store.add(f"{self._key}/{self.replica}", 1) == 1

    def _tell_ms(self, ms: int) -> None:
        if ms != self._told_ms:  # a counter that one rank writes holds whatever it last added up to
            self.store.add(self._remaining_key(self.rank), ms - self._told_ms)
            self._told_ms = ms

    @property
    def _key(self) -> str:
        return f"spot/ended/{self.rollout}"

    def _remaining_key(self, rank: int) -> str:
        return f"spot/remaining_ms/{self.rollout}/{rank}"
