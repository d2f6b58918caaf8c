"""Slurm on one machine: `srun`, `scontrol` and a batch job, as far as examples/slurm/train.sbatch uses them.

A node is a process with all its descendants and an address of its own (127.0.0.1, 127.0.0.2, ...). As Slurm does, srun
signals every process of a node, not only the one that it started.

Not covered: Slurm itself, what sites configure, and whether a real srun hands SIGUSR1 on (its manual says so).
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

SBATCH = Path(__file__).parents[1] / "examples" / "slurm" / "train.sbatch"

SRUN = """#!{python}
import contextlib, os, signal, subprocess, sys, time
import psutil

begin = next(index for index, argument in enumerate(sys.argv) if index and not argument.startswith("--"))
options, command = sys.argv[1:begin], sys.argv[begin:]
nodes = [
    subprocess.Popen(
        command,
        start_new_session=True,
        env=os.environ | {{"SLURM_NODEID": str(i), "PET_LOCAL_ADDR": f"127.0.0.{{i + 1}}"}},
    )
    for i in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]

def send(number, _frame=None):
    for node in nodes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(number)

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, send)
while None in (codes := [node.poll() for node in nodes]):
    if "--kill-on-bad-exit=1" in options and any(codes):
        send(signal.SIGKILL)
    time.sleep(0.02)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """#!/usr/bin/env bash
set -euo pipefail
case "$1 $2" in
    "show hostnames") for ((i = 1; i <= SLURM_JOB_NUM_NODES; i++)); do echo "127.0.0.$i"; done ;;
    requeue*) echo "$2" >>"$SLURM_REQUEUED" ;;
    *) exit 1 ;;
esac
"""


def free_job_id() -> int:
    """A job whose rendezvous port is free (train.sbatch derives it from the job's number)."""
    while True:
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return 60000 + port - 20000


class Slurm:
    """`folder` takes what the commands write."""

    def __init__(self, folder: Path, *, num_nodes: int):
        self.requeued = folder / "requeued"
        self.num_nodes = num_nodes
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def environment(self, job_id: int, **variables: str) -> dict[str, str]:
        return {
            **os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-9]",
            "SLURM_JOB_NUM_NODES": str(self.num_nodes), "SLURM_JOB_ID": str(job_id), "SLURM_GPUS_ON_NODE": "1",
            "SLURM_CPUS_ON_NODE": "2", "SLURM_REQUEUED": str(self.requeued), "OMP_NUM_THREADS": "1", **variables,
        }  # fmt: skip

    def sbatch(self, script: Path, *flags: str, **variables: str) -> subprocess.Popen:
        """Start the batch script; its output and its nodes' goes to a pipe."""
        return subprocess.Popen(
            ["bash", str(SBATCH), str(script), *flags], env=self.environment(free_job_id(), **variables),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    @staticmethod
    def signal_batch_shell(job: subprocess.Popen, number: signal.Signals) -> None:
        """As `--signal=B:USR1@...` does before the time limit: the shell alone."""
        os.kill(job.pid, number)
