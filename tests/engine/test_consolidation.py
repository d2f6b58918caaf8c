"""Responses that move between real engines, half done, are token for token those that stayed.

The protocol in every interleaving: tests/unit/test_consolidation.py. Not covered: GPUs.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks
from tests.engine.engines import generate, make_engine, make_prompts
from tests.engine.test_speculation import PEAKED, write_head
from tests.tiny_models import write_tiny_model
from tlt.config import SpecConfig
from tlt.drafter.history import SuffixHistory
from tlt.protocols import RolloutInterrupted
from tlt.rollout import consolidation
from tlt.rollout.collector import ReplicaReport, in_order
from tlt.rollout.consolidation import Consolidation, NoConsolidation
from tlt.rollout.handover import HandoverBoard
from tlt.rollout.outlook import Outlook
from tlt.rollout.resources import own_resources
from tlt.rollout.vllm.engine import VLLMRolloutEngine
from tlt.types import EngineStats, Rollout, RolloutGroup, SamplingConfig, TailReport

pytestmark = pytest.mark.engine

GREEDY = SamplingConfig(temperature=0.0, max_response_tokens=100)
RANDOM = SamplingConfig(temperature=1.0, max_response_tokens=100)


def check_same(moved: Rollout, stayed: Rollout) -> None:
    assert moved.token_ids == stayed.token_ids
    assert (moved.text, moved.finish_reason, moved.sample_index, moved.policy_version) == (
        stayed.text, stayed.finish_reason, stayed.sample_index, stayed.policy_version
    )  # fmt: skip
    for name in ("logprobs", "entropies", "max_probs"):  # fp32, in batches of other sizes
        torch.testing.assert_close(
            torch.tensor(getattr(moved, name)), torch.tensor(getattr(stayed, name)), rtol=1e-3, atol=1e-4
        )


class Bouncing(NoConsolidation):
    """Takes responses out of the engine and puts them back in, some steps later and in several pieces."""

    def __init__(self) -> None:
        self.out: dict[str, Rollout] = {}
        self.num_steps = self.num_moves = 0

    def after_step(self, requests, *, num_running, seconds, agree) -> None:
        self.num_steps += 1
        if self.out:
            if self.num_steps % 3 == 0:
                self._put_back(requests)
        elif self.num_steps % 4 == 0:
            lengths = requests.lengths()
            names = sorted(lengths)[self.num_steps // 4 % 2 :: 2]
            self.out = requests.parts(names)
            assert {name: len(rollout.token_ids) for name, rollout in self.out.items()} == {
                name: lengths[name] for name in names
            }
            requests.drop(names)
            self.num_moves += len(names)

    def adopts(self, requests, *, should_stop, agree) -> bool:
        has_more = bool(self.out)
        self._put_back(requests)
        return has_more

    def _put_back(self, requests) -> None:
        for name, begun in self.out.items():
            requests.add(name, begun)
        self.out = {}


def _taken_out_and_put_back(rank: int, world_size: int, folder: Path, head: Path, strategy: str) -> None:
    engine = make_engine(
        folder, spec=SpecConfig(strategy=strategy, drafter=(str(head),), hidden_states_mib=64), max_num_seqs=6
    )  # fmt: skip
    prompts = make_prompts(3)
    for sampling in (GREEDY, RANDOM):
        stayed = generate(engine, prompts, sampling)
        before = {sample.request_id: sample for sample in engine.hidden_state_samples()}
        num_samples = len(engine.hidden_state_samples())
        engine.consolidation = Bouncing()
        moved = generate(engine, prompts, sampling)
        assert engine.consolidation.num_moves > 6, "half of them at a time, again and again"
        engine.consolidation = NoConsolidation()
        rollouts = [rollout for group in moved for rollout in group.rollouts]
        for group, expected in zip(moved, stayed, strict=True):
            assert group.prompt == expected.prompt
            for rollout, other in zip(group.rollouts, expected.rollouts, strict=True):
                check_same(rollout, other)
        # Each verification is counted once, of the response that it was made for.
        stats = engine.speculation.ledger.stats.values()
        assert sum(rollout.num_drafts for rollout in rollouts) == sum(each.num_drafts for each in stats) > 0
        after = engine.hidden_state_samples()[num_samples:]
        assert len(after) == (6 if sampling is RANDOM else 0)
        for sample in after:
            assert torch.equal(sample.token_ids, before[sample.request_id].token_ids)
            torch.testing.assert_close(
                sample.last_hidden_states, before[sample.request_id].last_hidden_states, rtol=1e-3, atol=2e-3
            )
    engine.close()


@pytest.mark.parametrize("strategy", ["eagle:3", "suffix:4", "adaptive:3"])
def test_a_response_taken_out_half_done_goes_on_as_if_it_had_stayed(tmp_path, strategy):
    folder = write_tiny_model("llama", tmp_path, **PEAKED)
    run_ranks(_taken_out_and_put_back, 1, folder, write_head(tmp_path / "head", folder), strategy)


class Half(Consolidation):
    """Every idle replica gets every second response, whatever that costs."""

    def choose(self, lengths, requests) -> list[str]:
        super().choose(lengths, requests)  # the real decision, made in vain
        return sorted(lengths)[1::2]


def gathered(groups: list[RolloutGroup], engine: VLLMRolloutEngine) -> list[ReplicaReport]:
    """What the ranks would report, each response scored 0."""
    own = [
        RolloutGroup(prompt=group.prompt, rollouts=group.rollouts, rewards=(0.0,) * len(group.rollouts))
        for group in groups
    ]
    report = ReplicaReport(
        groups=own if engine.is_replica_leader else [], stats=EngineStats(), begin_s=0.0, end_s=1.0,
        tail=TailReport(), reward_stats={}, interrupted=False, resources=own_resources(history_bytes=0),
    )  # fmt: skip
    reports: list[ReplicaReport] = [report] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports


def _replicas_share(rank: int, world_size: int, folder: Path, tp_size: int) -> None:
    consolidation.LOOK_STEPS = 3
    stop = {"rank": -1, "questions": 0}

    def should_stop() -> bool:
        stop["questions"] -= 1
        return stop["rank"] == rank and stop["questions"] < 0

    engine = make_engine(
        folder, tensor_parallel_size=tp_size, should_stop=should_stop, spec=SpecConfig(strategy="suffix:3")
    )  # fmt: skip
    prompts = make_prompts(1)  # of which one replica has all and the others nothing
    expected = {
        sampling: in_order(prompts, gathered(generate(engine, prompts, sampling, group_size=8), engine), group_size=8)
        for sampling in (GREEDY, RANDOM)
    }
    board = HandoverBoard(
        dist.distributed_c10d._get_default_store(), replica=engine.replica, num_replicas=engine.num_replicas
    )
    history = SuffixHistory(2**20)
    engine.outlook = Outlook(history, lambda seconds: None)
    engine.consolidation = Half(board, engine.outlook, is_replica_leader=engine.is_replica_leader)
    for sampling in (GREEDY, RANDOM, RANDOM):
        own = generate(engine, prompts, sampling, group_size=8)
        reports = gathered(own, engine)
        (group,) = in_order(prompts, reports, group_size=8)
        for rollout, stayed in zip(group.rollouts, expected[sampling][0].rollouts, strict=True):
            check_same(rollout, stayed)
            history.add(prompts[0].problem_key, rollout.token_ids, policy_version=0)
        assert all(report.groups for report in reports[::tp_size]), "every replica ended some"
        assert {rollout.replica for rollout in group.rollouts} == set(range(engine.num_replicas))
        counts = [0] * world_size
        dist.all_gather_object(counts, engine.stats().num_adopted)
        assert sum(counts[::tp_size]) >= 4
    # Told to stop, the one that asks and the one that gives: no one waits for ever, and the next rollout is whole.
    for stopped in (0, world_size - tp_size):
        for questions in (0, 5, 20):
            stop.update(rank=stopped, questions=questions)
            try:
                generate(engine, prompts, RANDOM, group_size=8)
            except RolloutInterrupted:
                assert rank // tp_size == stopped // tp_size
            dist.barrier()
    stop.update(rank=-1)
    (group,) = in_order(prompts, gathered(generate(engine, prompts, RANDOM, group_size=8), engine), group_size=8)
    for rollout, stayed in zip(group.rollouts, expected[RANDOM][0].rollouts, strict=True):
        check_same(rollout, stayed)
    engine.close()


@pytest.mark.parametrize(("world_size", "tp_size"), [(2, 1), (4, 2)])
def test_replicas_that_share_responses_give_those_of_replicas_that_do_not(tmp_path, world_size, tp_size):
    run_ranks(_replicas_share, world_size, write_tiny_model("qwen2", tmp_path, **PEAKED), tp_size)
