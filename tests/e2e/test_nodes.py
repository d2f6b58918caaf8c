"""Two nodes, with addresses of their own and the rendezvous of a cluster, on one machine.

In the slow set. Not covered: real networks, file systems of clusters, and the loss of the first node, which hosts the
rendezvous: then torchrun ends on all nodes, and the job starts anew as after the time limit.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import runs
from tests.slurm import Slurm, free_job_id

pytestmark = [pytest.mark.engine, pytest.mark.megatron, pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE_S = 250


def write_script(folder: Path, arguments: list[str]) -> Path:
    """A run.sh that leaves the rendezvous to torchrun's variables, as those of examples/ do."""
    script = folder / "run.sh"
    command = [sys.executable, "-m", "torch.distributed.run", str(runs.ROOT / "pretrain_rl.py"), *arguments]
    script.write_text(f"exec {shlex.join(command)}\n")
    return script


def start_node(node: int, script: Path, job_id: int) -> subprocess.Popen:
    """torchrun of one node, without Slurm."""
    rendezvous = {
        "NNODES": "2", "NPROC_PER_NODE": "1", "RDZV_BACKEND": "c10d", "RDZV_ID": str(job_id), "MAX_RESTARTS": "3",
        "RDZV_ENDPOINT": f"127.0.0.1:{20000 + job_id % 10000}", "LOCAL_ADDR": f"127.0.0.{node + 1}",
        "RDZV_CONF": f"is_host={int(node == 0)}",  # on one machine both would think that they are the host
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            **{f"PET_{name}": value for name, value in rendezvous.items()},
        },
    )  # fmt: skip


def test_two_nodes_go_on_after_the_time_limit_and_after_the_loss_of_a_node(tiny_models, tmp_path):
    """The metrics of a job that was stopped, queued again and lost a node are those of one undisturbed node."""
    save = tmp_path / "run"
    settings = {"rollout_save_interval": 0, "reward_timeout_s": 100}  # a busy machine must not cost rewards
    script = write_script(tmp_path, runs.flags(tiny_models["llama"], save, **settings))
    slurm = Slurm(tmp_path / "slurm", num_nodes=2)

    # The time limit comes while iteration 2 is on its way.
    job = slurm.sbatch(script)
    runs.wait_until(lambda: (save / "iter_0000001").exists(), job, PATIENCE_S)
    slurm.signal_batch_shell(job, signal.SIGUSR1)
    output = runs.finish(job, PATIENCE_S)
    assert job.returncode == 0, output[-3000:]
    assert slurm.requeued.read_text().strip()
    saved = [int(path.name.removeprefix("iter_")) for path in save.glob("iter_*") if path.suffix != ".tmp"]
    assert max(saved) < 4, "there is something left to do"
    assert max(saved) == runs.records(save)[-1]["iteration"]

    # Again, without Slurm; the second node dies in the next iteration and comes back.
    job_id = free_job_id()
    nodes = [start_node(node, script, job_id) for node in (0, 1)]
    updates = runs.spans(save, "update", rank=1)
    runs.wait_until(lambda: runs.spans(save, "update", rank=1) > updates, nodes[0], PATIENCE_S)
    runs.kill(nodes[1])
    nodes[1].wait()
    nodes[1] = start_node(1, script, job_id)
    for node in nodes:
        output = runs.finish(node, PATIENCE_S)
        assert node.returncode == 0, output[-3000:]
    starts = json.loads((save / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [2, 2, 2]

    undisturbed = tmp_path / "undisturbed"
    runs.run_forked("pretrain_rl", runs.flags(tiny_models["llama"], undisturbed, **settings))
    assert runs.records(save) == runs.records(undisturbed), "resume = no resume, to the last bit"
