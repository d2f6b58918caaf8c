"""What the loop and the adapters know of each other; adapters never import one another."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from tlt.types import (
    EngineStats,
    HiddenStateSample,
    Piece,
    Prompt,
    Rollout,
    RolloutGroup,
    SamplingConfig,
    TailReport,
    TrainBatch,
)

OnFinished = Callable[[Prompt, int, Rollout], None]
"""Called with (prompt, sample index, rollout) the moment a response ends, while others still decode."""


class RolloutInterrupted(Exception):  # noqa: N818 - an event, not an error
    """`RolloutEngine.generate` was told to stop before all responses ended; raised on all ranks of the replica."""


class RolloutEngine(Protocol):
    """Generates the groups of this rank's replica; every rank of a replica calls with the same arguments."""

    policy_version: int
    is_replica_leader: bool
    """First rank of its replica: the one that reports the replica's groups."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        group_size: int,
        seed: int,
        on_finished: OnFinished,
    ) -> list[RolloutGroup]:
        """Groups of what this replica generated, in the order of `prompts`; replicas together have each response once.

        Raises RolloutInterrupted on all ranks of the replica when told to stop. Collective over the replica's ranks.
        """

    def load_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, policy_version: int) -> None:
        """Replace the target model's weights from full tensors under Hugging Face names, consumed as a stream."""

    drafter_version: int

    def load_drafter(self, tensors: Mapping[str, torch.Tensor], *, drafter_version: int) -> None:
        """Swap the learned drafter's weights, between two engine steps; text is not affected."""

    def drafter_tensors(self) -> dict[str, torch.Tensor]:
        """Copies of the weights that draft now."""

    def hidden_state_samples(self) -> list[HiddenStateSample]:
        """What the buffer of this rank holds, oldest first."""

    def training_samples(self, *, seed: int) -> list[HiddenStateSample]:
        """Those of the newest policy, and what they lack in length from the one before it."""

    def sleep(self) -> None:
        """Give the device to the policy: weights and KV cache leave it."""

    def wake(self) -> None:
        """Take the device back before `load_weights` and `generate`."""

    def stats(self) -> EngineStats:
        """What the last `generate` did."""

    def close(self) -> None:
        """End the engine."""


class PolicyTrainer(Protocol):
    """Owns the trained model and its optimizer."""

    def train_step(self, batch: TrainBatch) -> dict[str, float]:
        """One iteration's optimizer steps; returns metrics equal on all ranks."""

    def named_hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Full weights under Hugging Face names, streamed. Collective over all ranks; all must consume it."""

    def offload(self) -> None:
        """Give the device to the rollout: optimizer state and gradients leave it."""

    def onload(self) -> None:
        """Take the device back before `train_step`."""

    def checkpoint_bytes(self) -> int:
        """This rank's part of what `save` writes."""

    def save(self, folder: Path) -> None:
        """Write model, optimizer and schedule. Collective over all ranks."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, at any parallel layout. Collective over all ranks."""


class TailWork(Protocol):
    """What a rank does between its own last response and the world's."""

    def begin(self) -> None:
        """A rollout of the world begins."""

    def use_tail(self) -> TailReport:
        """This rank's replica is done, or was told to stop. Returns soon after the world's rollout ends."""

    def publish(self) -> dict[str, float]:
        """All ranks met: share what came of it; metrics. Collective over all ranks."""

    def state_dict(self) -> dict:
        """What a resumed run goes on with, tensors and plain values; {} for nothing. One rank's is enough."""

    def load_state_dict(self, state: Mapping) -> None:
        """Go on with what `state_dict` gave; {} leaves all as it is. All ranks must call with the same state."""


class SpeculationMemory(Protocol):
    """What an engine's speculation has measured and learned; speed alone depends on it."""

    def state_dict(self) -> dict:
        """What a resumed run goes on with, JSON types; {} for nothing. One rank's is enough."""

    def load_state_dict(self, state: Mapping) -> None:
        """Go on with what `state_dict` gave; {} leaves all as it is. All ranks must call with the same state."""


class DrafterLearner(Protocol):
    """A drafter's trainer, as the rank that idles uses it."""

    def train(
        self, samples: Sequence[HiddenStateSample], *, should_stop: Callable[[], bool], on_step: Callable[[], None]
    ) -> None:
        """Until `should_stop()`, asked after every micro-step; `on_step` after each optimizer step."""

    def average(
        self, sum_in_place: Callable[[torch.Tensor], None],
        gather: Callable[[list[int]], list[list[int]]], *, weight: float,
    ) -> None:  # fmt: skip
        """Weights and optimizer become the mean over ranks, their counters the largest. Collective over all ranks."""

    def score(
        self, pieces: Sequence[Piece], tensors: Mapping[str, torch.Tensor], *,
        should_stop: Callable[[], bool] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """[P] float64: the sum over each piece's drafts of these weights' score; of the first pieces only, where told
        to stop."""

    def published(self) -> dict[str, torch.Tensor]:
        """Weights to draft with."""

    def begin_from(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Train these weights, with a fresh optimizer."""

    def slow_down(self) -> bool:
        """Train with half the learning rate from now on; False, and nothing changes, where it is small already."""

    def state_dict(self) -> dict:
        """What a resumed training needs."""

    def load_state_dict(self, state: Mapping) -> None:
        """Take the place of what is held; a rank's own order of samples stays."""


class PromptSource(Protocol):
    """Training prompts in a resumable order."""

    def next_batch(self, num_prompts: int) -> list[Prompt]:
        """The next prompts; equal on all ranks."""

    def state_dict(self) -> dict:
        """Cursor; JSON types."""


class RewardFn(Protocol):
    """Scores responses as they finish."""

    def submit(self, prompt: Prompt, sample_index: int, rollout: Rollout) -> None:
        """Start scoring; returns at once."""

    def collect(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The groups with their rewards; waits for what was submitted."""

    def abandon(self) -> None:
        """Forget what was submitted since the last `collect`."""

    def stats(self) -> dict[str, float]:
        """Metrics of the last `collect`."""

    def close(self) -> None:
        """End the scoring processes."""


class WeightSync(Protocol):
    def push(self, *, policy_version: int) -> dict[str, float]:
        """Make the engine's target model the policy; returns metrics. Collective over all ranks."""
