"""Strategies, acceptance statistics, watchdog, guard, ledger and hidden-state buffer against small tables."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.unit.drafter_cases import CONFIG
from tlt.config import SpecConfig
from tlt.drafter.buffer import HiddenStateBuffer, num_bytes
from tlt.drafter.model import EagleHead, HeadShape, save_head
from tlt.rollout.vllm.engine_args import OWNED, parse_engine_args
from tlt.rollout.vllm.ledger import DraftLedger, Proposal, agreed_proposal
from tlt.rollout.vllm.speculation import SpecPlan, read_spec_plan
from tlt.spec.acceptance import AcceptanceStats
from tlt.spec.draft_kind import standing_rates
from tlt.spec.lossless import BY_REASON, REFUSED, refuse_lossy
from tlt.spec.policy import parse_policy
from tlt.spec.strategy import DecodeStep, FixedStrategy, parse_strategy
from tlt.spec.verification import REJECTED
from tlt.spec.watchdog import Watchdog
from tlt.types import AUX, LAST, OFF, HiddenStateSample, SpecStrategy


def test_strategies_are_parsed_and_printed():
    strategy = parse_strategy("eagle:4", "--spec-strategy")
    assert strategy == SpecStrategy(method="eagle", num_draft_tokens=4)
    assert str(strategy) == "eagle:4"
    assert parse_strategy("off", "--spec-strategy") == OFF
    assert str(OFF) == "off"


@pytest.mark.parametrize("text", ["eagle", "eagle:0", "eagle:33", "eagle:x", "medusa:3", "", "off:2"])
def test_a_bad_strategy_is_refused_by_name(text):
    with pytest.raises(ValueError, match="--spec-strategy must be `off` or `<method>:<draft tokens>`"):
        parse_strategy(text, "--spec-strategy")


def test_a_fixed_strategy_is_off_above_its_threshold():
    policy = FixedStrategy(parse_strategy("eagle:4", "x"), max_running_requests=8)
    assert [str(policy.choose(n)) for n in (1, 8, 9)] == ["eagle:4", "eagle:4", "off"]
    assert str(FixedStrategy(parse_strategy("eagle:4", "x")).choose(1000)) == "eagle:4"
    assert FixedStrategy(OFF).max_draft_tokens == 0


def test_a_schedule_chooses_by_batch_size():
    policy, strategies = parse_policy("schedule@1=eagle:6/5=suffix:3/17=off", "--spec-strategy")
    assert [str(policy.choose(n)) for n in (0, 1, 4, 5, 16, 17, 500)] == [
        "eagle:6", "eagle:6", "eagle:6", "suffix:3", "suffix:3", "off", "off",
    ]  # fmt: skip
    assert policy.max_draft_tokens == 6
    assert {strategy.method for strategy in strategies} == {"eagle", "suffix", "off"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule@2=eagle:6", "batch sizes must rise from 1"), ("schedule@1=eagle:6/1=off", "must rise from 1"),
        ("schedule@eagle:6", "a row must be"), ("schedule@1=eagle:6|off", "one strategy for each batch size"),
        ("beg-mab@1=medusa:2", "with a method of"), ("beg-mab@", "a row must be"),
    ],
)  # fmt: skip
def test_a_bad_policy_is_refused_by_name(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_policy(text, "--spec-strategy")
    assert str(caught.value).startswith("--spec-strategy")


@pytest.mark.parametrize("text", ["schedule@1=eagle:6/9=off", "beg-mab@1=suffix:2|suffix:4", "cost-model@suffix:2"])
def test_a_threshold_is_refused_where_nothing_would_ask_for_it(text):
    parse_policy(text, "--spec-strategy")
    with pytest.raises(ValueError, match=r"^--spec-max-running-requests must be left out with .*, got 8"):
        parse_policy(text, "--spec-strategy", max_running_requests=8)
    policy, _ = parse_policy("adaptive:4", "--spec-strategy", max_running_requests=8)
    assert policy.choose(9) == OFF


def played(policy, seconds: dict[str, float], *, num_running: int, steps: int) -> list[str]:
    """Choices of a policy where each strategy's step takes its time and gives a token for each request."""
    choices = []
    for _ in range(steps):
        strategy = policy.choose(num_running)
        choices.append(str(strategy))
        policy.observe(
            DecodeStep(strategy=strategy, num_running=num_running, draft_s=0.0, verify_s=seconds[str(strategy)])
        )
    return choices


