"""Acceptance statistics of one drafter: what was drafted, what stood, and what bounded it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class AcceptanceStats:
    """Sums over verified drafts; records of ranks and rollouts add up.

    `acceptance_length` is mean tokens per verification, the bonus or recovered token included, as in vLLM.
    """

    num_drafts: int = 0
    """Verifications with at least one draft token."""
    drafted: list[int] = field(default_factory=list)
    """Draft tokens at each position of a draft."""
    accepted: list[int] = field(default_factory=list)
    max_prob_sum: float = 0.0
    """Of the policy at the positions that were decided on: those accepted, and the first rejected."""
    num_decided: int = 0
    standing_sums: dict[str, float] = field(default_factory=dict)
    """By kind of draft, the probability that one of that kind stands at a sample of the decided positions
    (`spec.draft_kind.standing_rates`)."""
    num_compared: int = 0
    draft_s: float = 0.0

    def count(self, num_drafted: int, num_accepted: int, max_probs: float) -> None:
        """One verification; `max_probs` is the sum of the policy's largest probabilities at its decided positions."""
        for values in (self.drafted, self.accepted):
            values.extend([0] * (num_drafted - len(values)))
        self.num_drafts += 1
        for position in range(num_drafted):
            self.drafted[position] += 1
            self.accepted[position] += position < num_accepted
        self.max_prob_sum += max_probs
        self.num_decided += min(num_accepted + 1, num_drafted)

    def add(self, other: "AcceptanceStats") -> None:
        for own, others in ((self.drafted, other.drafted), (self.accepted, other.accepted)):
            own.extend([0] * (len(others) - len(own)))
            for position, value in enumerate(others):
                own[position] += value
        for name in ("num_drafts", "max_prob_sum", "num_decided", "num_compared", "draft_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self._add_rates(other.standing_sums)

    def compare(self, rates: Mapping[str, float], num_positions: int) -> None:
        """Sums of `standing_rates` over positions of one verification."""
        self.num_compared += num_positions
        self._add_rates(rates)

    def _add_rates(self, rates: Mapping[str, float]) -> None:
        for kind, rate in rates.items():
            self.standing_sums[kind] = self.standing_sums.get(kind, 0.0) + rate

    @property
    def acceptance_length(self) -> float:
        return 1 + sum(self.accepted) / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_rate(self) -> float:
        """Of drafted tokens."""
        return sum(self.accepted) / sum(self.drafted) if self.num_drafts else 0.0

    def metrics(self, prefix: str) -> dict[str, float]:
        """Means under `<prefix>/...`; nothing where nothing was drafted."""
        if not self.num_drafts:
            return {}
        rates = {
            f"{prefix}/acceptance_rate_{position + 1}": accepted / drafted
            for position, (accepted, drafted) in enumerate(zip(self.accepted, self.drafted, strict=True))
        }
        kinds = {
            f"{prefix}/stands_{kind.replace('-', '_')}": total / self.num_compared
            for kind, total in sorted(self.standing_sums.items())
        }
        return {
            f"{prefix}/acceptance_length": self.acceptance_length,
            f"{prefix}/acceptance_rate": self.acceptance_rate,
            f"{prefix}/acceptance_ceiling": self.max_prob_sum / self.num_decided,
            f"{prefix}/num_drafts": float(self.num_drafts),
            f"{prefix}/num_draft_tokens": float(sum(self.drafted)),
            f"{prefix}/num_accepted_tokens": float(sum(self.accepted)),
            f"{prefix}/draft_s": self.draft_s,
            **kinds,
            **rates,
        }
