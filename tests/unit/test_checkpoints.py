"""A damaged checkpoint is found and the one before it used; folders are put in order; a full disk is seen before."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tlt.drafter.history import SuffixHistory
from tlt.manifest import MANIFEST, damage, digests, write_manifest
from tlt.rollout.vllm.speculation import NoSpeculation
from tlt.run_state import STATE, Checkpoints, RunState, complete_checkpoints, latest_checkpoint, read_state
from tlt.spot.training import NoSpotTraining
from tlt.trace import NoTrace


class Alone:
    """Part of `Parallel` that is asked for, of one rank."""

    rank, world_size = 0, 1

    def barrier(self) -> None:
        pass

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def all_gather_objects(self, value):
        return [value]


class Trainer:
    """Writes two shards."""

    num_bytes = 1000

    def checkpoint_bytes(self) -> int:
        return self.num_bytes

    def save(self, folder: Path) -> None:
        for number in range(2):
            (folder / f"__{number}_0.distcp").write_bytes(bytes(range(250)) * 2)


def make_checkpoints(save: Path, *, retain: int = 9, resumed_iteration: int = 0) -> Checkpoints:
    return Checkpoints(
        save, trainer=Trainer(), parallel=Alone(), history=SuffixHistory(0), tail=NoSpotTraining(),
        speculation=NoSpeculation(), trace=NoTrace(), interval=1, retain=retain, train_iters=9,
        resumed_iteration=resumed_iteration,
    )  # fmt: skip


@pytest.fixture
def save(tmp_path) -> Path:
    """A run folder with checkpoints of iterations 1 to 3."""
    checkpoints = make_checkpoints(tmp_path / "run")
    for iteration in (1, 2, 3):
        checkpoints.save(RunState(iteration=iteration))
    checkpoints.claimed.close()
    return tmp_path / "run"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


SHARD = "__1_0.distcp"


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        (SHARD, truncate, "499 bytes instead of 500"),
        (SHARD, flip, "another content"),
        (SHARD, Path.unlink, "is missing"),
        (STATE, flip, "another content"),
        (STATE, Path.unlink, "is missing"),
        (MANIFEST, Path.unlink, "manifest.json is missing"),
        (MANIFEST, truncate, None),  # the closing line break: JSON all the same
        (MANIFEST, lambda path: path.write_text("{"), "not readable"),
        (MANIFEST, lambda path: path.write_text('{"a": 1}'), "not readable"),
        (MANIFEST, lambda path: path.write_bytes(b"\xff\x00"), "not readable"),
    ],
)
def test_damage_is_found_and_the_checkpoint_before_it_is_used(save, caplog, name, harm, reason):
    assert latest_checkpoint(save).name == "iter_0000003"
    harm(save / "iter_0000003" / name)
    with caplog.at_level(logging.ERROR):
        found = latest_checkpoint(save)
    if reason is None:
        assert found.name == "iter_0000003"
        return
    assert found.name == "iter_0000002"
    assert reason in caplog.text
    assert "iter_0000003 is damaged" in caplog.text
    # The run that goes on from it puts the damaged one aside, so that it is never counted as one to keep.
    make_checkpoints(save, resumed_iteration=2).claimed.close()
    assert [iteration for iteration, _ in complete_checkpoints(save)] == [1, 2]
    assert (save / "iter_0000003.damaged").is_dir()


def test_a_folder_of_damaged_checkpoints_is_not_started_afresh(save):
    for _, path in complete_checkpoints(save):
        truncate(path / SHARD)
    with pytest.raises(ValueError, match="--load .* all 3 checkpoints are damaged"):
        latest_checkpoint(save)


def test_each_bit_counts(tmp_path):
    (tmp_path / "file").write_bytes(bytes(64))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "empty").write_bytes(b"")
    write_manifest(tmp_path, digests(tmp_path))
    assert damage(tmp_path) is None
    for bit in range(8 * 64):
        content = bytearray(64)
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "file").write_bytes(bytes(content))
        assert damage(tmp_path) is not None, bit


def test_ranks_share_the_files(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}").write_text(str(number))
    shares = [digests(tmp_path, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(name for share in shares for name in share) == sorted(digests(tmp_path))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_newest_checkpoints_are_retained_and_unfinished_ones_deleted(tmp_path):
    checkpoints = make_checkpoints(tmp_path, retain=2)
    (tmp_path / "iter_0000009.tmp").mkdir()
    for iteration in range(1, 6):
        checkpoints.save(RunState(iteration=iteration))
    assert [iteration for iteration, _ in complete_checkpoints(tmp_path)] == [4, 5]
    checkpoints.claimed.close()
    make_checkpoints(tmp_path, resumed_iteration=5).claimed.close()
    assert not list(tmp_path.glob("*.tmp"))
    assert read_state(latest_checkpoint(tmp_path), {}).iteration == 5


def test_a_checkpoint_of_another_version_is_refused(save):
    path = save / "iter_0000003"
    record = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps(record | {"format": 1}))
    write_manifest(path, digests(path))
    with pytest.raises(ValueError, match="another version of this code"):
        read_state(latest_checkpoint(save), {})


def test_space_is_checked_before_a_save_and_made_where_old_checkpoints_are(save, monkeypatch):
    checkpoints = make_checkpoints(save, resumed_iteration=3)
    free = {3: 10 * 2**20, 2: 20 * 2**20, 1: 40 * 2**20}  # by number of checkpoints that are there

    def disk_usage(folder: Path):
        return SimpleNamespace(free=free[len(complete_checkpoints(folder))])

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    try:
        Trainer.num_bytes = 300 * 2**20
        with pytest.raises(OSError, match="--save .* has 0.04 GiB left, a checkpoint needs 0.31 GiB") as got:
            checkpoints.save(RunState(iteration=4))
        assert got.value.errno == 28
        assert [iteration for iteration, _ in complete_checkpoints(save)] == [3], "the newest stays"
        assert not list(save.glob("*.tmp"))
        monkeypatch.undo()
        Trainer.num_bytes = 1000
        checkpoints.save(RunState(iteration=4))
        assert latest_checkpoint(save).name == "iter_0000004"
    finally:
        Trainer.num_bytes = 1000
