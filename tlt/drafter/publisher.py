"""Decides whether a newly trained head takes the place of the live one: only if it is better on recent held-out text.

Both are compared on the same responses of the present policy, which neither was trained on (`is_held_out`), by the
acceptance length of independently sampled drafts: it needs no draws, so it scatters less than any count of accepted
tokens, and what raises it raises the others. After publication the engine's watchdog goes on watching.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tlt.drafter.evaluation import SampledText, evaluate
from tlt.drafter.model import EagleHead
from tlt.drafter.trainer import Target
from tlt.types import HiddenStateSample

HELD_OUT_SHARE = 8
"""One response in so many is kept from training."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one comparison; equal on all ranks."""

    is_published: bool
    version: int
    """Of the live head from here on."""
    live_length: float
    candidate_length: float
    num_texts: int


def is_held_out(sample: HiddenStateSample) -> bool:
    """Whether a response is kept from training: a function of its name, so the same wherever and whenever asked."""
    return hashlib.sha256(sample.request_id.encode()).digest()[0] % HELD_OUT_SHARE == 0


class DrafterPublisher:
    """Owns the live head; `head` is a copy of its own that is evaluated with either's weights."""

    def __init__(
        self, head: EagleHead, *, version: int, num_draft_tokens: int, min_gain: float = 0.0, max_texts: int = 64,
        group: dist.ProcessGroup | None = None,
    ):  # fmt: skip
        """A candidate must be accepted at 1 + `min_gain` times the live length; `max_texts` bounds a comparison."""
        self.head = head.requires_grad_(False)
        self.version = version
        self.num_draft_tokens = num_draft_tokens
        self.min_gain = min_gain
        self.max_texts = max_texts
        self.group = group
        self.live = {name: tensor.clone() for name, tensor in head.named_parameters()}

    def consider(
        self, candidate: Mapping[str, torch.Tensor], samples: Sequence[HiddenStateSample], *, target: Target
    ) -> Verdict:
        """Compare on the newest held-out samples, and make the candidate live if it is better.

        A ValueError where names or shapes differ, or where a weight is not finite; nothing is changed then. Without
        held-out text nothing is published. Collective over the group; all ranks must call with the same candidate.
        """
        self._check(candidate)
        held_out = [sample for sample in samples if is_held_out(sample)]
        newest = max((sample.policy_version for sample in held_out), default=None)
        recent = [sample for sample in held_out if sample.policy_version == newest][-self.max_texts :]
        live_length, num_texts = self._length(self.live, recent, target)
        candidate_length, _ = self._length(candidate, recent, target)
        is_better = num_texts > 0 and candidate_length > live_length * (1 + self.min_gain)
        if is_better:
            self.live = {name: tensor.detach().clone() for name, tensor in candidate.items()}
            self.version += 1
        return Verdict(
            is_published=is_better, version=self.version, live_length=live_length, candidate_length=candidate_length,
            num_texts=num_texts,
        )  # fmt: skip

    def withdrawn(self, live: Mapping[str, torch.Tensor], *, version: int) -> None:
        """The engine rolled back: this is what drafts now."""
        self._check(live)
        self.live = {name: tensor.detach().clone() for name, tensor in live.items()}
        self.version = version

    def _check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        own = {name: tuple(tensor.shape) for name, tensor in self.live.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if own != found:
            raise ValueError(f"the live drafter has the weights {own}, the candidate {found}")
        broken = sorted(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))
        if broken:
            raise ValueError(f"the candidate drafter's weights {broken} are not finite")

    def _length(
        self, tensors: Mapping[str, torch.Tensor], samples: Iterable[HiddenStateSample], target: Target
    ) -> tuple[float, int]:
        """(acceptance length over all ranks' samples, their number). Collective over the group."""
        self.head.load_state_dict(dict(tensors))
        texts = [SampledText(sample=sample) for sample in samples]
        found = evaluate(self.head, texts, target=target, num_draft_tokens=self.num_draft_tokens)
        sums = torch.tensor(
            [sum(found.standing_sum), found.num_starts[0], found.num_texts], dtype=torch.float64
        )  # fmt: skip
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        standing, num_starts, num_texts = sums.tolist()
        length = 1 + standing / num_starts if num_starts else math.nan
        return length, int(num_texts)
