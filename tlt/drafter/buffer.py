"""Hidden states of finished responses on the host, bounded in bytes: what a drafter is trained on."""

from collections import deque
from collections.abc import Iterator

from tlt.types import HiddenStateSample


class HiddenStateBuffer:
    """Oldest samples leave when `max_bytes` is reached; a buffer of 0 bytes keeps nothing."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_dropped = 0
        self._samples: deque[HiddenStateSample] = deque()

    @property
    def is_open(self) -> bool:
        """Whether it takes samples at all: no one copies hidden states for a closed one."""
        return self.max_bytes > 0

    def add(self, sample: HiddenStateSample) -> None:
        """Keep a sample; one that is larger than the whole buffer is dropped and counted."""
        size = num_bytes(sample)
        while self._samples and self.num_bytes + size > self.max_bytes:
            self.num_bytes -= num_bytes(self._samples.popleft())
            self.num_dropped += 1
        if self.num_bytes + size > self.max_bytes:
            self.num_dropped += 1
            return
        self._samples.append(sample)
        self.num_bytes += size

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[HiddenStateSample]:
        """Oldest first."""
        return iter(self._samples)


def num_bytes(sample: HiddenStateSample) -> int:
    """Of a sample's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (sample.token_ids, sample.last_hidden_states))
