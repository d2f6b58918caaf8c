"""Two ranks that train a head together make the steps of one rank that has all their pieces, and stop together."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from tests.unit.drafter_cases import PIECES, make_trainer


def _steps(rank: int, world_size: int, folder: Path) -> None:
    trainer = make_trainer(group=dist.group.WORLD)
    for _ in range(4):
        metrics = trainer.step(PIECES[rank::world_size])
    torch.save((trainer.state_dict(), metrics), folder / f"{rank}.pt")
    # Ranks whose passes are of different length, one of which is told to stop.
    trainer.config = trainer.config.__class__(starts_per_step=8, num_depths=2)
    own = PIECES[:1] if rank == 0 else PIECES
    trainer.train(own, progress=lambda: 0.5, should_stop=lambda: rank == 1 and trainer.num_steps >= 9)
    assert trainer.num_steps == 10


def test_two_ranks_take_the_steps_of_one_and_stop_together(tmp_path):
    run_ranks(_steps, 2, tmp_path)
    alone = make_trainer()
    for _ in range(4):
        metrics = alone.step(PIECES)
    for rank in (0, 1):
        state, found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name in ("loss", "kl", "hidden", "starts", "grad_norm"):
            assert found[name] == pytest.approx(metrics[name], rel=1e-4)
        for name, parameter in alone.head.named_parameters():
            torch.testing.assert_close(state["head"][name], parameter.detach(), rtol=1e-4, atol=1e-5)
