"""The start-up profile on a real engine: prices are learned, nothing else is, and no text changes."""

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.engine.engines import make_engine, make_prompts
from tests.engine.test_speculation import PEAKED, write_head
from tests.tiny_models import write_tiny_model
from tlt.config import SpecConfig
from tlt.rollout.vllm.cost_profile import FILLER, asks_prices, batches, measure_costs, strategies
from tlt.spec.policy import parse_policy
from tlt.types import SamplingConfig


def test_sizes_reach_from_one_request_to_all():
    assert batches(64) == [1, 4, 16, 64]
    assert batches(6) == [1, 4, 6]
    assert batches(1) == [1]


def test_no_step_verifies_more_than_twice_the_requests_that_may_run():
    for batch in batches(64):
        tried = strategies(batch, max_num_seqs=64, max_draft_tokens=8, heads=["eagle"])
        lengths = [arm.num_draft_tokens for arm in tried if arm.method != "eagle"]
        assert max(batch * (1 + length) for length in lengths) <= 128
        assert [str(arm) for arm in tried if arm.method == "eagle"] == ["eagle:2"]
        assert lengths[0] == 0
    assert [arm.num_draft_tokens for arm in strategies(1, max_num_seqs=64, max_draft_tokens=2, heads=[])] == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "expected"), [("adaptive:4", True), ("cost-model@eagle:2", True), ("eagle:4", False), ("off", False)]
)
def test_only_strategies_that_weigh_prices_are_profiled_for(text, expected):
    assert asks_prices(parse_policy(text, "--spec-strategy")[0]) == expected


def _profile(rank: int, world_size: int, folder: Path, head: Path) -> None:
    config = SpecConfig(strategy="adaptive:4", drafter=(str(head),), hidden_states_mib=4)
    engine = make_engine(folder, spec=config)
    speculation = engine.speculation
    policy, watchdog, buffer = speculation.policy, speculation.watchdog, speculation.buffer
    before = json.dumps(speculation.router.state_dict())
    assert speculation.controller.costs.steps.seconds(4) == 0, "nothing is known of prices"

    measure_costs(engine, temperature=1.0, seed=3)
    assert json.dumps(speculation.router.state_dict() | {"step": 0}) == before
    assert (speculation.policy, speculation.watchdog, speculation.buffer) == (policy, watchdog, buffer)
    assert (watchdog.num_drafted, buffer.num_bytes) == (0, 0)
    assert FILLER not in speculation.drafting.drafters
    costs = speculation.controller.costs
    sizes = {size for size, _ in costs.steps.state_dict()["times"]}
    assert {1, 2, 4, 5, 8, 16} <= sizes, sizes
    assert {1, 4, 8} <= {rows for rows, _ in costs.passes["eagle"].state_dict()["times"]}
    prices = costs.prices(4, 8, max_draft_tokens=16)
    assert 0 < prices.step_s < 1
    assert 0 < prices.pass_s["eagle"] + prices.row_s["eagle"] < prices.step_s * 10

    def text() -> list:
        greedy = SamplingConfig(temperature=0.0, max_response_tokens=24)
        groups = engine.generate(make_prompts(3), greedy, group_size=1, seed=0, on_finished=lambda *_: None)
        return [group.rollouts[0].token_ids for group in groups]

    first = text()
    assert engine.stats().acceptance.keys() <= {"eagle", "suffix"}, "the filler's drafts are not counted"
    measure_costs(engine, temperature=1.0, seed=4)
    assert text() == first
    engine.close()


@pytest.mark.engine
def test_prices_are_known_before_the_first_rollout(tmp_path):
    folder = write_tiny_model("llama", tmp_path / "model", **PEAKED)
    run_ranks(_profile, 1, folder, write_head(tmp_path / "head", folder))
