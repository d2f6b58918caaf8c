"""What a rank holds of its machine: figures that must stay flat for as long as a run lasts."""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one rank's process."""

    rss_bytes: int
    """Resident memory."""
    num_files: int
    """Open file descriptors."""
    num_threads: int
    history_bytes: int = 0
    """Responses of past iterations."""


def own_resources(*, history_bytes: int) -> Resources:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Resources(
        rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"), num_files=len(os.listdir("/proc/self/fd")) - 1,  # its own
        num_threads=len(os.listdir("/proc/self/task")), history_bytes=history_bytes,
    )  # fmt: skip


def give_back_memory() -> None:
    """Return what the allocator holds and nothing uses, if it is glibc's: between the large tensors of a phase lie
    small things that live on, and without this each iteration leaves a little more behind."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resource_metrics(ranks: Sequence[Resources]) -> dict[str, float]:
    """Largest values over ranks."""
    return {
        "host/rss_mib_max": max(rank.rss_bytes for rank in ranks) / 2**20,
        "host/open_files_max": float(max(rank.num_files for rank in ranks)),
        "host/threads_max": float(max(rank.num_threads for rank in ranks)),
        "host/history_mib": max(rank.history_bytes for rank in ranks) / 2**20,
    }
