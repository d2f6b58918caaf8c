"""Rollouts of a run as JSONL, one line a response, for tools/profile_workload.py and for reading."""

import json
from collections.abc import Sequence
from pathlib import Path

from tlt.types import RolloutGroup


class RolloutLog:
    """Writes on the ranks that write, every `interval` iterations; an interval of 0 never does."""

    def __init__(self, folder: Path, *, interval: int, is_writer: bool):
        self.folder = folder
        self.interval = interval
        self.is_writer = is_writer

    def write_if_due(self, iteration: int, groups: Sequence[RolloutGroup]) -> None:
        """The groups of a training iteration."""
        if self.interval > 0 and iteration % self.interval == 0:
            self.write(iteration, groups, name="train")

    def write(self, iteration: int, groups: Sequence[RolloutGroup], *, name: str) -> None:
        """Write <folder>/<name>_0000012.jsonl, whole or not at all, unless the interval is 0."""
        if not self.is_writer or self.interval == 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}_{iteration:07d}.jsonl"
        partial = path.with_suffix(".tmp")
        with partial.open("w") as file:
            for group in groups:
                file.writelines(json.dumps(record) + "\n" for record in records(iteration, group))
        partial.rename(path)


def records(iteration: int, group: RolloutGroup) -> list[dict]:
    """One object per response; per-token numbers are rounded to 5 digits after the point."""
    rewards = group.rewards or (None,) * len(group.rollouts)
    return [
        {
            "iteration": iteration,
            "prompt_id": group.prompt.prompt_id,
            "question": group.prompt.text,
            "prompt_token_ids": group.prompt.token_ids,
            "sample": sample,
            "replica": rollout.replica,
            "policy_version": rollout.policy_version,
            "reward": reward,
            "finish_reason": rollout.finish_reason,
            "text": rollout.text,
            "token_ids": rollout.token_ids,
            "logprobs": rounded(rollout.logprobs),
            "entropies": rounded(rollout.entropies),
            "max_probs": rounded(rollout.max_probs),
        }
        for sample, (rollout, reward) in enumerate(zip(group.rollouts, rewards, strict=True))
    ]


def rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 5) for value in values]
