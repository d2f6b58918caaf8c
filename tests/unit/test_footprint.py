"""What a run takes of each GPU: known sizes of known models, and what grows with what."""

from dataclasses import replace

import pytest

from tests.model_facts import FACTS, NUM_PARAMETERS
from tlt.arguments import parse
from tlt.footprint.engine import Drafters
from tlt.footprint.policy import num_parameters
from tlt.footprint.table import GIB, PHASES, Footprint, footprint

NONE = Drafters(states={})


def of(
    model: str, *flags: str, world_size: int = 8, gpu_gib: float | None = 79, drafters: Drafters = NONE
) -> Footprint:
    required = ["--hf-model", "m", "--save", "s", "--data-train", "reasoning-gym:chain_sum"]
    config = parse([*required, "--rollout-max-model-len", "8192", *flags], "")
    return footprint(
        config, FACTS[model], drafters, world_size=world_size, ranks_per_node=8,
        device_bytes=None if gpu_gib is None else int(gpu_gib * GIB),
    )  # fmt: skip


def gib_of(found: Footprint, name: str, phase: str) -> float:
    (row,) = [row for row in found.rows if row.name.startswith(name)]
    return row.num_bytes[PHASES.index(phase)] / GIB


@pytest.mark.parametrize("model", FACTS)
def test_parameters_are_those_that_the_model_is_published_with(model):
    assert num_parameters(FACTS[model]) == NUM_PARAMETERS[model]


def test_state_is_sharded_by_the_layout():
    whole = NUM_PARAMETERS["qwen2.5_32b"] / GIB
    found = of("qwen2.5_32b", "--tensor-model-parallel-size", "8", "--use-distributed-optimizer", world_size=64)
    # Norms are on every rank: a millionth of the whole
    assert gib_of(found, "policy, tensor 8", "rollout") == pytest.approx(2 * whole / 8, rel=1e-3)
    assert gib_of(found, "gradients", "update") == pytest.approx(4 * whole / 8, rel=1e-3)
    assert gib_of(found, "optimizer state", "update") == pytest.approx(12 * whole / 8 / 8, rel=1e-3)
    assert gib_of(found, "optimizer state", "rollout") == 0, "it is on the host then"
    assert found.host_bytes / GIB == pytest.approx(12 * whole / 8 / 8 + 64 / 1024, rel=1e-3)
    assert found.save_bytes / GIB == pytest.approx(26 * whole / 8, rel=1e-3), "gathered, and copied to be written"
    alone = of("qwen2.5_32b", "--tensor-model-parallel-size", "8", world_size=64)
    assert alone.save_bytes / GIB == pytest.approx(2 * whole / 8, rel=1e-3), "each rank has its shard's state"
    assert gib_of(alone, "optimizer state", "update") == pytest.approx(12 * whole / 8, rel=1e-3)


def test_a_pipeline_shares_layers_and_the_first_stage_has_the_most_in_flight():
    flags = ["--tensor-model-parallel-size", "4", "--rollout-tensor-parallel-size", "4"]
    whole = of("llama3.3_70b", *flags, world_size=16)
    halves = of("llama3.3_70b", *flags, "--pipeline-model-parallel-size", "2", world_size=16)
    assert gib_of(halves, "policy,", "update") == pytest.approx(gib_of(whole, "policy,", "update") / 2, rel=1e-3)
    assert gib_of(halves, "activations", "update") == pytest.approx(gib_of(whole, "activations", "update"), rel=1e-3)
    assert "stage 0" in halves.rows[0].name


def test_recomputation_and_sequence_parallelism_need_less():
    flags = ["--tensor-model-parallel-size", "4"]
    kept = gib_of(of("qwen2.5_7b", *flags), "activations", "update")
    sharded = gib_of(of("qwen2.5_7b", *flags, "--sequence-parallel"), "activations", "update")
    again = gib_of(of("qwen2.5_7b", *flags, "--recompute-granularity", "full"), "activations", "update")
    assert again < sharded < kept


def test_the_kv_cache_is_what_the_engine_leaves_of_its_share():
    found = of("qwen2.5_7b", "--rollout-gpu-memory-utilization", "0.5")
    taken = found.engine.weights + found.engine.step + found.engine.kv_cache
    assert taken == pytest.approx(0.5 * 79 * GIB, rel=1e-6)
    # 28 layers of 4 key-value heads of 128, key and value, bf16
    assert found.engine.kv_tokens == found.engine.kv_cache // (2 * 28 * 4 * 128 * 2)
    wide = of("qwen2.5_7b", "--rollout-tensor-parallel-size", "4", "--rollout-gpu-memory-utilization", "0.5")
    assert wide.engine.kv_tokens > 4 * found.engine.kv_tokens, "heads are copied beyond four ranks only"


