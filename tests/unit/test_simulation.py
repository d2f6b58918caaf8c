"""The simulator against times worked out by hand, and what must hold of any simulated rollout."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlt.drafter.history import SuffixHistory
from tlt.rollout.consolidation import LOOK_STEPS
from tlt.rollout.outlook import Outlook
from tlt.simulation.drafter_quality import DrafterQuality
from tlt.simulation.lengths import Lengths, named_lengths, normal_share
from tlt.simulation.moves import KnownLengths, Moves, NoMoves
from tlt.simulation.paper import tlt_table
from tlt.simulation.replica import Replica, Request
from tlt.simulation.rollout import NoTraining, TailTraining, roll_out
from tlt.simulation.roofline import Efficiency, roofline
from tlt.simulation.run import Setting, Workload, simulate
from tlt.simulation.step_table import Engine, StepTable, interpolated, step_table, table_sizes
from tlt.spec.step_model import DrafterModel, Line, StepModel
from tlt.spot.opportunity import SwitchCost

NO_READING = Line(0.0, 0.0)


def plain(max_running: int, *, base_s: float = 0.010, each_s: float = 0.001, context_s: float = 0.0) -> StepTable:
    line = Line(base_s, each_s)
    seconds = [0.0, *(line.seconds(size) for size in range(1, max_running + 1))]
    return StepTable(tokens=[1.0] * (max_running + 1), seconds=seconds, context_s=context_s, read=line)


def requests(*lengths: int, prompt: int = 0, first: int = 0) -> list[Request]:
    return [
        Request(name=f"p{first + index}#0", num_prompt_tokens=prompt, length=length, num_unread=prompt)
        for index, length in enumerate(lengths)
    ]


def run(table: StepTable, *lengths, moves=None, training=None):
    own, first = [], 0
    for row in lengths:
        own.append(requests(*row, first=first))
        first += len(row)
    if moves == "known":
        moves = Moves(KnownLengths({request.name: request.length for row in own for request in row}))
    return roll_out(table, own, moves=moves or NoMoves(), training=training or NoTraining())


def test_equal_lengths_take_the_steps_of_one_batch():
    found = run(plain(4), [100] * 4)
    assert found.duration_s == pytest.approx(100 * 0.014)
    assert (found.num_tokens, found.num_requests, found.tail_s, found.idle_frac) == (400, 4, 0.0, 0.0)


def test_a_batch_shrinks_and_a_tail_idles():
    found = run(plain(2), [10, 30], [50])
    assert found.ends_s == pytest.approx((10 * 0.012 + 20 * 0.011, 50 * 0.011))
    assert found.tail_s == pytest.approx(0.55 - 0.34)
    assert found.idle_frac == pytest.approx(0.21 / 2 / 0.55)
    assert found.peak_context == 50


def test_steps_give_whole_tokens_at_last_and_contexts_grow():
    three = replace(plain(1), tokens=[1.0, 3.0])
    assert run(three, [10]).duration_s == pytest.approx(4 * 0.011)  # 9 tokens are not enough
    assert run(three, [9]).duration_s == pytest.approx(3 * 0.011)
    growing = plain(2, context_s=0.002)  # contexts of step j: 2 requests of prompt 5 and j tokens each
    found = roll_out(growing, [requests(4, 4, prompt=5)], moves=NoMoves(), training=NoTraining())
    read_s = 0.010 + 10 * 0.001
    assert found.duration_s == pytest.approx(read_s + 4 * 0.012 + 0.002 * sum(2 * (5 + j) for j in range(4)))


def test_requests_wait_for_room():
    found = run(plain(1), [10, 20])
    assert found.duration_s == pytest.approx(30 * 0.011)
    assert run(plain(2), [10, 20, 10]).duration_s == pytest.approx(10 * 0.012 + 10 * 0.012)


def test_steps_until_a_time_include_the_one_that_runs():
    replica = Replica(0, plain(1, context_s=0.001), requests(100))
    for steps in (1, 7, 50):
        seconds = replica.stretch_s(steps)
        assert replica.steps_until(seconds) == steps
        assert replica.steps_until(seconds + 1e-4) == steps + 1
    assert (replica.steps_until(-1.0), replica.steps_until(1e9)) == (0, 100)


def test_a_crowded_replica_gives_to_an_idle_one():
    steep = plain(4, base_s=0.001, each_s=0.010)  # a step of two takes nearly twice as long as one of one
    alone = run(steep, [200, 200], [8])
    shared = run(steep, [200, 200], [8], moves="known")
    assert alone.duration_s == pytest.approx(200 * 0.021)
    assert shared.num_moved == 1
    # The idle one asks after 8 steps of its own, 88 ms; the other looks after its eighth step, 168 ms.
    assert LOOK_STEPS == 8
    read_s = 0.001 + 8 * 0.010
    assert shared.duration_s == pytest.approx(8 * 0.021 + read_s + 192 * 0.011)
    assert (shared.num_tokens, shared.num_requests) == (408, 3)
    flat = plain(4, base_s=0.010, each_s=0.0001)
    assert run(flat, [200, 200], [8], moves="known").num_moved == 0


def test_long_contexts_make_a_crowded_replica_slow_enough_to_give():
    for prompt, num_moved in ((0, 0), (1000, 1)):  # a step of two takes 10.2 ms, and 200 ms more with long prompts
        table = plain(4, base_s=0.010, each_s=0.0001, context_s=1e-4)
        own = [requests(200, 200, prompt=prompt), requests(8, prompt=prompt, first=2)]
        known = Moves(KnownLengths({request.name: request.length for row in own for request in row}))
        assert roll_out(table, own, moves=known, training=NoTraining()).num_moved == num_moved


ROWS = st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=6), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.floats(0.0, 0.02), st.floats(0.0001, 0.02), st.floats(1.0, 4.0))
def test_all_tokens_are_decoded_and_moves_with_true_lengths_never_lose(lengths, base_s, each_s, tokens):
    table = replace(plain(8, base_s=base_s, each_s=each_s), tokens=[tokens] * 9)
    alone, shared = run(table, *lengths), run(table, *lengths, moves="known")
    for found in (alone, shared):
        assert found.num_tokens == sum(map(sum, lengths))
        assert found.num_requests == sum(map(len, lengths))
        assert max(found.ends_s) == found.duration_s
        assert 0 <= found.idle_frac < 1
    # A step more than expected, where tokens do not divide lengths: at most one at each of its changes of hands.
    assert shared.duration_s <= alone.duration_s + (1 + shared.num_moved) * table.seconds[8]
    if tokens == 1.0:
        assert shared.duration_s <= alone.duration_s + 1e-9


@settings(max_examples=30, deadline=None)
@given(ROWS)
def test_whole_steps_make_moves_with_true_lengths_exact(lengths):
    table = plain(8, base_s=0.001, each_s=0.008)
    assert run(table, *lengths, moves="known").duration_s <= run(table, *lengths).duration_s + 1e-9


def outlook(*past: int) -> Outlook:
    history = SuffixHistory(2**20)
    for index, length in enumerate(past):
        history.add(str(index), np.zeros(length, dtype=np.int32), policy_version=0)
    found = Outlook(history, tell=lambda seconds: None)
    found.begin([], max_response_tokens=1000)
    found.scales = {f"p{index}": 1.0 for index in range(10)}
    return found


def test_idle_replicas_train_where_the_rest_is_worth_the_switch():
    for switch_s, trains in ((0.5, True), (1.2, False)):
        switch = SwitchCost()
        switch.observe(switch_s)
        training = TailTraining(outlook(100), switch)
        # The other one has 20 tokens when the first is done, and 100 were usual: 80 more are 0.88 s.
        found = run(plain(1), [20], [150], training=training)
        if trains:
            assert found.train_s == pytest.approx((130 * 0.011 - 0.5, 0.0))
            assert found.used_frac == pytest.approx(1 - 0.5 / 1.43)
        else:
            assert found.train_s == (0.0, 0.0)


MODEL = StepModel(
    steps=Line(0.010, 0.001),
    drafters={
        "eagle": DrafterModel(covers=(1.0,), stands=(0.8, 0.7), passes=Line(0.001, 0.0)),
        "suffix": DrafterModel(covers=(0.5,), stands=(0.9,), passes=Line(0.0, 0.0)),
    },
    noise=np.ones(1),
)  # fmt: skip


def engine(model: StepModel = MODEL, max_running: int = 40, context_s: float = 0.0) -> Engine:
    return Engine(
        model=model, context_s=context_s, max_running=max_running, contexts=lambda running: 100.0,
        lengths=lambda rng, count: rng.integers(20, 60, count),
    )  # fmt: skip


def test_tables_are_what_the_policies_choose():
    off, static = (step_table(engine(), name, "--s") for name in ("off", "eagle:2"))
    assert off.tokens == [1.0] * 41
    assert off.seconds[1:4] == pytest.approx([0.011, 0.012, 0.013])
    assert static.tokens[5] == pytest.approx(1 + 0.8 + 0.56)
    assert static.seconds[30] == pytest.approx(0.010 + 90 * 0.001 + 2 * 0.001)
    limited = step_table(engine(), "eagle:2", "--s", max_running_requests=7)
    schedule = step_table(engine(), "schedule@1=eagle:2/8=off", "--s")
    for found in (limited, schedule):
        assert found.tokens[7] == static.tokens[7]
        assert found.tokens[8:] == off.tokens[8:]
        assert found.seconds[8:] == pytest.approx(off.seconds[8:])
    aged = step_table(engine(), "eagle:2", "--s", share=0.5)
    assert aged.tokens[5] == pytest.approx(1 + 0.4 + 0.4 * 0.35)
    with pytest.raises(ValueError, match="--s must draft with"):
        step_table(engine(), "eagle2:2", "--s")


def rates(table: StepTable) -> np.ndarray:
    return np.arange(1, 41) * np.array(table.tokens[1:]) / np.array(table.seconds[1:])


@pytest.mark.parametrize("strategy", ["adaptive:4", "cost-model@eagle:1|eagle:2|suffix:4"])
def test_policies_that_weigh_costs_find_what_pays(strategy):
    found = rates(step_table(engine(), strategy, "--s"))
    off = rates(step_table(engine(), "off", "--s"))
    static = rates(step_table(engine(), "eagle:2", "--s"))
    assert (found > 0.97 * np.maximum(off, static)).all()
    assert found[0] > 1.5 * off[0]
    hopeless = replace(MODEL, drafters={"eagle": replace(MODEL.drafters["eagle"], stands=(0.02,), covers=(1.0,))})
    if strategy.startswith("adaptive"):
        assert step_table(engine(hopeless), strategy, "--s").tokens == [1.0] * 41


def test_adaptive_prices_attention_into_its_steps():
    costly = step_table(engine(context_s=1e-4), "adaptive:4", "--s")
    assert costly.tokens[20] > step_table(engine(), "adaptive:4", "--s").tokens[20]


def test_batch_sizes_between_those_worked_out():
    sizes = table_sizes(100)
    assert sizes[:9] == list(range(1, 10))
    assert sizes[-1] == 100
    assert interpolated({1: 1.0, 3: 2.0}, {1: "a", 3: "a"}) == [1.0, 1.5, 2.0]
    assert interpolated({1: 1.0, 3: 2.0}, {1: "a", 3: "b"}) == [1.0, 1.0, 2.0]


def test_a_gpu_reads_weights_until_arithmetic_takes_longer():
    exact = Efficiency(memory=1.0, arithmetic=1.0, host_s=0.0, all_reduce_s=0.0, pass_s=0.0)
    times = roofline("H100", "7B", tp_size=1, efficiency=exact)
    assert times.seconds(1) == pytest.approx(2 * 7.62e9 / 3.35e12)
    ridge = 989e12 / 3.35e12
    assert times.seconds(ridge) == pytest.approx(times.seconds(1))
    assert times.seconds(2 * ridge) == pytest.approx(2 * times.seconds(1))
    assert times.context_s == pytest.approx(2 * 28 * 4 * 128 * 2 / 3.35e12)
    assert roofline("H100", "7B", tp_size=2, efficiency=exact).seconds(1) == pytest.approx(times.seconds(1) / 2)
    assert roofline("H200", "7B", tp_size=1, efficiency=exact).seconds(1) < times.seconds(1)
    assert 1 / roofline("H100", "7B", tp_size=1).seconds(1) == pytest.approx(164.65, rel=0.02)  # TLT's table 2
    assert 1 / roofline("A100", "7B", tp_size=1).seconds(1) == pytest.approx(92.83, rel=0.15)
    assert times.update_s(1e6, num_gpus=8) == pytest.approx(10 * 7.62e9 * 1e6 / (8 * 989e12 * 0.35))


def test_tlts_table_is_off_above_its_threshold():
    found = tlt_table(plain(64), "32B")
    assert (found.tokens[1], found.tokens[32], found.tokens[33]) == (3.62, 2.48, 1.0)
    assert tlt_table(plain(4), "7B").tokens[1] == pytest.approx(2.61)


def test_distributions_have_the_lengths_they_are_named_by(tmp_path):
    assert set(named_lengths("constant:7", "--l").quantiles) == {7}
    lognormal = named_lengths("lognormal:100:1", "--l").quantiles
    assert np.median(lognormal) == pytest.approx(100, abs=1)
    assert np.percentile(lognormal, 84.13) == pytest.approx(100 * np.e, rel=0.01)
    pareto = named_lengths("pareto:10:2", "--l").quantiles
    assert (pareto.min(), np.percentile(pareto, 99)) == (10, pytest.approx(100, rel=0.02))
    file = tmp_path / "lengths.json"
    file.write_text('{"source": "x", "output_tokens": {"10": 3, "50": 1}}')
    assert np.mean(named_lengths(str(file), "--l").quantiles == 10) == pytest.approx(0.75, abs=0.001)
    file.write_text("[4, 4, 9]")
    assert set(named_lengths(str(file), "--l").quantiles) == {4, 9}
    for text in ("lognormal:1", "pareto:a:b", "constant:-1"):
        with pytest.raises(ValueError, match="--l must be constant"):
            named_lengths(text, "--l")
    for content in ('"x"', "[0]", "[]", '{"a": 1}'):
        file.write_text(content)
        with pytest.raises(ValueError, match="--l .* (holds no lengths|must hold lengths)"):
            named_lengths(str(file), "--l")
    with pytest.raises(ValueError, match="--l must be a distribution"):
        named_lengths(str(tmp_path / "none"), "--l")
    with pytest.raises(ValueError, match="has no logged responses"):
        named_lengths(str(tmp_path), "--l")


def test_a_groups_lengths_resemble_each_other_as_asked():
    rng = np.random.default_rng(0)
    for icc in (0.0, 0.6):
        lengths = named_lengths("lognormal:1000:0.5", "--l", icc=icc)
        drawn = lengths.draw(rng, lengths.effects(rng, 4000), group_size=2, longest=10**9)
        assert np.corrcoef(np.log(drawn).T)[0, 1] == pytest.approx(icc, abs=0.05)
        assert np.median(drawn) == pytest.approx(1000, rel=0.05)
    assert drawn.shape == (4000, 2)
    assert lengths.draw(rng, lengths.effects(rng, 50), group_size=2, longest=900).max() == 900
    assert normal_share(np.array([0.0, 1.0])) == pytest.approx([0.5, 0.8413], abs=1e-4)


def workload(**changes) -> Workload:
    lengths = named_lengths("lognormal:100:1.2", "--l", icc=0.5)
    return replace(
        Workload(num_groups=12, group_size=4, lengths=lengths, longest=2000, num_prompt_tokens=10), **changes
    )  # fmt: skip


def test_a_run_is_a_function_of_its_seed_and_settings_see_the_same_lengths():
    setting = Setting(workload=workload(), num_replicas=4, strategy="off")
    off, twice = (step_table(engine(), "off", "--s"), replace(step_table(engine(), "off", "--s"), tokens=[2.0] * 41))
    first, again, fast = (
        simulate(setting, lambda share, table=table: table, iterations=3, seed=5) for table in (off, off, twice)
    )
    assert first == again
    assert [one.rollout.num_tokens for one in first] == [one.rollout.num_tokens for one in fast]
    assert all(a.rollout.duration_s > 1.8 * b.rollout.duration_s for a, b in zip(first, fast, strict=True))
    other = simulate(setting, lambda share: off, iterations=3, seed=6)
    assert [one.rollout.num_tokens for one in other] != [one.rollout.num_tokens for one in first]


def test_known_prompts_are_placed_better():
    lengths = Lengths(name="", quantiles=named_lengths("lognormal:100:1.5", "--l").quantiles, icc=1.0)
    steep = plain(40, base_s=0.001, each_s=0.01)

    def total_s(**changes) -> float:
        setting = Setting(workload=workload(lengths=lengths, **changes), num_replicas=4, strategy="off")
        return sum(one.rollout.duration_s for one in simulate(setting, lambda share: steep, iterations=8, seed=1))

    assert total_s(are_prompts_known=True) < total_s(are_prompts_known=False)


def test_training_keeps_a_head_that_ages():
    setting = Setting(workload=workload(), num_replicas=4, strategy="eagle:2")
    tables = {}

    def table(share: float) -> StepTable:
        return tables.setdefault(share, step_table(engine(), "eagle:2", "--s", share=share))

    def shares(**changes) -> list[float]:
        quality = DrafterQuality(stands=(0.8, 0.7), loss=0.1, recovery_rank_s=0.5)
        return [
            one.share for one in simulate(replace(setting, **changes), table, iterations=6, seed=2, quality=quality)
        ]  # fmt: skip

    frozen, trained = shares(), shares(training=True)
    assert frozen == pytest.approx([0.9**number for number in range(6)])
    assert trained[-1] > 0.9 > 0.6 > frozen[-1]


def test_a_head_that_is_good_enough_is_trained_seldom():
    quality = DrafterQuality(stands=(0.8,), loss=0.0, recovery_rank_s=1.0)
    due = []
    for _ in range(16):
        due.append(quality.is_due)
        if quality.is_due:
            quality.trained(1.0, meeting_frac=0.01)
        quality.policy_updated()
    assert due[:4] == [True, True, True, False]
    assert sum(due) == 4
