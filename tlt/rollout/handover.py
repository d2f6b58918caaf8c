"""How unfinished responses change hands, on the job's own key-value store: an idle replica asks, at most one gives.

An ask is a number with a counter, and whoever adds to the counter first owns the ask: a replica that decodes, which
then gives responses under it, or the asker itself, who takes it back. All replicas look at all asks in their order,
while they decode and while they ask, and write how many they have seen, or that they have left. So an asker waits
until someone owns its ask or all have seen it, never for a replica to be done, and nothing is given to one that left.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Protocol

from tlt.types import Rollout

LEFT = 2**40
"""Added to what a replica has seen when it leaves: it will see nothing more."""


class Store(Protocol):
    """Part of torch.distributed's stores."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that begins at 0; returns its new value."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Read a value; waits until it is there."""

    def delete_key(self, key: str) -> bool:
        """Forget a key."""


class HandoverBoard:
    """Asks of each rollout of the run, as one replica sees them; all replicas begin all rollouts."""

    def __init__(self, store: Store, *, replica: int, num_replicas: int):
        self.store = store
        self.replica = replica
        self.num_replicas = num_replicas
        self.rollout = 0
        self._num_seen = 0

    def begin(self) -> None:
        """The next rollout of the world begins."""
        self.rollout += 1
        self._num_seen = 0

    def ask(self) -> int:
        """This replica has nothing to do; returns the number of its ask, from 1."""
        return self.store.add(self._key("asks"), 1)

    def unseen(self) -> range:
        """Asks of all replicas, this one included, that this one has not seen yet."""
        return range(self._num_seen + 1, self.store.add(self._key("asks"), 0) + 1)

    def saw(self, ask: int) -> None:
        """This replica owns the ask and has given, or never will."""
        assert ask == self._num_seen + 1, "asks are seen one after another"
        self._num_seen = ask
        self.store.add(self._key("seen", self.replica), 1)

    def all_saw(self, ask: int) -> bool:
        """Whether every replica has seen the ask or has left: no one will own it who does not yet."""
        seen = (self.store.add(self._key("seen", replica), 0) for replica in range(self.num_replicas))
        return all(count >= ask for count in seen)

    def own(self, ask: int) -> bool:
        """Become the ask's owner; False if it has one."""
        return self.store.add(self._key("owned", ask), 1) == 1

    def is_owned(self, ask: int) -> bool:
        """Whether anyone owns the ask."""
        return self.store.add(self._key("owned", ask), 0) > 0

    def give(self, ask: int, responses: Mapping[str, Rollout]) -> None:
        """Hand over what there is of unfinished responses, by name; the ask must be this replica's own."""
        self.store.set(
            self._key("gift", ask), json.dumps({n: dataclasses.asdict(each) for n, each in responses.items()})
        )

    def gift(self, ask: int) -> dict[str, Rollout]:
        """What the owner gives; it does so right after it became the owner."""
        key = self._key("gift", ask)
        found = json.loads(self.store.get(key))
        self.store.delete_key(key)
        return {name: read_rollout(fields) for name, fields in found.items()}

    def leave(self) -> None:
        """This replica is done with the rollout, or was told to stop."""
        self.store.add(self._key("seen", self.replica), LEFT)

    def _key(self, name: str, number: int = 0) -> str:
        return f"handover/{self.rollout}/{name}/{number}"


def read_rollout(fields: dict) -> Rollout:
    """Of JSON, which has lists for tuples; floats come back to the last bit."""
    return Rollout(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
