"""Idle ranks on real processes: failures, slow ranks, all ending at once, drained at once, nothing idle.

The learner is a number that grows, so that what ranks make of each other's work is seen exactly. Not covered: GPUs.
"""

import logging
import time
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from tests.unit.drafter_cases import make_sample
from tlt.config import SpotConfig
from tlt.spot.board import TailBoard
from tlt.spot.judgement import Judgement
from tlt.spot.training import SpotTraining
from tlt.trace import NoTrace

STEP_S = 0.02


class World:
    """Part of `Parallel` that is asked for."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    def sum_in_place(self, values: torch.Tensor) -> None:
        dist.all_reduce(values)

    def all_gather_objects(self, value):
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


class TimedBoard(TailBoard):
    """Remembers when it was written to."""

    written_s = 0.0

    def ended(self) -> None:
        super().ended()
        self.written_s = time.time()


class Counting:
    """Each step adds `by` to its weight."""

    def __init__(self, step_s: float, *, fails_at: int | None = None, by: float = 1.0):
        self.by = by
        self.value = torch.zeros(1)
        self.step_s = step_s
        self.fails_at = fails_at
        self.num_steps = 0
        self.num_judging = self.num_slower = 0
        self.begins_s: list[float] = []

    def train(self, samples, *, should_stop, on_step) -> None:
        while not should_stop():
            self.begins_s.append(time.time())
            time.sleep(self.step_s)
            self.num_steps += 1
            if self.num_steps == self.fails_at:
                self.value.fill_(float("nan"))
                raise ArithmeticError("a step went wrong")
            self.value += self.by
            on_step()

    def average(self, sum_in_place, gather, *, weight: float) -> None:
        self.value = self.value * weight if weight > 0 else torch.zeros(1)
        sum_in_place(self.value)

    def score(self, pieces, tensors, *, should_stop=None) -> torch.Tensor:
        self.num_judging += len(pieces)
        return torch.tensor([float(tensors["value"]) * piece.num_starts for piece in pieces], dtype=torch.float64)

    def published(self) -> dict:
        return {"value": self.value.clone()}

    def begin_from(self, tensors) -> None:
        self.value = tensors["value"].clone()

    def slow_down(self) -> bool:
        self.num_slower += 1
        return self.num_slower == 1


class Drafting:
    """Part of the engine that is asked for."""

    policy_version = 3

    def __init__(self) -> None:
        self.drafter_version = 0
        self.live = {"value": torch.zeros(1)}
        self.samples = [make_sample(9, 3, seed=seed) for seed in range(8)]

    def hidden_state_samples(self) -> list:
        return self.samples

    def training_samples(self, *, seed: int) -> list:
        return self.samples

    def drafter_tensors(self) -> dict:
        return self.live

    def load_drafter(self, tensors, *, drafter_version: int) -> None:
        self.live, self.drafter_version = tensors, drafter_version


def _rollouts(rank: int, world_size: int, case: str, folder: Path) -> None:
    """Three rollouts, whose ends `case` says; what each rank saw is compared by the ranks themselves."""
    log = folder / f"{case} {rank}"
    logging.basicConfig(filename=log, force=True)
    slow = case == "slow" and rank == 0
    learner = Counting(
        10 * STEP_S if slow else STEP_S, fails_at=2 if case == "fails" and rank == 0 else None,
        by=-1.0 if case == "worse" else 1.0,
    )  # fmt: skip
    engine, world = Drafting(), World(rank, world_size)
    if case in ("nothing to train on", "withdrawn"):
        engine.samples = []
    stopped = {"now": False}
    store = dist.PrefixStore(case, dist.distributed_c10d._get_default_store())
    spot = SpotTraining(
        learner, engine, TimedBoard(store, rank=rank, world_size=world_size), world,
        config=SpotConfig(
            max_age=9, held_out_every=2, compare_first="on", judge_starts=12 if case == "idle" else 256
        ), is_stopped=lambda: stopped["now"], trace=NoTrace(),
    )  # fmt: skip
    for rollout in range(3):
        dist.barrier()
        spot.begin()
        decode_s = {
            "all at once": 0.1, "drained at once": 0.1 + 0.001 * (rank == world_size - 1),
        }.get(case, 0.05 + 0.35 * (rank == world_size - 1))  # fmt: skip
        time.sleep(decode_s)
        stopped["now"] = case == "told to stop" and rank == 1
        report = spot.use_tail()
        reports = world.all_gather_objects(report)
        # Once the last rank has written that it ended, no step begins but one that was decided on before.
        written_s = max(each for each in world.all_gather_objects(spot.board.written_s))
        assert sum(begin > written_s for begin in learner.begins_s) <= 1, (case, rollout)
        if case == "withdrawn" and rollout == 1:
            spot.gains.published(Judgement(live=0.0, candidate=1.0, error=0.1, num_judges=4), policy_version=2)
            if rank == 2:  # its watchdog loads the head before this one
                engine.load_drafter({"value": torch.tensor([7.0])}, drafter_version=1)
        metrics = spot.publish()
        drafting = (float(engine.live["value"]), engine.drafter_version)
        everyone = world.all_gather_objects((metrics, float(learner.value), drafting))
        assert len({str(each) for each in everyone}) == 1, everyone
        steps = [each.num_steps for each in reports]
        if case in ("idle", "slow", "fails", "told to stop"):
            assert steps[world_size - 1] == 0, "the last rank has no tail"
            assert metrics["spot/published"] == 1
            assert engine.drafter_version == rollout + 1
            assert metrics["spot/first_score"] == 0 < metrics["spot/candidate_score"]
            has_judged = case != "idle" or rank < world_size - 1
            assert (learner.num_judging > 0) == has_judged, "the last rank is asked where others lack judges"
            assert metrics["spot/steps"] == (sum(steps) if case != "fails" else sum(steps[1:]))
        if case == "worse":
            assert metrics["spot/steps"] > 0 > metrics["spot/gain"]
            assert (metrics["spot/published"], engine.drafter_version) == (0, 0)
            assert float(learner.value) == 0, "begun again from the weights that draft"
            assert learner.num_slower == rollout + 1
            assert len(spot.gains.sessions) == rollout, "what was gained at the first rate is forgotten"
        if case in ("idle", "slow"):
            assert all(count >= 1 for count in steps[:-1]), steps
        if case == "fails":
            assert metrics["spot/failed_ranks"] == 1
            assert steps[0] == 0 or rollout == 0
        if case == "told to stop":
            assert steps[1] == 0
            stopped["now"] = False
        if case == "withdrawn":
            assert drafting == ((7.0, 1) if rollout else (0.0, 0))
            assert spot.gains.state_dict()["published"] is None, "its score is another head's"
        if case == "nothing to train on":
            assert metrics["spot/steps"] == 0 == engine.drafter_version
    assert ("a step went wrong" in log.read_text()) == (case == "fails" and rank == 0)


CASES = (
    "idle", "slow", "worse", "fails", "all at once", "drained at once", "told to stop", "nothing to train on",
    "withdrawn",
)  # fmt: skip


def _all_cases(rank: int, world_size: int, folder: Path) -> None:
    for case in CASES:
        _rollouts(rank, world_size, case, folder)


def test_ranks_come_back_in_time_and_agree(tmp_path):
    run_ranks(_all_cases, 4, tmp_path)