def test_the_bandit_finds_the_best_arm_of_each_bucket_and_follows_it_when_it_changes():
    policy, _ = parse_policy("beg-mab@1=eagle:6|suffix:6/5=eagle:2", "--spec-strategy", seed=3)
    seconds = {"eagle:6": 0.02, "suffix:6": 0.01, "eagle:2": 0.05, "off": 0.03}
    small = played(policy, seconds, num_running=2, steps=300)
    large = played(policy, seconds, num_running=8, steps=300)
    assert set(small[:3]) == {"eagle:6", "suffix:6", "off"}  # each is tried
    assert small[50:].count("suffix:6") > 220
    assert large[50:].count("off") > 220
    assert {"eagle:6", "off"} & set(small[50:])  # and now and then again
    seconds["suffix:6"] = 0.1
    assert played(policy, seconds, num_running=2, steps=400)[-100:].count("eagle:6") > 80


def test_the_bandit_makes_the_same_choices_from_the_same_times():
    seconds = {"eagle:6": 0.02, "suffix:6": 0.021, "off": 0.03}
    runs = [
        played(parse_policy("beg-mab@1=eagle:6|suffix:6", "x", seed=5)[0], seconds, num_running=2, steps=200)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_acceptance_statistics_of_a_table():
    stats = AcceptanceStats()
    stats.count(3, 3, 2.7)
    stats.count(3, 1, 1.5)  # the second draft was rejected: two positions were decided
    stats.count(2, 0, 0.4)
    metrics = stats.metrics("d")
    assert metrics["d/acceptance_length"] == pytest.approx(1 + 4 / 3)
    assert metrics["d/acceptance_rate"] == pytest.approx(4 / 8)
    assert [metrics[f"d/acceptance_rate_{i}"] for i in (1, 2, 3)] == pytest.approx([2 / 3, 1 / 3, 1 / 2])
    assert metrics["d/acceptance_ceiling"] == pytest.approx((2.7 + 1.5 + 0.4) / (3 + 2 + 1))
    assert "d/stands_sampled" not in metrics
    assert AcceptanceStats().metrics("d") == {}
    assert AcceptanceStats().acceptance_length == 1
    both = AcceptanceStats()
    both.count(5, 4, 4.0)
    both.add(stats)
    assert both.drafted == [4, 4, 3, 1, 1]
    assert both.accepted == [3, 2, 2, 1, 0]


def test_the_watchdog_withdraws_a_drafter_that_is_much_worse_and_only_that():
    def rates(*pairs, collapse_frac=0.5) -> list[bool]:
        watchdog = Watchdog(collapse_frac=collapse_frac, window=100)
        found = []
        for rate in pairs:
            found.append(any([watchdog.count(10, round(10 * rate)) for _ in range(30)]))
            if found[-1]:
                watchdog.withdrawn()
            watchdog.drafter_changed()
        return found

    assert rates(0.8, 0.7, 0.2, 0.2, 0.6) == [False, False, True, True, False]
    assert rates(0.8, 0.4) == [False, False]
    assert rates(0.8, 0.0, collapse_frac=0.0) == [False, False]
    watchdog = Watchdog(collapse_frac=0.5, window=100)
    watchdog.count(50, 50)  # too few to be a baseline
    watchdog.drafter_changed()
    assert not any([watchdog.count(10, 0) for _ in range(50)])


def test_the_watchdog_notices_within_its_window():
    watchdog = Watchdog(collapse_frac=0.5, window=100)
    watchdog.count(200, 160)
    watchdog.drafter_changed()
    assert [watchdog.count(10, 0) for _ in range(12)] == [False] * 9 + [True, False, False]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_lossy_settings_are_refused_with_a_reason(name):
    with pytest.raises(ValueError, match=f"--rollout-engine-args must not set {name}"):
        refuse_lossy({"max_logprobs": 3, name: "other"}, "--rollout-engine-args")


def test_harmless_settings_pass():
    refuse_lossy({"max_logprobs": 3, "kv_cache_dtype": "auto", "load_format": "fastsafetensors"}, "x")


@pytest.mark.parametrize(
    "text",
    [
        "{}", '{"moe_backend": "triton", "disable_custom_all_reduce": true}', '{"compilation_config": {"mode": 0}}',
    ],
)  # fmt: skip
def test_arguments_that_vllm_has_pass(text):
    assert parse_engine_args(text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"max_logprob": 3}', "got 'max_logprob'; close to it: max_logprobs"),
        ('{"quantization": "fp8"}', "must not set quantization .* other weights than the policy's"),
        ('{"kv_cache_dtype": "fp8"}', "must not set kv_cache_dtype"),
        ('{"kv_cache_memory_bytes": 1}', "kv_cache_memory_bytes.*other flags decide"),
        ('{"compilation_config": 3}', "compilation_config must be an object"),
        ("[]", "must be a JSON object"),
    ],
)
def test_arguments_of_the_engine_that_would_not_do_are_named(text, message):
    with pytest.raises(ValueError, match=f"^--rollout-engine-args.*{message}"):
        parse_engine_args(text)


