"""Whatever becomes of one rank, the others end within the deadline and say who was where; processes, real store."""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.distributed.ranks import start_method
from tlt.heartbeat import EXPIRED, Heartbeat

NUM_RANKS = 3
DEADLINE_S = 12.0


def _rank(rank: int, port: int, folder: Path, case: str) -> None:
    logging.basicConfig(filename=folder / f"log{rank}", force=True)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    _wait_for_all(store, "here")  # as a run's ranks wait for each other before they listen for each other
    phase = {"now": "rollout"}
    heartbeat = Heartbeat(
        store, rank=rank, world_size=NUM_RANKS, deadline_s=DEADLINE_S, where=lambda: phase["now"],
        stacks=folder / f"stacks{rank}",
    )  # fmt: skip
    heartbeat.start()
    end_s = time.monotonic() + (1.5 * DEADLINE_S if case == "well" else 1)
    while time.monotonic() < end_s:
        time.sleep(0.02)
    phase["now"] = "update"
    end_s = time.monotonic() + 1
    _wait_for_all(store, "in update")
    while time.monotonic() < end_s:  # the others hear of it
        time.sleep(0.02)
    if rank == 1:
        (folder / "struck").write_text("")
        if case == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        if case == "sigstop":
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


def _wait_for_all(store: dist.Store, where: str) -> None:
    store.add(where, 1)
    while store.add(where, 0) < NUM_RANKS:
        time.sleep(0.02)


CASES = {
    "well": ([0, 0, 0], None),
    "sigkill": ([EXPIRED, -signal.SIGKILL, EXPIRED], "rank 1 was not heard of for 6 s; last in update"),
    "sigstop": ([EXPIRED, -signal.SIGKILL, EXPIRED], "rank 1 was not heard of for 6 s; last in update"),
    "hang": ([EXPIRED, EXPIRED, EXPIRED], "stood still for 12 s in update"),
    "raise": ([EXPIRED, 1, EXPIRED], "rank 1 failed in update: ValueError: a wrong number"),
}
"""Exit codes by rank, and what is said."""


@dataclass(frozen=True)
class Ended:
    """How the ranks of a case ended."""

    codes: list[int]
    last_s: float
    folder: Path

    def text(self) -> str:
        """What the ranks logged."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log*")))


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, Ended]:
    return run_all(tmp_path_factory.mktemp, multiprocessing.get_context(start_method()))


def run_all(make_folder: Callable[[str], Path], context) -> dict[str, Ended]:
    """All cases at once."""
    servers, ranks, folders, ends_s = {}, {}, {}, {}
    for case in CASES:
        servers[case] = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))
        folders[case] = make_folder(case)
        ranks[case] = [
            context.Process(target=_rank, args=(rank, servers[case].port, folders[case], case))
            for rank in range(NUM_RANKS)
        ]
        for process in ranks[case]:
            process.start()
    waited_for = {each.sentinel: each for case in CASES for each in ranks[case]}
    waited_for.pop(ranks["sigstop"][1].sentinel)
    while waited_for:
        for sentinel in wait(list(waited_for), timeout=200) or pytest.fail(f"never ended: {waited_for}"):
            ends_s[waited_for.pop(sentinel)] = time.time()
    ranks["sigstop"][1].kill()
    ranks["sigstop"][1].join()
    return {
        case: Ended(
            [process.exitcode for process in ranks[case]],
            max(ends_s[process] for process in ranks[case] if process in ends_s),
            folders[case],
        )
        for case in CASES
    }


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_end_in_time_and_say_why(ended, case):
    (codes, reason), folder = CASES[case], ended[case].folder
    assert ended[case].codes == codes, ended[case].text()
    struck_s = (folder / "struck").stat().st_mtime
    assert ended[case].last_s - struck_s < 2 * DEADLINE_S + 20  # 15 processes on cores that may be shared
    for rank in (0, 2):
        log = (folder / f"log{rank}").read_text()
        stacks = folder / f"stacks{rank}"
        if reason is None:
            assert not log
            assert not stacks.exists()
            continue
        assert reason in log, log
        assert f"rank {rank} in update ends the run" in log
        assert "_rank" in stacks.read_text(), "where the main thread was"
