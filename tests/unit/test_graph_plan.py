"""Which CUDA graphs are captured, and what they cost: pure functions, no GPU."""

import pytest

from tlt.spec.graph_plan import (
    DrafterGraph,
    GraphMemory,
    GraphPlan,
    TargetGraph,
    capture_sizes,
    captured_sizes,
    plan_graphs,
)
from tlt.spec.policy import parse_policy
from tlt.spec.strategy import parse_strategy

PAPER = "beg-mab@1=eagle:15|eagle:7/5=eagle:7|eagle:3/17=eagle:3/33=eagle:1"


def arms(text: str):
    return parse_policy(text, "test")[0].arms


def test_captured_sizes_are_a_grid_that_ends_at_the_largest():
    assert captured_sizes(1) == [1]
    assert captured_sizes(3) == [1, 2, 3]
    assert captured_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert captured_sizes(300)[-5:] == [248, 256, 272, 288, 300]


def test_each_batch_has_the_graphs_of_what_may_be_chosen_there():
    plan = plan_graphs(arms("schedule@1=eagle:6/5=eagle2:2/9=off"), [1, 2, 4, 8, 16])
    assert plan.target == {
        TargetGraph(1, 6), TargetGraph(2, 6), TargetGraph(4, 6), TargetGraph(8, 2), TargetGraph(16, 0),
    }  # fmt: skip
    assert plan.drafter == {
        DrafterGraph("eagle", 1), DrafterGraph("eagle", 2), DrafterGraph("eagle", 4), DrafterGraph("eagle2", 8),
    }  # fmt: skip


def test_a_batch_that_is_padded_across_a_border_finds_its_graph():
    plan = plan_graphs(arms("schedule@1=eagle:6/7=off"), [4, 8])  # 5 and 6 draft, 7 and 8 do not
    assert plan.target == {TargetGraph(4, 6), TargetGraph(8, 6), TargetGraph(8, 0)}


def test_strategies_share_what_is_alike():
    plan = plan_graphs(arms("beg-mab@1=eagle:4|suffix:4|eagle:2"), [1])
    assert plan.target == {TargetGraph(1, 4), TargetGraph(1, 2), TargetGraph(1, 0)}
    assert plan.drafter == {DrafterGraph("eagle", 1)}


def test_memory_by_hand():
    plan = GraphPlan(
        target=frozenset({TargetGraph(2, 3), TargetGraph(4, 0)}), drafter=frozenset({DrafterGraph("e", 2)})
    )
    assert plan.num_bytes(GraphMemory(target=100, target_token=1, drafter=10, drafter_row=2)) == 212 + 10 + 4


def test_memory_of_buckets_is_near_that_of_one_strategy_where_all_of_four_cost_four_times():
    """Of the shape that arXiv 2511.16665 measured with four strategies: 7.81 GB one, 30.39 all, 10.69 bucketed."""
    memory = GraphMemory(target=240_000_000, target_token=100_000, drafter=12_000_000, drafter_row=30_000)
    batches = captured_sizes(128)

    def without_off(size: int):
        return [arm for arm in arms(PAPER)(size) if arm.num_draft_tokens]

    alone = {
        text: plan_graphs(lambda size, text=text: (parse_strategy(text, "test"),), batches).num_bytes(memory)
        for text in ("eagle:15", "eagle:7", "eagle:3", "eagle:1")
    }
    single, naive = alone["eagle:7"], sum(alone.values())
    bucketed = plan_graphs(without_off, batches).num_bytes(memory)
    assert single < bucketed <= 1.4 * single
    assert 3.5 * single < naive < 4.5 * single
    # `off` as an arm of each bucket is one graph more of each size, still far from all of four.
    with_off = plan_graphs(arms(PAPER), batches).num_bytes(memory)
    assert bucketed < with_off < 0.6 * naive


@pytest.mark.parametrize("text", ["off", "schedule@1=off"])
def test_without_speculation_the_choice_is_left_to_the_engine(text):
    assert capture_sizes(parse_policy(text, "test")[0], max_num_seqs=64) == []


def sizes_of(text: str, max_num_seqs: int = 64) -> list[int]:
    return capture_sizes(parse_policy(text, "test")[0], max_num_seqs=max_num_seqs)


def whole_drafts(sizes, longest: int) -> list[int]:
    """Rounded up as vLLM does."""
    width = longest + 1
    return sorted({-(-size // width) * width for size in sizes})


def test_capture_sizes_hold_every_step_of_even_drafts_and_every_batch_without_drafts():
    sizes = sizes_of("schedule@1=eagle:6/5=eagle:2/17=off")
    assert set(whole_drafts(captured_sizes(64), 6)) <= set(sizes)
    assert {7, 14, 28, 49} <= set(sizes), "1, 2 and 4 requests with 6 drafts, 8 and 16 with 2: 24 and 48 tokens"
    assert sizes[-1] == 70, "64 requests without drafts"
    assert len(sizes) < len(captured_sizes(64)) + 6


def test_uneven_drafts_get_a_grid_up_to_their_longest_step():
    for text in ("suffix:4", "adaptive:4", "cost-model@suffix:4"):
        assert sizes_of(text) == whole_drafts(captured_sizes(320), 4)
    assert sizes_of("schedule@1=suffix:7/9=off") == whole_drafts(captured_sizes(64), 7)
    assert max(sizes_of("adaptive:32")) <= 512
