"""What makes files survive a power cut."""

import os
from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder, so that a rename is not ordered before the data it renames."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
