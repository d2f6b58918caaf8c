"""The batch script's own logic, run for real: rendezvous, signals, queueing again. Its nodes are stubs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm import SBATCH, Slurm

NODE = """
import json, os, pathlib, signal, sys, time

folder = pathlib.Path(sys.argv[1])
def save(number, frame):  # as in tlt/interrupt.py, a second signal of a kind ends the process
    signal.signal(number, signal.SIG_DFL)
    (folder / f"saved{os.environ['SLURM_NODEID']}").write_text(signal.Signals(number).name)
    time.sleep(0.5)  # the batch shell has to wait for it
    sys.exit(int(sys.argv[3]))
ignored = [name for name in ("SIGUSR1", "SIGTERM") if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN]
signal.signal(signal.SIGUSR1, save)
seen = {name: value for name, value in os.environ.items() if name.startswith(("PET_", "TORCH_"))}
partial = folder / f"node{os.environ['SLURM_NODEID']}.tmp"
partial.write_text(json.dumps(seen | {"ignored": ignored, "flags": sys.argv[4:]}))
partial.rename(partial.with_suffix(".json"))
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


def write_script(folder: Path, *, seconds: float, status: int = 0) -> Path:
    """A run.sh whose nodes write what they see and wait."""
    (folder / "node.py").write_text(NODE)
    script = folder / "run.sh"
    script.write_text(f'exec {sys.executable} {folder}/node.py {folder} {seconds} {status} "$@"\n')
    return script


def wait_for(path: Path) -> Path:
    deadline = time.monotonic() + 150
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return path


def seen_by(folder: Path, node: int) -> dict:
    return json.loads(wait_for(folder / f"node{node}.json").read_text())


def test_it_parses():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)


def test_all_nodes_meet_at_the_first_one(tmp_path):
    slurm = Slurm(tmp_path, num_nodes=2)
    job = slurm.sbatch(write_script(tmp_path, seconds=0), "--train-iters", "7", MAX_RESTARTS="4")
    assert job.wait(timeout=150) == 0, job.stdout.read()
    first, second = (seen_by(tmp_path, node) for node in (0, 1))
    assert first["PET_RDZV_ENDPOINT"] == second["PET_RDZV_ENDPOINT"]
    assert first["PET_RDZV_ENDPOINT"].startswith("127.0.0.1:2")
    assert first["PET_RDZV_ID"] == second["PET_RDZV_ID"]
    assert (first["PET_NNODES"], first["PET_NPROC_PER_NODE"], first["PET_MAX_RESTARTS"]) == ("2", "1", "4")
    assert first["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1", "or a node that comes back never meets the others"
    assert [each["PET_RDZV_CONF"] for each in (first, second)] == ["is_host=1", "is_host=0"]
    assert first["flags"] == ["--train-iters", "7"]
    assert first["ignored"] == ["SIGUSR1", "SIGTERM"], "or torchrun would end before its ranks have saved"
    assert not slurm.requeued.exists()


@pytest.mark.parametrize(
    ("number", "status", "is_requeued"),
    [
        (signal.SIGUSR1, 0, True),  # the time limit comes
        (signal.SIGUSR1, 3, True),  # what was saved before is there
        (signal.SIGTERM, 0, False),  # Slurm decides
    ],
)
def test_a_signal_reaches_the_ranks_and_the_job_waits_for_them(tmp_path, number, status, is_requeued):
    slurm = Slurm(tmp_path, num_nodes=2)
    job = slurm.sbatch(write_script(tmp_path, seconds=200, status=status))
    for node in (0, 1):
        seen_by(tmp_path, node)
    slurm.signal_batch_shell(job, number)
    assert (job.wait(timeout=150) == 0) == (status == 0), job.stdout.read()
    assert [(tmp_path / f"saved{node}").read_text() for node in (0, 1)] == ["SIGUSR1"] * 2
    assert slurm.requeued.exists() == is_requeued


def test_ranks_that_save_are_not_told_again(tmp_path):
    slurm = Slurm(tmp_path, num_nodes=2)
    job = slurm.sbatch(write_script(tmp_path, seconds=200))
    for node in (0, 1):
        seen_by(tmp_path, node)
    slurm.signal_batch_shell(job, signal.SIGUSR1)
    for node in (0, 1):
        wait_for(tmp_path / f"saved{node}")
    slurm.signal_batch_shell(job, signal.SIGTERM)
    assert job.wait(timeout=150) == 0, "a second SIGUSR1 ended a node"
    assert slurm.requeued.exists()


def test_a_job_that_fails_is_not_queued_again(tmp_path):
    slurm = Slurm(tmp_path, num_nodes=2)
    job = slurm.sbatch(write_script(tmp_path, seconds=0, status=5))
    # srun ends with the highest status: the node that fails first may have the other one killed.
    assert job.wait(timeout=150) in (5, 128 + signal.SIGKILL)
    assert not slurm.requeued.exists()


def test_it_says_what_it_needs(tmp_path):
    process = subprocess.run(["bash", str(SBATCH)], capture_output=True, text=True)
    assert process.returncode != 0
    assert "usage: sbatch" in process.stderr
