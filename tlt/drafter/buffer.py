"""Hidden states of finished responses on the host, bounded in bytes: what a drafter is trained on.

One-step-off sampling (TLT, arXiv 2511.16665): while a rollout runs, its finished responses are the short ones. Those
of the policy before it are kept beside them, and what the present ones lack in length is taken from there. Reading
takes nothing away, so a training that is preempted finds everything again.
"""

from bisect import bisect_right
from collections.abc import Iterator
from random import Random

import torch

from tlt.types import HiddenStateSample

NUM_STRATA = 4
"""Length classes of equally many responses each."""


class HiddenStateBuffer:
    """A buffer of 0 bytes keeps nothing. Policy versions more than `max_age` before the newest leave; None keeps all.

    Where `max_bytes` is reached, samples leave the oldest version first and the fullest length class of it, so that
    the long responses, of which there are few, stay.
    """

    def __init__(self, max_bytes: int, *, max_age: int | None = None):
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.num_bytes = 0
        self.num_dropped = 0
        """Left for lack of room."""
        self.num_unsound = 0
        """Never entered: not all of their hidden states are finite."""
        self._samples: dict[int, list[HiddenStateSample]] = {}  # by policy version, oldest first
        self._lengths: dict[int, list[int]] = {}  # of all samples that came, sorted; dropped ones too

    @property
    def is_open(self) -> bool:
        """Whether it takes samples at all: no one copies hidden states for a closed one."""
        return self.max_bytes > 0

    def add(self, sample: HiddenStateSample) -> None:
        """Keep a sample; one that is larger than the whole buffer is dropped and counted, as is a too old one, and one
        whose hidden states are not all finite."""
        if not is_sound(sample):
            self.num_unsound += 1
            return
        version, size = sample.policy_version, num_bytes(sample)
        newest = max([version, *self._samples])
        if size > self.max_bytes or self._is_old(version, newest):
            self.num_dropped += 1
            return
        self._samples.setdefault(version, []).append(sample)
        lengths = self._lengths.setdefault(version, [])
        lengths.insert(bisect_right(lengths, len(sample.token_ids)), len(sample.token_ids))
        self.num_bytes += size
        for old in [one for one in self._samples if self._is_old(one, newest)]:
            self.num_bytes -= sum(num_bytes(one) for one in self._samples.pop(old))
            del self._lengths[old]
        while self.num_bytes > self.max_bytes:
            self._drop_one()

    def _is_old(self, version: int, newest: int) -> bool:
        return self.max_age is not None and version < newest - self.max_age

    def _drop_one(self) -> None:
        version = min(version for version, samples in self._samples.items() if samples)
        samples, edges = self._samples[version], self._edges(version)
        counts = [0] * NUM_STRATA
        for sample in samples:
            counts[stratum(sample, edges)] += 1
        fullest = counts.index(max(counts))
        index = next(i for i, sample in enumerate(samples) if stratum(sample, edges) == fullest)
        self.num_bytes -= num_bytes(samples.pop(index))
        self.num_dropped += 1
        if not samples and version < max(self._samples):  # or a run of many policies would remember all of them
            del self._samples[version], self._lengths[version]

    def _edges(self, version: int) -> list[int]:
        """Upper edges of all length classes but the last, exclusive."""
        lengths = self._lengths[version]
        return [lengths[len(lengths) * index // NUM_STRATA] for index in range(1, NUM_STRATA)]

    def training_samples(self, *, seed: int) -> list[HiddenStateSample]:
        """All of the newest version, and of the one before it what makes each of its length classes as full as it was.

        Short responses are thus mostly new and long ones mostly old until the new ones end; then all are new. A
        function of the samples and the seed.
        """
        versions = sorted(version for version, samples in self._samples.items() if samples)
        if len(versions) < 2:
            return list(self)
        previous, newest = versions[-2], versions[-1]
        edges, generator = self._edges(previous), Random(seed)
        classes: list[list[HiddenStateSample]] = [[] for _ in range(NUM_STRATA)]
        for sample in self._samples[previous]:
            classes[stratum(sample, edges)].append(sample)
        present = [0] * NUM_STRATA
        for sample in self._samples[newest]:
            present[stratum(sample, edges)] += 1
        chosen = list(self._samples[newest])
        for old, count in zip(classes, present, strict=True):
            chosen += generator.sample(old, max(len(old) - count, 0))
        return chosen

    def __len__(self) -> int:
        return sum(map(len, self._samples.values()))

    def __iter__(self) -> Iterator[HiddenStateSample]:
        """Older version first, each in the order in which its responses ended."""
        for version in sorted(self._samples):
            yield from self._samples[version]

    def state_dict(self) -> dict:
        """Samples and what is known of lengths; for `torch.save`."""
        return {
            "samples": [dict(vars(sample)) for sample in self],
            "lengths": dict(self._lengths),
            "num_dropped": self.num_dropped,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take the place of what is held; a smaller buffer keeps what it would have kept."""
        self._samples, self._lengths, self.num_bytes = {}, {}, 0
        for fields in state["samples"]:
            self.add(HiddenStateSample(**fields))
        self._lengths = {version: list(lengths) for version, lengths in state["lengths"].items()}
        self.num_dropped = state["num_dropped"]


def stratum(sample: HiddenStateSample, edges: list[int]) -> int:
    """Length class of a sample."""
    return bisect_right(edges, len(sample.token_ids))


def is_sound(sample: HiddenStateSample) -> bool:
    """Whether all of its hidden states are finite: one that is not would make a NaN of the whole head."""
    states = (sample.last_hidden_states, sample.aux_hidden_states)
    return all(bool(each.isfinite().all()) for each in states if each is not None)


def num_bytes(sample: HiddenStateSample) -> int:
    """Of a sample's tensors."""
    return sum(value.nbytes for value in vars(sample).values() if isinstance(value, torch.Tensor))
