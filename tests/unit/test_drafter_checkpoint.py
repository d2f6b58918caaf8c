"""Checkpoints of a drafter's training: in the background, whole or not at all, and what they hold resumes training."""

import threading

import pytest
import torch

from tests.unit.drafter_cases import PIECES, make_trainer
from tlt.drafter import checkpoint
from tlt.drafter.checkpoint import DrafterCheckpointer, load_checkpoint


@pytest.fixture
def slow_disk(monkeypatch):
    """Writes wait for the event that is returned."""
    may_write = threading.Event()
    write = checkpoint.write_atomically

    def waiting(state, path):
        assert may_write.wait(30)
        write(state, path)

    monkeypatch.setattr(checkpoint, "write_atomically", waiting)
    return may_write


def test_a_training_goes_on_from_its_checkpoint_as_if_uninterrupted(tmp_path):
    whole = make_trainer()
    for _ in range(6):
        whole.step(PIECES)
    first = make_trainer()
    for _ in range(3):
        first.step(PIECES)
    checkpointer = DrafterCheckpointer(tmp_path / "folder" / "drafter.pt")
    assert checkpointer.save(first.state_dict())
    checkpointer.close()
    second = make_trainer(seed=9)
    second.load_state_dict(load_checkpoint(tmp_path / "folder" / "drafter.pt"))
    for _ in range(3):
        second.step(PIECES)
    for a, b in zip(whole.head.parameters(), second.head.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["drafter.pt"]


def test_what_is_saved_is_what_was_when_save_was_called(tmp_path, slow_disk):
    trainer = make_trainer()
    trainer.step(PIECES)
    expected = {name: parameter.detach().clone() for name, parameter in trainer.head.named_parameters()}
    moments = trainer.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    checkpointer = DrafterCheckpointer(tmp_path / "drafter.pt")
    assert checkpointer.save(trainer.state_dict())
    trainer.step(PIECES)  # training goes on while the disk is slow
    assert not checkpointer.save(trainer.state_dict())
    assert checkpointer.num_skipped == 1
    assert not (tmp_path / "drafter.pt").exists()
    slow_disk.set()
    checkpointer.wait()
    found = load_checkpoint(tmp_path / "drafter.pt")
    assert all(torch.equal(found["head"][name], tensor) for name, tensor in expected.items())
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], moments)
    assert checkpointer.save(trainer.state_dict())
    checkpointer.close()
    assert load_checkpoint(tmp_path / "drafter.pt")["counters"][0] == 2


def test_a_state_holds_nothing_that_is_not_trained(tmp_path):
    trainer = make_trainer()
    trainer.step(PIECES)
    checkpointer = DrafterCheckpointer(tmp_path / "drafter.pt")
    checkpointer.save(trainer.state_dict())
    checkpointer.close()
    trained = sum(parameter.numel() for parameter in trainer.head.parameters()) * 4
    # Weights, their average and two moments; names and counters besides.
    assert 4 * trained < (tmp_path / "drafter.pt").stat().st_size < 4 * trained + 20_000


def test_a_failed_write_leaves_the_former_file_and_is_not_passed_over(tmp_path, monkeypatch):
    path = tmp_path / "drafter.pt"
    checkpointer = DrafterCheckpointer(path)
    checkpointer.save({"n": torch.ones(3)})
    checkpointer.wait()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    assert checkpointer.save({"n": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="was not written"):
        checkpointer.wait()
    assert torch.equal(load_checkpoint(path)["n"], torch.ones(3))
    monkeypatch.undo()
    assert checkpointer.save({"n": torch.zeros(3)})
    checkpointer.close()
    assert torch.equal(load_checkpoint(path)["n"], torch.zeros(3))
