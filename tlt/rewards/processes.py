"""Where scoring processes come from: forked from the zygote, Python's fork server with the scorers' libraries."""

import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path

ZYGOTE = "tlt.rewards.zygote"
ROOT = str(Path(__file__).parents[2])


class EndsAtOnce:
    """Of a process that ignores SIGTERM, which a cluster sends to all processes of a job."""

    kill: Callable[[], None]

    def terminate(self) -> None:
        self.kill()


class ForkedScorer(EndsAtOnce, ForkServerProcess):
    """A child of the zygote."""


class SpawnedScorer(EndsAtOnce, SpawnProcess):
    """A child of the rank."""


class ForkedScorers(ForkServerContext):
    Process = ForkedScorer


class SpawnedScorers(SpawnContext):
    Process = SpawnedScorer


def scorer_context() -> ForkServerContext | SpawnContext:
    """Starts the zygote, which imports while its caller goes on.

    A process has one fork server. Where another library started it first, with its own imports, scorers are children
    of the rank, and each imports the libraries for itself: forked from that server they would outlive the rank.
    """
    server = multiprocessing.forkserver._forkserver  # no public function tells whether one runs
    if server._forkserver_pid is not None and server._preload_modules != [ZYGOTE]:
        return SpawnedScorers()
    # The server looks for modules here and in its own folder, and goes without what it cannot find.
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if ROOT not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *paths])
    multiprocessing.set_forkserver_preload([ZYGOTE])
    multiprocessing.forkserver.ensure_running()
    return ForkedScorers()