def test_refused_settings_are_spelt_as_vllm_spells_them():
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    assert {name for names in BY_REASON.values() for name in names} - known == {"bad_words"}
    assert known >= OWNED


@pytest.mark.parametrize(("own", "kept"), [([5, 6, 7], 2), ([5, 6], 2), ([5], 1), ([5, 9], None), ([9, 6, 7], None)])
def test_a_rank_keeps_its_probabilities_as_far_as_it_drafted_the_same(own, kept):
    shared = Proposal(drafter="eagle", request_name="a", token_ids=[5, 6], confidences=np.array([0.5, 0.25])).shared()
    mine = Proposal(
        drafter="eagle", request_name="a", token_ids=own, confidences=np.full(len(own), 0.1),
        draft_probs=torch.full((len(own), 4), 0.25),
    )  # fmt: skip
    found = agreed_proposal(shared, mine, request_name="a")
    assert (found.token_ids, found.confidences.tolist()) == ([5, 6], [0.5, 0.25])
    assert (None if found.draft_probs is None else len(found.draft_probs)) == kept


def test_the_ledger_counts_what_stood_and_gives_q_of_sampled_drafts_only():
    ledger = DraftLedger()
    q = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    ledger.proposals = {
        "a": Proposal(
            drafter="eagle", request_name="a", token_ids=[1, 3], is_sampled=True, draft_probs=q,
            draft_token_ids=torch.tensor([1, 3]),
        ),
        "b": Proposal(drafter="lookup", request_name="b", token_ids=[2]),
    }  # fmt: skip
    index, probs = ledger.draft_probs(["b", "c", "a"], [1, 0, 2], 4)
    assert index.tolist() == [1, 2]
    assert probs.tolist() == [[0, 0.5, 0, 0.5], [0, 0.25, 0, 0.75]]
    assert ledger.draft_probs(["b"], [1], 4) is None
    cut = ledger.draft_probs(["a"], [1], 4)
    assert cut[1].tolist() == [[0, 0.5, 0, 0.5]], "vLLM may verify fewer drafts than were proposed"

    rows = torch.full((3 + 1 + 2, 4), 0.25)
    rows[2] = torch.tensor([0.1, 0.2, 0.3, 0.4])  # a: its first draft is decided here, and its second below
    rows[3] = torch.tensor([0.0, 0.1, 0.0, 0.9])
    tokens = torch.tensor([[2, 0, REJECTED], [1, REJECTED, REJECTED], [1, 0, REJECTED]])
    ledger.verified(["b", "c", "a"], [1, 0, 2], tokens, rows)
    eagle, lookup = ledger.stats["eagle"], ledger.stats["lookup"]
    assert (lookup.drafted, lookup.accepted) == ([1], [1])
    assert (eagle.drafted, eagle.accepted) == ([1, 1], [1, 0])
    assert lookup.max_prob_sum == pytest.approx(0.25)
    assert ledger.requests["a"].num_accepted_tokens == 1
    assert "c" not in ledger.requests
    # rows of a: 3, 4 and 5; decided: 3 (accepted) and 4 (rejected)
    assert eagle.max_prob_sum == pytest.approx(0.9 + 0.25)
    assert eagle.standing_sums["sampled"] == pytest.approx(min(0.1, 0.5) + min(0.9, 0.5) + 0.25 + 0.25)
    ledger.forget(["a", "zzz"])
    assert set(ledger.proposals) == {"b"}


