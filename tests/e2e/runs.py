"""Programs on CPU ranks with a tiny model: under torchrun, as a user starts them, or on ranks that are forked."""

import contextlib
import importlib
import inspect
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import psutil
import torch

from tests.distributed.ranks import start_method

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


RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _program(rank: int, world_size: int, port: int, module: str, arguments: Sequence[str], output: Path) -> None:
    torch.set_num_threads(1)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in RENDEZVOUS:
        os.environ.pop(name, None)
    if world_size > 1:
        values = (rank, rank, world_size, "127.0.0.1", port)
        os.environ.update({name: str(value) for name, value in zip(RENDEZVOUS, values, strict=True)})
    sys.argv = [module, *arguments]
    main = importlib.import_module(module).main
    sys.exit(main(sys.argv[1:]) if inspect.signature(main).parameters else main())


class ForkedRun:
    """`module.main()` on ranks of the fork server (tests/distributed/ranks.py), with as much of Popen as tests use.

    A program finds what it finds under torchrun, or alone where there is one rank, but imports cost nothing: for tests
    of what a run does, not of how it is started.
    """

    def __init__(self, module: str, arguments: Sequence[object], num_ranks: int = 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.output = Path(tempfile.mkdtemp()) / "output"
        shared = (num_ranks, port, module, [str(argument) for argument in arguments], self.output)
        context = multiprocessing.get_context(start_method())
        self.ranks = [context.Process(target=_program, args=(rank, *shared)) for rank in range(num_ranks)]
        for process in self.ranks:
            process.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.ranks if process.exitcode is None]

    @property
    def returncode(self) -> int | None:
        """Status of the first rank that failed, 0 after all, None as long as it runs."""
        codes = [process.exitcode for process in self.ranks]
        return next((code for code in codes if code), None if None in codes else 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As torchrun: a rank that fails takes the others with it."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            running = [process.sentinel for process in self.ranks if process.exitcode is None]
            if not wait(running, None if deadline is None else max(0.0, deadline - time.monotonic())):
                raise subprocess.TimeoutExpired("forked ranks", timeout)
        for process in self.ranks:
            if process.exitcode is None:
                process.kill()
            process.join()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.output.read_text(errors="replace") if self.output.exists() else "", None


def run_forked(module: str, arguments: Sequence[object], num_ranks: int = 2, timeout_s: float = 200) -> str:
    """Output of a forked run that must end well."""
    process = ForkedRun(module, arguments, num_ranks)
    output = finish(process, timeout_s)
    assert process.returncode == 0, f"status {process.returncode}:\n{output[-3000:]}"
    return output


def finish(process: subprocess.Popen | ForkedRun, timeout_s: float = 200) -> str:
    """Wait for the end and return the output; on time-out the whole session is killed."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill(process)
        output, _ = process.communicate()
        raise AssertionError(f"no end within {timeout_s} s:\n{output[-3000:]}") from None
    return output


def kill(process: subprocess.Popen | ForkedRun) -> None:
    """SIGKILL for torchrun and every rank at once, as a machine that loses power.

    torchrun makes each rank the leader of a session of its own, so that a signal to torchrun's group misses them.
    """
    roots = [psutil.Process(pid) for pid in (process.pids if isinstance(process, ForkedRun) else [process.pid])]
    processes = [*roots, *(child for root in roots for child in root.children(recursive=True))]
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes[len(roots) :], timeout=30)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen | ForkedRun, timeout_s: float = 150) -> None:
    """Poll fast: the moments waited for are short."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended early:\n{process.communicate()[0][-3000:]}"
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.002)


def records(save: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock or on the machine."""
    path = save / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    timed = ("_s", "_frac_of_time", "idle_frac", "tokens_per_s")
    return [
        {name: value for name, value in line.items() if not name.endswith(timed) and not name.startswith("host/")}
        for line in lines
    ]


def spans(save: Path, name: str, rank: int = 0) -> int:
    path = save / "trace" / f"rank{rank}.jsonl"
    return path.read_text().count(f'"name": "{name}"') if path.exists() else 0
