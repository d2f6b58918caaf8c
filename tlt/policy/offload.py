"""Optimizer state on the host while the rollout engine has the GPU.

Megatron's own `offload_to_cpu` gives each parameter new memory, which parts those of an fp32 model from the model that
they are, or are views of; and it brings AdamW's step counts, which belong on the host, back as tensors of the GPU that
every step waits for. Here storages are emptied and filled in place: whatever looks at them stays.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.optimizer import MegatronOptimizer

Storage = torch.UntypedStorage
PINNED_BYTES = 8 * 2**30
"""Of host memory that is locked, which a GPU copies to several times as fast; torch rounds each piece of it up to a
power of two, which would be too much for the state of a large model."""


class OptimizerOffload:
    """Moves moments and master weights that are on `device`; what the model itself computes with stays."""

    def __init__(self, optimizer: MegatronOptimizer, model: torch.nn.Module, device: torch.device):
        self.optimizer = optimizer
        self.model = model
        self.device = device
        self._moved: list[tuple[Storage, torch.Tensor]] = []
        self._num_pinned_bytes = 0
        self._spare: dict[int, list[torch.Tensor]] = {}
        """Host memory by size, kept: memory that is new each time costs more than the copy."""

    def to_host(self) -> None:
        """Copy and free; nothing where it is done already."""
        if self._moved:
            return
        for storage in self._storages():
            spare = self._spare.get(storage.nbytes())
            host = spare.pop() if spare else self._host_memory(storage.nbytes())
            host.copy_(_bytes_of(storage))
            self._moved.append((storage, host))
        for storage, _ in self._moved:
            storage.resize_(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the engine allocates outside of torch's own cache

    def to_device(self) -> None:
        """Undo `to_host`."""
        for storage, host in self._moved:
            storage.resize_(len(host))
            _bytes_of(storage).copy_(host)
            self._spare.setdefault(len(host), []).append(host)
        self._moved = []

    @contextmanager
    def readable(self) -> Iterator[None]:
        """What was moved may be read as long as the context lasts: its tensors are those on the host."""
        hosts = {storage._cdata: host for storage, host in self._moved}
        moved = [each for each in self._tensors() if each.untyped_storage()._cdata in hosts]
        freed = [each.data for each in moved]
        for each in moved:
            host = hosts[each.untyped_storage()._cdata].untyped_storage()
            each.data = torch.empty(0, dtype=each.dtype).set_(host, each.storage_offset(), each.shape, each.stride())
        try:
            yield
        finally:
            for each, data in zip(moved, freed, strict=True):
                each.data = data

    def _host_memory(self, num_bytes: int) -> torch.Tensor:
        is_pinned = self.device.type == "cuda" and self._num_pinned_bytes + num_bytes <= PINNED_BYTES
        self._num_pinned_bytes += num_bytes if is_pinned else 0
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)

    def _storages(self) -> list[Storage]:
        """Each once, in an order of their own."""
        model = {each.untyped_storage().data_ptr() for each in self.model.parameters()}
        found = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage()
            for tensor in self._tensors() if tensor.device.type == self.device.type and tensor.numel()
        }  # fmt: skip
        return [storage for address, storage in found.items() if address not in model]

    def _tensors(self) -> Iterator[torch.Tensor]:
        for part in self.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                yield from group["params"]
            for state in part.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _bytes_of(storage: Storage) -> torch.Tensor:
    """All of it, as one tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
