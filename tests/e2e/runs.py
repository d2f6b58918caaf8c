"""pretrain_rl.py under torchrun on two CPU ranks with a tiny model, as a user starts it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
SUMS = 'reasoning-gym:chain_sum:{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'


def flags(model: Path, save: Path, **overrides) -> list[str]:
    """Flags of a small run; `overrides` by flag name with underscores, None removes a flag."""
    values = {
        "hf_model": model,
        "save": save,
        "load": save,
        "train_iters": 4,
        "save_interval": 1,
        "bf16": False,
        "lr": 1e-3,
        "rl_prompts_per_iteration": 6,
        "rl_group_size": 8,
        "rl_optimizer_steps": 2,
        "rollout_max_response_tokens": 120,  # phases long enough to be killed in
        "rollout_max_num_seqs": 32,
        "rollout_save_interval": 2,
        "eval_num_prompts": 4,
        "eval_num_samples": 2,
        "data_train": SUMS,
        "distributed_timeout_minutes": 2,
        **overrides,
    }
    return as_flags(values)


def as_flags(values: dict[str, object]) -> list[str]:
    """Command line of values by flag name with underscores; None leaves a flag out."""
    result = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            result.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            result += [flag, str(value)]
    return result


def start(arguments: list[str], num_ranks: int = 2, program: str = "pretrain_rl.py") -> subprocess.Popen:
    """Start the run; its output goes to a pipe."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    return subprocess.Popen(
        [*command, str(ROOT / program), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen, timeout_s: float = 200) -> str:
    """Wait for the end and return the output; on time-out the whole session is killed."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill(process)
        output, _ = process.communicate()
        raise AssertionError(f"no end within {timeout_s} s:\n{output[-3000:]}") from None
    return output


def kill(process: subprocess.Popen) -> None:
    """SIGKILL for torchrun and every rank at once, as a machine that loses power.

    torchrun makes each rank the leader of a session of its own, so that a signal to torchrun's group misses them.
    """
    torchrun = psutil.Process(process.pid)
    processes = [torchrun, *torchrun.children(recursive=True)]
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes[1:], timeout=30)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, timeout_s: float = 150) -> None:
    """Poll fast: the moments waited for are short."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended early:\n{process.communicate()[0][-3000:]}"
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.002)


def records(save: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    path = save / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    timed = ("_s", "_frac_of_time", "idle_frac", "tokens_per_s")
    return [{name: value for name, value in line.items() if not name.endswith(timed)} for line in lines]


def spans(save: Path, name: str, rank: int = 0) -> int:
    path = save / "trace" / f"rank{rank}.jsonl"
    return path.read_text().count(f'"name": "{name}"') if path.exists() else 0
