"""A drafter's training state to disk in the background: selective, asynchronous, atomic.

The caller is held only while tensors are copied into host memory that is kept from save to save; a thread writes,
syncs and renames. What is not trained (embedding and LM head, the policy's) is not in the state at all. At most one
save is under way. A reader finds the last whole file, whenever the writer was killed.
"""

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tlt.disk import flush_to_disk

logger = logging.getLogger(__name__)


class DrafterCheckpointer:
    """Writes states to `path`, one after another; `close` before the process ends."""

    def __init__(self, path: Path):
        self.path = path
        self.num_skipped = 0
        """Saves that found the one before still under way."""
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: Mapping) -> bool:
        """Begin to save; False, and nothing done, while the save before is under way.

        Raises RuntimeError if that one failed: a training must not go on believing that it is saved.
        """
        if self._thread is not None and self._thread.is_alive():
            self.num_skipped += 1
            return False
        self.wait()
        snapshot = self._copy(state, ())
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="drafter checkpoint")
        self._thread.start()
        return True

    def wait(self) -> None:
        """Until nothing is under way. Raises RuntimeError if the last save failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise RuntimeError(f"the drafter's checkpoint {self.path} was not written") from error

    close = wait

    def _copy(self, value: Any, where: tuple) -> Any:
        """The same structure with tensors in host buffers of this object."""
        if isinstance(value, torch.Tensor):
            buffer = self._buffers.get(where)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                pinned = value.device.type == "cuda"
                buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
                self._buffers[where] = buffer
            return buffer.copy_(value.detach())
        if isinstance(value, Mapping):
            return {key: self._copy(one, (*where, key)) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(one, (*where, index)) for index, one in enumerate(value))
        return value

    def _write(self, snapshot: Mapping) -> None:
        try:
            write_atomically(snapshot, self.path)
        except BaseException as error:  # noqa: BLE001 - a thread's boundary: raised again by the next save or wait
            logger.error("%s was not written: %s", self.path, error)
            self._error = error


def write_atomically(state: Mapping, path: Path) -> None:
    """The file holds either what it held or the whole of `state`, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    with partial.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    flush_to_disk(path.parent)


def load_checkpoint(path: Path) -> dict:
    """What was saved last, on the CPU. FileNotFoundError where nothing was."""
    return torch.load(path, map_location="cpu", weights_only=True)