def test_drafts_are_compared_together_as_they_would_be_alone():
    generator = torch.Generator().manual_seed(0)
    count, names = 10, ["a", "b", "c"]
    policy, drafts = torch.rand(2, 3, count + 1, 6, generator=generator).softmax(-1)
    ledger, found = DraftLedger(), {}
    ledger.on_compared = lambda proposal, rates, num: found.update({proposal.request_name: (rates, num)})
    ledger.proposals = {
        name: Proposal(drafter="eagle", request_name=name, token_ids=[1] * count, draft_probs=own[:count])
        for name, own in zip(names, drafts, strict=True)
    }  # fmt: skip
    ledger.verified(names, [count] * 3, torch.ones(3, count + 1, dtype=torch.int64), policy.flatten(0, 1))
    assert sorted(found) == names
    for name, p, q in zip(names, policy, drafts, strict=True):
        rates, num = found[name]
        assert num == count
        alone = standing_rates(p[:count], q[:count])
        assert rates == pytest.approx({kind: float(each.sum()) for kind, each in alone.items()})


def sample(name: str, length: int) -> HiddenStateSample:
    return HiddenStateSample(
        request_id=name,
        token_ids=torch.zeros(length, dtype=torch.int32),
        num_prompt_tokens=1,
        last_hidden_states=torch.zeros(length - 1, 8),
        policy_version=0,
    )


def test_the_buffer_never_exceeds_its_bytes_and_drops_the_oldest():
    buffer = HiddenStateBuffer(3 * num_bytes(sample("x", 10)))
    for index in range(5):
        buffer.add(sample(str(index), 10))
        assert buffer.num_bytes <= buffer.max_bytes
    assert [one.request_id for one in buffer] == ["2", "3", "4"]
    assert (len(buffer), buffer.num_dropped) == (3, 2)
    buffer.add(sample("too long", 1000))
    assert len(buffer) == 0 or "too long" not in [one.request_id for one in buffer]
    assert not HiddenStateBuffer(0).is_open


def test_an_engine_keeps_the_hidden_states_that_its_heads_and_its_buffer_read(tmp_path):
    target = CONFIG | {"num_hidden_layers": 8}
    folders = {}
    for name, layers in (("last", ()), ("three", (1, 4, 7)), ("others", (2, 4, 7))):
        head = EagleHead(HeadShape.of_target(CONFIG), aux_layers=layers)
        save_head(head, tmp_path / name, target_config=target)
        folders[name] = str(tmp_path / name)

    def plan(*names: str, mib: int = 0) -> SpecPlan:
        config = SpecConfig(drafter=tuple(folders[name] for name in names), hidden_states_mib=mib)
        return read_spec_plan(config, target_config=target, dtype=torch.float32, tp_size=1)

    assert plan().kept_states() == {}
    assert plan(mib=1).kept_states() == plan("last").kept_states() == plan("last", mib=1).kept_states() == {LAST: 1}
    assert plan("three").kept_states() == plan("three", "three").kept_states() == {AUX: 3}
    assert plan("three", mib=1).kept_states() == plan("last", "three").kept_states() == {LAST: 1, AUX: 3}
    assert plan("last", "three").aux_layers == (1, 4, 7)
    assert plan("last").aux_layers == ()
    with pytest.raises(ValueError, match="--spec-drafter: heads that read three layers must read the same ones"):
        plan("three", "last", "others")
