"""Run a function on `world_size` gloo ranks of this CPU and report the rank that failed first.

A rank is a process of its own, forked from a server that has imported torch, Megatron and vLLM already and has done
nothing else (preload.py): the imports alone would take most of a small test's time.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

multiprocessing.set_forkserver_preload(["tests.distributed.preload"])


def start_method() -> str:
    """Of processes. Whether CUDA can be used is found out while vLLM is imported, and CUDA does not survive a fork."""
    return "spawn" if torch.cuda.is_available() else "forkserver"


def _rank_main(rank, fn, world_size, folder, args):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    try:
        fn(rank, world_size, *args)
    except Exception:
        # Written before the group goes down: the other ranks then fail too, with a mere connection error.
        Path(folder, f"{time.time_ns()}-rank{rank}").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():  # an engine that was closed has taken it down
            dist.destroy_process_group()


def run_ranks(fn, world_size: int, *args) -> None:
    """Call `fn(rank, world_size, *args)` in `world_size` processes; `fn` must be importable (top level)."""
    if torch.cuda.is_available() and torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} GPUs, {torch.cuda.device_count()} are here")
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.start_processes(
                _rank_main, args=(fn, world_size, folder, args), nprocs=world_size, start_method=start_method()
            )
        except mp.ProcessRaisedException:
            first = min(path for path in Path(folder).iterdir() if "-rank" in path.name)
            raise AssertionError(f"{first.name.partition('-')[2]} failed first:\n{first.read_text()}") from None
