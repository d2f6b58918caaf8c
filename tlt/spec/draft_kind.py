"""How a learned drafter's tokens are chosen, and how often each way of choosing stands, measured side by side.

At a verified position both the policy's p and the drafter's q are known, so what each kind of draft would have been
accepted with is known too, whichever was used: the choice needs no exploration. Shapes: N positions, V_draft tokens
that may be drafted.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

COUPLED, ONE_HOT, SAMPLED = "coupled", "one-hot", "sampled"
MEASURED = "auto"
KINDS = (COUPLED, ONE_HOT, SAMPLED)
"""The first is used until enough is measured."""
TINY = 1e-30


class KindChoice(Protocol):
    """Kind of the drafts for requests at a temperature."""

    def choose(self, temperature: float) -> str:
        """One of `KINDS`."""

    def observe(self, temperature: float, rates: Mapping[str, float], num_positions: int) -> None:
        """Sums of `standing_rates` over positions that were verified."""


class FixedKind:
    """The same for all."""

    def __init__(self, kind: str):
        self.kind = kind

    def choose(self, temperature: float) -> str:
        return self.kind

    def observe(self, temperature: float, rates: Mapping[str, float], num_positions: int) -> None:
        """Nothing to learn."""


class MeasuredKind:
    """For each temperature the kind that would have stood most often lately; another one takes over once it is better
    by `margin`, relatively."""

    def __init__(self, kinds: Sequence[str], *, min_positions: int = 64, decay: float = 0.98, margin: float = 0.01):
        self.kinds = tuple(kinds)
        self.min_positions = min_positions
        self.decay = decay
        self.margin = margin
        self._chosen: dict[float, str] = defaultdict(lambda: self.kinds[0])
        self._sums: dict[float, dict[str, float]] = defaultdict(lambda: dict.fromkeys(self.kinds, 0.0))
        self._num_positions: dict[float, int] = defaultdict(int)

    def choose(self, temperature: float) -> str:
        return self._chosen[temperature]

    def observe(self, temperature: float, rates: Mapping[str, float], num_positions: int) -> None:
        sums = self._sums[temperature]
        for kind in self.kinds:
            sums[kind] = self.decay * sums[kind] + rates[kind]
        self._num_positions[temperature] += num_positions
        best = max(self.kinds, key=sums.__getitem__)
        if (
            self._num_positions[temperature] >= self.min_positions
            and sums[best] > (1 + self.margin) * sums[self._chosen[temperature]]
        ):
            self._chosen[temperature] = best


def kind_choice(drafts: str, *, tp_size: int) -> KindChoice:
    """Of the flag --spec-drafts. Ranks of a replica round differently, so between several no draft may be verified by
    rejection sampling."""
    if drafts != MEASURED:
        return FixedKind(drafts)
    return MeasuredKind([kind for kind in KINDS if kind != SAMPLED or tp_size == 1])


def standing_rates(policy: torch.Tensor, draft: torch.Tensor) -> dict[str, torch.Tensor]:
    """[N] probabilities that a draft of each kind stands; policy and draft [N, V_draft] are p and q there.

    one-hot: p of the token with the largest q. sampled: sum of min(p, q) = 1 - TV(p, q). coupled: of two exponential
    races with the same numbers, the sum over tokens i of 1 / sum over j of max(p_j / p_i, q_j / q_i), j running over
    the whole vocabulary (Daliri, Musco, Suresh, arXiv 2408.07978, section 3): ordered by p / q the inner sum is p's
    tail over p_i and q's head over q_i.
    """
    p, q = policy.double(), draft.double()
    outside = (1 - p.sum(1, keepdim=True)).clamp(min=0)  # tokens that are never drafted: q = 0
    order = (p / q.clamp(min=TINY)).argsort(1)
    p_sorted, q_sorted = p.gather(1, order), q.gather(1, order)
    tail = p_sorted.flip(1).cumsum(1).flip(1) + outside
    head = q_sorted.cumsum(1) - q_sorted
    stands = 1 / (tail / p_sorted.clamp(min=TINY) + head / q_sorted.clamp(min=TINY))
    return {
        COUPLED: stands.where((p_sorted > 0) & (q_sorted > 0), stands.new_zeros(())).sum(1),
        ONE_HOT: p.gather(1, q.argmax(1, keepdim=True)).squeeze(1),
        SAMPLED: torch.minimum(p, q).sum(1),
    }
