"""A resumed run goes on with the drafter that its checkpoint holds: two processes, a real head's trainer, real files.

The engine is a dictionary of weights; that pretrain_rl.py is wired this way is in tests/e2e/test_rollout_tool.py.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from tests.distributed.test_spot_ranks import World
from tests.unit.drafter_cases import make_sample, make_target, make_trainer
from tlt.config import DrafterConfig, SpotConfig
from tlt.drafter.history import SuffixHistory
from tlt.drafter.learner import HeadLearner
from tlt.rollout.vllm.speculation import NoSpeculation
from tlt.run_state import TAIL, Checkpoints, RunState, latest_checkpoint, read_tail_state
from tlt.spot.board import TailBoard
from tlt.spot.training import NoSpotTraining, SpotTraining
from tlt.trace import NoTrace


class Meeting(World):
    def barrier(self) -> None:
        dist.barrier()


class Engine:
    """Part of the engine that is asked for."""

    policy_version = 0

    def __init__(self, live: dict, *, rank: int):
        self.live, self.drafter_version = live, 0
        self.samples = [make_sample(14, 3, seed=100 * rank + index) for index in range(12)]

    def hidden_state_samples(self) -> list:
        return self.samples

    def training_samples(self, *, seed: int) -> list:
        return self.samples

    def drafter_tensors(self) -> dict:
        return {name: tensor.clone() for name, tensor in self.live.items()}

    def load_drafter(self, tensors, *, drafter_version: int) -> None:
        self.live, self.drafter_version = dict(tensors), drafter_version


class Board(TailBoard):
    """A rollout that ends on all ranks when each has made its optimizer steps: no test waits for a clock."""

    def ended(self) -> None:
        """Told by `is_stopped` instead."""

    def remaining_s(self) -> None:
        """Not known."""

    def all_ended(self) -> bool:
        return False


def start(rank: int, world_size: int, steps: Sequence[int] = (15, 16)) -> SpotTraining:
    """As a run starts it, with the head of --spec-drafter; each rank makes its number of steps in a rollout."""
    target = make_target()
    learner = HeadLearner(
        make_trainer().head, DrafterConfig(starts_per_step=16, warmup_steps=0, num_depths=3), seed=rank,
        temperature=0.8, target=lambda: (target.embedding, target.output_weight),
    )  # fmt: skip
    spot: SpotTraining
    spot = SpotTraining(
        learner, Engine(learner.published(), rank=rank), Board(None, rank=rank, world_size=world_size),
        Meeting(rank, world_size), config=SpotConfig(held_out_every=3),
        is_stopped=lambda: spot.num_steps >= steps[rank], trace=NoTrace(),
    )  # fmt: skip
    return spot


def rollout(spot: SpotTraining) -> dict[str, float]:
    spot.begin()
    spot.use_tail()
    return spot.publish()


def checkpoints(spot, save: Path, world: Meeting) -> Checkpoints:
    return Checkpoints(
        save, trainer=SimpleNamespace(save=lambda folder: None, checkpoint_bytes=lambda: 0), parallel=world,
        history=SuffixHistory(0), tail=spot, speculation=NoSpeculation(), trace=NoTrace(), interval=1, retain=9,
        train_iters=9, resumed_iteration=0,
    )  # fmt: skip


def same(first: dict, second: dict) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def _resume(rank: int, world_size: int, save: Path) -> None:
    run = start(rank, world_size)
    beginning = run.engine.drafter_tensors()
    assert [rollout(run)["spot/published"] for _ in range(2)] == [1, 1]
    checkpoints(run, save, run.parallel).save(RunState(iteration=2))
    live, parameters = run.engine.drafter_tensors(), {n: p.detach() for n, p in run.learner.trainer.parameters.items()}
    assert not same(live, beginning)

    resumed = start(rank, world_size)
    assert same(resumed.engine.drafter_tensors(), beginning)
    state = read_tail_state(latest_checkpoint(save))
    resumed.load_state_dict(state)
    assert resumed.engine.drafter_version == run.engine.drafter_version == 2
    assert same(resumed.engine.drafter_tensors(), live)
    assert resumed.gains.state_dict() == run.gains.state_dict()
    assert len(resumed.gains.sessions) == 2
    assert resumed.meeting_s == run.parallel.all_gather_objects(run.meeting_s)[0] > 0
    trainer = resumed.learner.trainer
    assert same({name: parameter.detach() for name, parameter in trainer.parameters.items()}, parameters)
    assert same(trainer.average, run.learner.trainer.average)
    assert trainer.seed == rank, "ranks that draw alike would train on the same order"
    # Those of all ranks, saved by one: loaded, used and then changed.
    moments = resumed.parallel.all_gather_objects(trainer.optimizer.state_dict()["state"][0]["exp_avg"])
    assert all(torch.equal(moments[0], each) for each in moments)
    assert moments[0].abs().max() > 0
    metrics = rollout(resumed)
    assert metrics["spot/published"] == 1
    assert resumed.engine.drafter_version == 3
    everyone = resumed.parallel.all_gather_objects(resumed.engine.drafter_tensors())
    assert same(everyone[0], everyone[1])


def test_a_resumed_run_goes_on_with_the_saved_head(tmp_path):
    run_ranks(_resume, 2, tmp_path / "run")


def _one_trained(rank: int, world_size: int, save: Path) -> None:
    """Rank 0, whose state is saved, had no tail; in the next rollout both have one."""
    steps = [0, 16]
    run = start(rank, world_size, steps)
    assert rollout(run)["spot/steps"] == 16
    checkpoints(run, save, run.parallel).save(RunState(iteration=1))
    resumed = start(rank, world_size, steps)
    resumed.load_state_dict(read_tail_state(latest_checkpoint(save)))
    steps[:] = [5, 6]
    expected, found = rollout(run), rollout(resumed)
    assert found["spot/steps"] == expected["spot/steps"] == 11
    first, second = run.learner.trainer, resumed.learner.trainer
    assert first.num_steps == second.num_steps == 22
    for own, other in zip(
        (*first.parameters.values(), *first.memory), (*second.parameters.values(), *second.memory), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)  # micro-steps of other sizes


def test_what_one_rank_learned_is_gone_on_with_on_all(tmp_path):
    run_ranks(_one_trained, 2, tmp_path / "run")


def _failed(rank: int, world_size: int, save: Path) -> None:
    run = start(rank, world_size)
    rollout(run)
    run.has_failed = rank == 0
    with torch.no_grad():
        next(iter(run.learner.trainer.parameters.values())).fill_(float("nan"))
    checkpoints(run, save, run.parallel).save(RunState(iteration=1))
    resumed = start(rank, world_size)
    resumed.load_state_dict(read_tail_state(latest_checkpoint(save)))
    live = run.engine.drafter_tensors()
    assert resumed.engine.drafter_version == 1
    assert same(resumed.engine.drafter_tensors(), live)
    assert same(resumed.learner.published(), live), "what failed is not gone on with"
    assert same({n: p.detach() for n, p in resumed.learner.trainer.parameters.items()}, live)


def test_a_trainer_that_failed_is_not_saved(tmp_path):
    run_ranks(_failed, 2, tmp_path / "run")


def _older(rank: int, world_size: int, save: Path) -> None:
    run, resumed = start(rank, world_size), start(rank, world_size)
    rollout(run)
    state = run.state_dict()
    resumed.load_state_dict({name: state[name] for name in ("live", "version", "learner")})
    assert same(resumed.engine.drafter_tensors(), run.engine.drafter_tensors())
    assert resumed.gains.state_dict() == start(rank, world_size).gains.state_dict(), "gains are measured anew"
    assert rollout(resumed)["spot/steps"] == 31


def test_a_checkpoint_without_gains_is_gone_on_from(tmp_path):
    run_ranks(_older, 2, tmp_path / "run")


def _without(rank: int, world_size: int, save: Path) -> None:
    """Off: nothing is written; a checkpoint without a head leaves that of --spec-drafter."""
    world = Meeting(rank, world_size)
    checkpoints(NoSpotTraining(), save, world).save(RunState(iteration=1))
    checkpoint = latest_checkpoint(save)
    assert not (checkpoint / TAIL).exists()
    spot = start(rank, world_size)
    before = spot.engine.drafter_tensors()
    spot.load_state_dict(read_tail_state(checkpoint))
    assert same(spot.engine.drafter_tensors(), before)
    assert spot.engine.drafter_version == 0


def test_a_run_without_drafter_training_saves_and_loads_none(tmp_path):
    run_ranks(_without, 1, tmp_path / "run")
