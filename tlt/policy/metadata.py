"""A checkpoint's index of tensors, which torch pickles: read first with nothing allowed but what such an index is made
of, so that a folder from outside runs no code. Everything else of a checkpoint is JSON or read with `weights_only`."""

import pickle
from pathlib import Path
from typing import Any

import torch

METADATA = ".metadata"
MODULES = (
    "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
)  # fmt: skip
NAMES = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    ("builtins", "set"), ("builtins", "frozenset"),
}  # fmt: skip


class _IndexReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for what no index of tensors holds."""
        is_own_class = module in MODULES and "." not in name
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_own_class or is_dtype or (module, name) in NAMES:
            found = super().find_class(module, name)
            if not is_own_class or (isinstance(found, type) and found.__module__ == module):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def check_metadata(folder: Path) -> None:
    """Raises ValueError where the index of a checkpoint is not one."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            _IndexReader(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError) as error:
        raise ValueError(f"{path} is no index of a checkpoint's tensors: {error}") from None
