"""Whatever text comes, what parses it gives a value that means the same when written again, or a ValueError that says
what was wrong; weights survive being cut and put together at any layout."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlt.arguments import build_parser, parse, to_flags
from tlt.faults import KINDS, POINTS, parse_faults
from tlt.spec.policy import parse_policy
from tlt.spec.strategy import METHODS, parse_strategy
from tlt.weight_sync.names import layout_of, query_groups, shard, unshard, weight_table

REQUIRED = ["--hf-model", "m", "--save", "s", "--data-train", "a"]
FLAGS = sorted(
    option
    for action in build_parser("")._actions
    for option in action.option_strings
    if option not in ("-h", "--help")
)
VALUES = st.sampled_from(
    ["", "0", "1", "-1", "1e9", "nan", "inf", "-inf", "1" * 5000, "x", "off", "on", "none", "True", "\u0663", "\u00b2",
     "\x00",
     "{", "eagle:4", "--", "-", "1.5", "1e-400", "\ud800"]
) | st.text(max_size=5)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FLAGS), st.lists(VALUES, max_size=2)), max_size=4))
def test_flags_are_a_config_that_writes_itself_or_an_error_in_one_line(drawn):
    argv = [*REQUIRED, *(word for flag, values in drawn for word in (flag, *values))]
    try:
        config = parse(argv, "")
    except ValueError as error:
        message = str(error)
    else:
        message = None
        assert to_flags(parse(to_flags(config), "")) == to_flags(config)
    assert message is None or message.strip()


COUNTS = st.sampled_from(["1", "4", "32", "33", "0", "-1", "", "\u00b2", "\u0664", "9" * 5000, "4 ", "0x4", "1e1"])
ONE = st.tuples(st.sampled_from([*METHODS, "off", "", "fly"]), st.sampled_from([":", "", "::"]), COUNTS).map("".join)


@given(ONE | st.text(max_size=12))
def test_a_strategy_is_itself_again_or_an_error_that_names_the_flag(text):
    try:
        strategy = parse_strategy(text, "--spec-strategy")
    except ValueError as error:
        message = str(error)
    else:
        message = "--spec-strategy"
        assert parse_strategy(str(strategy), "--spec-strategy") == strategy
    assert message.startswith("--spec-strategy")


POLICIES = st.tuples(
    st.sampled_from(["schedule@", "beg-mab@", "cost-model@", "@", "", "schedule"]),
    st.lists(
        st.tuples(st.sampled_from(["1", "9", "0", "x", "", "\u00b2"]), st.sampled_from(["=", "", "=="]), ONE).map(
            "".join
        )
        | ONE,
        max_size=3,
    ),
    st.sampled_from(["/", "|", ","]),
).map(lambda parts: parts[0] + parts[2].join(parts[1]))


@given(POLICIES)
def test_a_policy_is_one_or_an_error_that_names_the_flag(text):
    try:
        policy, _ = parse_policy(text, "--spec-strategy")
    except ValueError as error:
        message = str(error)
    else:
        message = "--spec-strategy"
        assert all(policy.choose(size).num_draft_tokens <= policy.max_draft_tokens for size in (1, 8, 100))
    assert message.startswith("--spec-strategy")


@given(
    st.sampled_from([*KINDS, "", "kill"]), st.sampled_from([*POINTS, "lunch", ""]),
    st.lists(st.sampled_from(["0", "1", "7", "x", "\u00b2", "9" * 5000, ""]), max_size=3),
)  # fmt: skip
def test_a_fault_is_one_or_an_error_that_names_the_flag(kind, point, numbers):
    try:
        (fault,) = parse_faults([f"{kind}@{'/'.join([point, *numbers])}"], world_size=2)
    except ValueError as error:
        message = str(error)
    else:
        message = "--fault"
        assert fault.kind in KINDS
        assert set(fault.ranks) <= {0, 1}
    assert message.startswith("--fault")


@settings(max_examples=40, deadline=None)
@given(
    model_type=st.sampled_from(["llama", "qwen2", "qwen3", "qwen3_moe"]), tied=st.booleans(), fused=st.booleans(),
    groups=st.sampled_from([1, 2, 4]), queries=st.integers(1, 3), dim=st.integers(1, 4), layers=st.integers(1, 4),
    tp=st.sampled_from([1, 2, 4]), seed=st.integers(0, 9),
)  # fmt: skip
def test_weights_survive_any_layout(model_type, tied, fused, groups, queries, dim, layers, tp, seed):
    tp = min(tp, groups)
    config = {
        "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": groups * queries,
        "num_key_value_heads": groups, "head_dim": dim, "vocab_size": 16, "num_hidden_layers": layers,
        "model_type": model_type, "tie_word_embeddings": tied,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6,
    }  # fmt: skip
    table = weight_table(config, transformer_engine=fused)
    names = [name for weight in table for name in weight.hf_names]
    assert len(set(names)) == len(names)
    for pp, ep in itertools.product([size for size in (1, 2, 4) if layers % size == 0], (1, 2, 4)):
        layout = layout_of(config, pp_size=pp, ep_size=ep)
        local = {(layout.stage(each), layout.ep_rank(each), layout.local_name(each)) for each in table}
        assert len(local) == len(table), "no two parameters of a stage have one name"
    generator = torch.Generator().manual_seed(seed)
    for weight in table:
        tensors = [torch.randn(shape, generator=generator) for shape in weight.hf_shapes]
        shards = [shard(weight, tensors, groups=query_groups(config), tp_rank=rank, tp_size=tp) for rank in range(tp)]
        for expected, got in zip(tensors, unshard(weight, shards, groups=query_groups(config)), strict=True):
            assert torch.equal(got, expected), weight.name


@pytest.mark.parametrize("count", ["\u00b2", "\u0664", "9" * 5000])
def test_digits_that_are_none_are_no_count(count):
    with pytest.raises(ValueError, match="--spec-strategy must be"):
        parse_strategy(f"eagle:{count}", "--spec-strategy")
    with pytest.raises(ValueError, match="--fault must be"):
        parse_faults([f"sigkill@update/{json.loads(json.dumps(count))}"], world_size=2)
