"""Runs of pretrain_rl.py that a tool starts, and how far they came."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRACKER = "latest_checkpointed_iteration.txt"
"""As tlt/run_state.py, whose import takes as long as all of Megatron's."""


def run_command(num_ranks: int) -> list[str]:
    """torchrun of so many ranks on this machine; flags follow."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    return [*torchrun, str(ROOT / "pretrain_rl.py")]


def last_iteration(save: Path) -> int:
    """Of the newest complete checkpoint; 0 before the first."""
    tracker = save / TRACKER
    return int(tracker.read_text()) if tracker.is_file() else 0
