"""Checkpoints of a run: the policy's tensors plus everything else a resume needs, complete or not there at all.

Layout (Megatron's names): `<save>/iter_0000012/` with the policy in torch_dist format, `run_state.json` and
`manifest.json`, the checksums of all files; `<save>/latest_checkpointed_iteration.txt` names the newest complete one.
A checkpoint is written to `iter_0000012.tmp`, then renamed: a folder without `.tmp` is complete. One whose files are
no longer what was written is passed over; a run that goes on from an older one renames it to `iter_0000012.damaged`.
"""

import dataclasses
import errno
import fcntl
import json
import logging
import re
import secrets
import shutil
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from tlt.disk import flush_to_disk
from tlt.drafter.checkpoint import load_checkpoint
from tlt.drafter.history import SuffixHistory
from tlt.manifest import MANIFEST, Digests, damage, digests, write_manifest
from tlt.parallel import Parallel
from tlt.protocols import PolicyTrainer, SpeculationMemory, TailWork
from tlt.trace import Trace

logger = logging.getLogger(__name__)

FORMAT = 2
TRACKER = "latest_checkpointed_iteration.txt"
STATE = "run_state.json"
HISTORY = "history.npz"
TAIL = "tail_work.pt"
SPECULATION = "speculation.json"
ADDED_LATER = {"--data-chat-template", "--data-max-rejected", "--eval-sources"}
"""Settings that checkpoints of earlier code do not name: these are resumed with any."""
SPARE_BYTES = 16 * 2**20
"""Room beside the tensors of a checkpoint and the history, for all its small files."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The run after a complete iteration; JSON types only. Sampling needs no generator state: every response's seed is
    a function of the run's seed, the iteration and the prompt."""

    iteration: int = 0
    prompt_stream: dict = field(default_factory=dict)
    """Cursor of the training prompts."""
    fingerprint: dict = field(default_factory=dict)
    """Settings that a resumed run must share, or its curve is another run's."""

    def after(self, iteration: int, prompt_stream: dict) -> "RunState":
        """The run after one more complete iteration."""
        return dataclasses.replace(self, iteration=iteration, prompt_stream=prompt_stream)


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(iteration, path) of every complete checkpoint of a run folder, oldest first."""
    found = [(re.fullmatch(r"iter_(\d{7})", path.name), path) for path in folder.glob("iter_*")]
    return sorted(
        (int(match[1]), path)
        for match, path in found
        if match and ((path / STATE).is_file() or (path / MANIFEST).is_file())
    )


def latest_checkpoint(folder: Path) -> Path | None:
    """Newest checkpoint whose files are what was written, whatever the tracker says: a crash may fall between rename
    and tracker. Says which ones are passed over; ValueError where none of those that are there is whole."""
    checkpoints = complete_checkpoints(folder)
    for _, path in reversed(checkpoints):
        found = damage(path)
        if found is None:
            return path
        logger.error("checkpoint %s is damaged: %s; the one before it is used", path, found)
    if checkpoints:
        raise ValueError(
            f"--load {folder}: all {len(checkpoints)} checkpoints are damaged, the oldest: {found}; start afresh with "
            "another --save, or restore the folder"
        )
    return None


def read_state(checkpoint: Path, fingerprint: dict) -> RunState:
    """Read a checkpoint's run state. Raises ValueError if it was written under other settings."""
    record = json.loads((checkpoint / STATE).read_text())
    if record.pop("format") != FORMAT:
        raise ValueError(
            f"{checkpoint / STATE} has another format than {FORMAT}: it is of another version of this code"
        )
    state = RunState(**record)
    compared = fingerprint.keys() - (ADDED_LATER - state.fingerprint.keys())
    different = {key for key in compared if state.fingerprint.get(key) != fingerprint[key]}
    if different:
        raise ValueError(
            f"--load {checkpoint.parent}: the run was started with other settings: "
            + "; ".join(
                f"{key} was {state.fingerprint.get(key)!r}, is {fingerprint[key]!r}" for key in sorted(different)
            )
        )
    return state


def write_history(checkpoint: Path, history: SuffixHistory) -> None:
    """Save the history of responses into a checkpoint."""
    np.savez(checkpoint / HISTORY, **{name: np.array(value) for name, value in history.state_dict().items()})


def read_history(checkpoint: Path, history: SuffixHistory) -> None:
    """Fill the history of responses with what a checkpoint holds."""
    with np.load(checkpoint / HISTORY) as arrays:
        history.load_state_dict({k: v if k == "token_ids" else v.tolist() for k, v in arrays.items()})


def write_tail_state(checkpoint: Path, tail: TailWork) -> None:
    """Save what ranks work on in the tail into a checkpoint, where that is anything."""
    state = tail.state_dict()
    if state:
        torch.save(state, checkpoint / TAIL)


def read_tail_state(checkpoint: Path) -> dict:
    """What `write_tail_state` saved, on the CPU; {} where nothing was: older checkpoints, or no work in the tail."""
    path = checkpoint / TAIL
    return load_checkpoint(path) if path.is_file() else {}


def write_speculation(checkpoint: Path, speculation: SpeculationMemory) -> None:
    """Save what speculation has learned into a checkpoint, where that is anything."""
    state = speculation.state_dict()
    if state:
        (checkpoint / SPECULATION).write_text(json.dumps(state) + "\n")


def read_speculation(checkpoint: Path) -> dict:
    """What `write_speculation` saved; {} where nothing was: older checkpoints, or no speculation."""
    path = checkpoint / SPECULATION
    return json.loads(path.read_text()) if path.is_file() else {}