def test_drafters_take_room_for_every_cached_token():
    drafters = Drafters(head_parameters=10**8, num_heads=1, states={"last_hidden_states": 1})
    found = of("qwen2.5_7b", drafters=drafters)
    slot = (3584 + 2 * 4 * 128) * 2
    assert gib_of(found, "drafters", "update") == pytest.approx((2e8 + found.engine.kv_tokens * slot) / GIB)


def test_drafts_take_room_beyond_what_the_engine_measures():
    plain = of("qwen2.5_7b", "--rollout-max-num-seqs", "64")
    drafting = of(
        "qwen2.5_7b", "--rollout-max-num-seqs", "64", drafters=Drafters(states={}, verified_tokens=64 * 9)
    )  # fmt: skip
    row = 4 * 4 * FACTS["qwen2.5_7b"]["vocab_size"]
    assert drafting.engine.step - plain.engine.step == 64 * 8 * row
    assert drafting.engine.kv_cache == plain.engine.kv_cache
    keeping = of("qwen2.5_7b", drafters=replace(NONE, draft_probs=10**9))
    assert gib_of(keeping, "drafters", "update") == pytest.approx(4e9 / GIB)


def test_a_head_that_is_trained_takes_its_trainer_along():
    drafters = Drafters(head_parameters=10**8, num_heads=1, states={}, trained_parameters=10**8)
    found = of("qwen2.5_7b", drafters=drafters)
    assert gib_of(found, "drafter's trainer", "update") == pytest.approx(4 * 4e8 / GIB)
    assert gib_of(found, "drafter's step", "update") == 0
    more = of("qwen2.5_7b", drafters=replace(drafters, trained_rows=1000, copied_rows=2000))
    assert gib_of(more, "drafter's trainer", "rollout") == pytest.approx(4 * (4e8 + 1000 * 3584) / GIB)
    assert gib_of(more, "drafter's step", "rollout") == pytest.approx(4 * (2e8 + 1000 * 3584) / GIB)
    assert more.host_bytes - found.host_bytes == 2000 * 3584 * 2


def test_what_does_not_fit_is_refused_with_the_phase_and_the_largest_part():
    with pytest.raises(ValueError, match="'update'.*--use-distributed-optimizer.*of them optimizer state"):
        of("qwen2.5_7b", world_size=1).require_fit()
    with pytest.raises(ValueError, match="'rollout'.*--rollout-gpu-memory-utilization.*KV cache"):
        of("smollm2_135m", "--rollout-gpu-memory-utilization", "0.97").require_fit()
    with pytest.raises(ValueError, match="KV cache.*at least one sequence of 8192 tokens, got '0 tokens'"):
        of("llama3.3_70b", world_size=64).require_fit()
    of("smollm2_135m", world_size=1).require_fit()


@pytest.mark.parametrize(
    ("gpu_gib", "flags", "named"),
    [
        (79, [], "--rollout-gpu-memory-utilization, --rollout-tensor-parallel-size"),
        (None, [], "--rollout-kv-cache-gib, --rollout-tensor-parallel-size"),
        (79, ["--rollout-num-gpu-blocks-override", "3"], "--rollout-num-gpu-blocks-override"),
        (None, ["--rollout-num-gpu-blocks-override", "3"], "--rollout-num-gpu-blocks-override"),
    ],
)
def test_a_kv_cache_that_is_too_small_names_what_sizes_it(gpu_gib, flags, named):
    with pytest.raises(ValueError, match=".") as caught:
        of("llama3.3_70b", *flags, world_size=64, gpu_gib=gpu_gib).require_fit()
    assert f"KV cache ({named}; or a smaller --rollout-max-model-len) must be" in str(caught.value)


def test_ranks_on_a_cpu_hold_everything_at_once_and_are_not_refused():
    found = of("smollm2_135m", gpu_gib=None)
    assert gib_of(found, "optimizer state", "rollout") == gib_of(found, "optimizer state", "update") > 0
    assert found.engine.kv_cache == GIB
    of("qwen2.5_7b", gpu_gib=None).require_fit()
