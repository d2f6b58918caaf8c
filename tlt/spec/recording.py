"""A recording of rollouts: each step that decoded, and how long responses were. One JSON object a rollout and rank."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tlt.spec.strategy import DecodeStep, parse_strategy


@dataclass(frozen=True, kw_only=True)
class RecordedRollout:
    """One rollout of one rank."""

    policy: str
    """As --spec-strategy names it."""
    steps: tuple[DecodeStep, ...]
    response_tokens: tuple[int, ...]

    def to_json(self) -> dict:
        """JSON types, a column for each field of the steps."""
        return {
            "policy": self.policy,
            "strategy": [str(step.strategy) for step in self.steps],
            "num_running": [step.num_running for step in self.steps],
            "drafted": [list(step.drafted) for step in self.steps],
            "accepted": [list(step.accepted) for step in self.steps],
            "draft_s": [step.draft_s for step in self.steps],
            "verify_s": [step.verify_s for step in self.steps],
            "response_tokens": list(self.response_tokens),
        }

    @classmethod
    def from_json(cls, record: dict) -> "RecordedRollout":
        """Of what `to_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        columns = ("strategy", "num_running", "drafted", "accepted", "draft_s", "verify_s")
        steps = tuple(
            DecodeStep(
                strategy=parse_strategy(strategy, "strategy"), num_running=num_running, drafted=tuple(drafted),
                accepted=tuple(accepted), draft_s=draft_s, verify_s=verify_s,
            )
            for strategy, num_running, drafted, accepted, draft_s, verify_s in zip(
                *(record[name] for name in columns), strict=True
            )
        )  # fmt: skip
        return cls(policy=record["policy"], steps=steps, response_tokens=tuple(record["response_tokens"]))


def write_recording(path: Path, rollouts: Iterable[RecordedRollout]) -> None:
    """Replace the file."""
    path.write_text("".join(json.dumps(rollout.to_json()) + "\n" for rollout in rollouts))


def read_recording(path: Path, flag: str) -> list[RecordedRollout]:
    """Raises ValueError naming the flag where there is no such recording."""
    if not path.is_file():
        raise ValueError(f"{flag} must be a file that tools/bench_rollout.py --record wrote, {path} is none")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            found.append(RecordedRollout.from_json(json.loads(line)))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{flag} {path}, line {number} is no recorded rollout: {error!r}") from None
    return found