def shared_folder(folder: Path, parallel: Parallel, *, patience_s: float = 90.0) -> Path:
    """The run's folder, made; RuntimeError where a rank does not see within `patience_s` what rank 0 writes into it.

    Network file systems remember for a while that a folder was not there. Collective over all ranks; all must call.
    """
    name = parallel.all_gather_objects(f".shared-{secrets.token_hex(8)}")[0]
    if parallel.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    parallel.barrier()
    deadline = time.monotonic() + patience_s
    while not (is_seen := (folder / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    seen = parallel.all_gather_objects((is_seen, socket.gethostname()))
    if parallel.rank == 0:
        (folder / name).unlink()
    blind = sorted({host for each, host in seen if not each})
    if blind:
        raise RuntimeError(f"--save {folder} must be a folder that all nodes share; on {', '.join(blind)} it is not")
    return folder


def claim(folder: Path) -> TextIO:
    """Hold the run's folder for as long as the returned file is open; RuntimeError if another process holds it.

    Ranks outlive a torchrun that is killed outright, and would go on writing beside the run that resumes theirs. A
    file system without locks protects nothing, which is said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "run.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"--save {folder} is in use by another run that is still alive; end it first") from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        logger.warning("--save %s: its file system has no locks (%s): never start two runs there", folder, error)
    return file


def clear(folder: Path, *, resumed_iteration: int) -> None:
    """Put away what a run that resumes after this iteration found in its folder: checkpoints that were never finished
    are deleted, and newer ones, which it passed over because they are damaged, renamed."""
    for partial in folder.glob("iter_*.tmp"):
        logger.warning("deleting %s: it was never finished", partial)
        shutil.rmtree(partial)
    for iteration, path in complete_checkpoints(folder):
        if iteration > resumed_iteration:
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("renamed %s to %s", path, aside.name)


class Checkpoints:
    """Saves on schedule and on request, keeps the newest few."""

    def __init__(
        self, folder: Path, *, trainer: PolicyTrainer, parallel: Parallel, history: SuffixHistory, tail: TailWork,
        speculation: SpeculationMemory, trace: Trace, interval: int, retain: int, train_iters: int,
        resumed_iteration: int,
    ):  # fmt: skip
        self.folder = folder
        self.trainer = trainer
        self.parallel = parallel
        self.history = history
        self.tail = tail
        self.speculation = speculation
        self.trace = trace
        self.interval = interval
        self.retain = retain
        self.train_iters = train_iters
        self.saved_iteration: int | None = None
        self.claimed = claim(folder) if parallel.rank == 0 else None
        if parallel.rank == 0:
            clear(folder, resumed_iteration=resumed_iteration)

    def save_if_due(self, state: RunState) -> None:
        """Every `interval` iterations and after the last. Collective over all ranks; all must call."""
        on_interval = self.interval > 0 and state.iteration % self.interval == 0
        if on_interval or state.iteration == self.train_iters:
            self.save(state)

    def save(self, state: RunState) -> None:
        """Write one checkpoint, unless this iteration is saved already. Collective over all ranks; all must call."""
        if state.iteration == self.saved_iteration:
            return
        final = self.folder / f"iter_{state.iteration:07d}"
        partial = final.with_suffix(".tmp")
        with self.trace.span("save", iteration=state.iteration):
            self._require_space()
            if self.parallel.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.parallel.barrier()
            self.trainer.save(partial)
            self.parallel.barrier()
            own = digests(partial, rank=self.parallel.rank, world_size=self.parallel.world_size)
            shards = {name: found for each in self.parallel.all_gather_objects(own) for name, found in each.items()}
            self.trace.point("save_commit")
            if self.parallel.rank == 0:
                self._complete(state, partial, final, shards)
            self.parallel.barrier()
        self.saved_iteration = state.iteration

    def _require_space(self) -> None:
        """Raise OSError on all ranks where the disk has no room for a checkpoint, even if all but the newest that is
        there are deleted for it. Collective over all ranks; all must call."""
        tensors = self.parallel.sum(torch.tensor(float(self.trainer.checkpoint_bytes()), dtype=torch.float64))
        needed = int(tensors) + self.history.max_bytes + SPARE_BYTES
        free = 0
        if self.parallel.rank == 0:
            for _, path in complete_checkpoints(self.folder)[:-1]:
                if shutil.disk_usage(self.folder).free >= needed:
                    break
                logger.warning("deleting %s to make room for the next checkpoint", path)
                shutil.rmtree(path)
            free = shutil.disk_usage(self.folder).free
        free = self.parallel.all_gather_objects(free)[0]
        if free < needed:
            raise OSError(
                errno.ENOSPC, f"--save {self.folder} has {free / 2**30:.2f} GiB left, a checkpoint needs "
                f"{needed / 2**30:.2f} GiB: make room and resume",
            )  # fmt: skip

    def _complete(self, state: RunState, partial: Path, final: Path, shards: Digests) -> None:
        """Make a fully written checkpoint the latest one; each step leaves a folder that can be resumed from."""
        record = {"format": FORMAT, **dataclasses.asdict(state)}
        (partial / STATE).write_text(json.dumps(record, indent=1))
        write_history(partial, self.history)
        write_tail_state(partial, self.tail)
        write_speculation(partial, self.speculation)
        write_manifest(partial, digests(partial, known=shards))
        for path in partial.iterdir():
            flush_to_disk(path)
        shutil.rmtree(final, ignore_errors=True)  # left by a run that was resumed from an earlier checkpoint
        partial.rename(final)
        flush_to_disk(self.folder)
        tracker = self.folder / (TRACKER + ".tmp")
        tracker.write_text(f"{state.iteration}\n")
        tracker.rename(self.folder / TRACKER)
        for _, path in complete_checkpoints(self.folder)[: -self.retain]:
            shutil.rmtree(path)
        logger.info("saved checkpoint %s", final)
