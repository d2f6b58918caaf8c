"""Whatever becomes of one rank, the others end within the deadline and say who was where; processes, real store."""

import logging
import multiprocessing
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.ranks import start_method
from tlt.heartbeat import EXPIRED, Heartbeat

DEADLINE_S = 2.0


def _rank(rank: int, port: int, folder: Path, case: str) -> None:
    logging.basicConfig(filename=folder / f"log{rank}", force=True)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    phase = {"now": "rollout"}
    heartbeat = Heartbeat(
        store, rank=rank, world_size=3, deadline_s=DEADLINE_S, where=lambda: phase["now"],
        stacks=folder / f"stacks{rank}",
    )  # fmt: skip
    heartbeat.start()
    end_s = time.monotonic() + 1.5 * DEADLINE_S
    while time.monotonic() < end_s:
        time.sleep(0.02)
    phase["now"] = "update"
    if rank == 1:
        if case == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        if case == "sigstop":
            (folder / "struck").write_text("")
            os.kill(os.getpid(), signal.SIGSTOP)
        if case == "hang":
            time.sleep(60)
        if case == "raise":
            heartbeat.failed(ValueError("a wrong number"))
            os._exit(1)
    if case != "well":
        if rank == 0:
            store.get("never")  # a wait that does not end
        while True:  # busy: neither still nor silent
            time.sleep(0.02)
    heartbeat.close()


def run_case(folder: Path, case: str) -> tuple[list[int], float]:
    """Exit codes by rank, and seconds until all but a stopped one had ended."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
    context = multiprocessing.get_context(start_method())
    ranks = [context.Process(target=_rank, args=(rank, server.port, folder, case)) for rank in range(3)]
    begin_s = time.monotonic()
    for process in ranks:
        process.start()
    for process in ranks:
        if not (case == "sigstop" and process is ranks[1]):
            process.join(timeout=60)
    seconds = time.monotonic() - begin_s
    if case == "sigstop":
        ranks[1].kill()
        ranks[1].join()
    return [process.exitcode for process in ranks], seconds


@pytest.mark.parametrize(
    ("case", "codes", "reason"),
    [
        ("well", [0, 0, 0], None),
        ("sigkill", [EXPIRED, -signal.SIGKILL, EXPIRED], "rank 1 was not heard of for 2 s; last in update"),
        ("sigstop", [EXPIRED, -signal.SIGKILL, EXPIRED], "rank 1 was not heard of for 2 s; last in update"),
        ("hang", [EXPIRED, EXPIRED, EXPIRED], "stood still for 2 s in update"),
        ("raise", [EXPIRED, 1, EXPIRED], "rank 1 failed in update: ValueError: a wrong number"),
    ],
)
def test_all_ranks_end_in_time_and_say_why(tmp_path, case, codes, reason):
    found, seconds = run_case(tmp_path, case)
    assert found == codes
    assert seconds < 1.5 * DEADLINE_S + 2 * DEADLINE_S + 20  # starting processes, on cores that may be shared
    for rank in (0, 2):
        log = (tmp_path / f"log{rank}").read_text()
        stacks = tmp_path / f"stacks{rank}"
        if reason is None:
            assert not log
            assert not stacks.exists()
            continue
        assert reason in log, log
        assert f"rank {rank} in update ends the run" in log
        assert "_rank" in stacks.read_text(), "where the main thread was"
