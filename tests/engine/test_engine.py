"""The rollout engine on the real vLLM, fp32 tiny models: what it samples, reports, loads and refuses.

Each case runs in a process of its own, so that its engine and process groups end with it.
Not covered: GPU sleep and wake.
"""

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.engine.engines import EOS, all_rollouts, generate, make_engine, make_prompts, tokens
from tests.tiny_models import EXPERTS, write_tiny_model
from tlt.protocols import RolloutInterrupted
from tlt.rl.logprobs import LogprobOutputs, vocab_parallel_logprobs
from tlt.rollout.vllm import experts
from tlt.types import SamplingConfig
from tlt.weight_sync.gather import HfDirectory

pytestmark = pytest.mark.engine


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: file.get_tensor(name) for name, file in HfDirectory(folder).owner.items()}


def hf_outputs(folder: Path, rollouts, sampling: SamplingConfig) -> list[LogprobOutputs]:
    """At each response's tokens, by a clean prefill in transformers, under the sampling distribution."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    results = []
    for prompt, rollout in rollouts:
        ids = torch.tensor([prompt.token_ids + rollout.token_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt.token_ids) - 1 : -1]
        results.append(
            vocab_parallel_logprobs(
                logits,
                torch.tensor(rollout.token_ids),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
            )
        )
    return results


def _samples_loads_and_stops(rank: int, world_size: int, folder: Path, other: Path) -> None:
    stop = {"now": False}
    engine = make_engine(folder, should_stop=lambda: stop["now"])
    prompts = make_prompts(3)
    engine.load_weights(iter(weights_of(folder).items()), policy_version=4)

    for sampling in (
        SamplingConfig(temperature=1.0, max_response_tokens=24),
        SamplingConfig(temperature=0.7, top_p=0.8, max_response_tokens=24),
        SamplingConfig(temperature=1.3, top_k=20, max_response_tokens=24),
    ):
        groups = generate(engine, prompts, sampling)
        rollouts = all_rollouts(groups)
        assert [group.prompt for group in groups] == prompts
        assert {rollout.policy_version for _, rollout in rollouts} == {4}
        for (_, rollout), expected in zip(rollouts, hf_outputs(folder, rollouts, sampling), strict=True):
            # fp32 logits of another implementation: sums of 128 terms, through 4 layers
            torch.testing.assert_close(torch.tensor(rollout.logprobs), expected.logprobs, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(torch.tensor(rollout.entropies), expected.entropy, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(torch.tensor(rollout.max_probs), expected.max_prob, rtol=1e-3, atol=1e-3)
            ended = rollout.token_ids[-1] == EOS
            assert rollout.finish_reason == ("stop" if ended else "length")
            assert EOS not in rollout.token_ids[:-1]
            assert ended or len(rollout.token_ids) == 24
        assert tokens(generate(engine, prompts, sampling)) == tokens(groups)
        assert tokens(generate(engine, prompts, sampling, seed=2)) != tokens(groups)
        alone = generate(engine, prompts[1:2], sampling)  # whatever runs beside it
        assert tokens(alone)["p/1"] == tokens(groups)["p/1"]

    # Weights: every one is read back, a change of any is noticed, and generation follows them, cached prefixes too.
    greedy = SamplingConfig(temperature=0.0, max_response_tokens=16, ignore_eos=True)
    first = weights_of(folder)
    engine.check_weights(first)
    for name, tensor in first.items():
        changed = tensor.clone()
        changed.view(-1)[0] += 1.0  # in column 0, which is always read
        with pytest.raises(RuntimeError, match="other values"):
            engine.check_weights({name: changed})
    before = tokens(generate(engine, prompts, greedy))
    engine.load_weights(iter(weights_of(other).items()), policy_version=5)
    engine.check_weights(weights_of(other))
    after = generate(engine, prompts, greedy)
    rollouts = all_rollouts(after)
    assert tokens(after) != before
    for (_, rollout), expected in zip(
        rollouts, hf_outputs(other, rollouts, SamplingConfig(temperature=1.0, max_response_tokens=16)), strict=True
    ):
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected.logprobs, rtol=1e-3, atol=1e-3)
    engine.load_weights(iter(first.items()), policy_version=6)
    assert tokens(generate(engine, prompts, greedy)) == before

    # A response that reaches the context's end is cut there.
    long = generate(
        engine, make_prompts(1, length=250), SamplingConfig(**{**greedy.__dict__, "max_response_tokens": 99})
    )
    assert [len(rollout.token_ids) for _, rollout in all_rollouts(long)] == [6, 6]
    assert {rollout.finish_reason for _, rollout in all_rollouts(long)} == {"length"}

    stop["now"] = True
    with pytest.raises(RolloutInterrupted):
        generate(engine, prompts, greedy)
    stop["now"] = False
    assert tokens(generate(engine, prompts, greedy)) == before
    engine.sleep()
    with pytest.raises(RuntimeError, match="sleeps"):
        generate(engine, prompts, greedy)
    engine.close()


@pytest.mark.parametrize("kind", ["llama", "qwen3", EXPERTS])
def test_engine_samples_the_policy_and_holds_what_was_sent(tiny_models, tmp_path, kind):
    run_ranks(_samples_loads_and_stops, 1, tiny_models[kind], write_tiny_model(kind, tmp_path, seed=9))


def _unpacked_experts_are_noticed(rank: int, world_size: int, folder: Path) -> None:
    engine = make_engine(folder)
    experts.pack_again = lambda model: None  # of this process

    def sync() -> None:
        engine.load_weights(iter(weights_of(folder).items()), policy_version=2)
        engine.check_weights(weights_of(folder))

    with pytest.raises(RuntimeError, match="other values"):
        sync()
    engine.close()


def test_what_vllm_does_to_experts_that_it_loads_again_would_be_noticed(tiny_models):
    run_ranks(_unpacked_experts_are_noticed, 1, tiny_models[EXPERTS])


def _preempted(rank: int, world_size: int, folder: Path, expected_file: Path, blocks: int) -> None:
    prompts = make_prompts(12, length=40)
    sampling = SamplingConfig(temperature=1.0, max_response_tokens=90, ignore_eos=True)
    crowded = blocks > 0
    engine = make_engine(
        folder,
        max_num_seqs=24,
        max_num_batched_tokens=64 if crowded else None,
        num_gpu_blocks_override=blocks if crowded else None,
    )
    result = tokens(generate(engine, prompts, sampling))
    preemptions = engine.stats().num_preemptions
    if crowded:
        assert preemptions > 0, "the cache was large enough: the test shows nothing"
        assert result == torch.load(expected_file)
        assert tokens(generate(engine, prompts, sampling)) == result
    else:
        assert preemptions == 0
        torch.save(result, expected_file)
    engine.close()


def test_preemption_and_chunked_prefill_change_no_token(tiny_models, tmp_path):
    run_ranks(_preempted, 1, tiny_models["llama"], tmp_path / "expected.pt", 0)
    run_ranks(_preempted, 1, tiny_models["llama"], tmp_path / "expected.pt", 12)


def _replicas(rank: int, world_size: int, folder: Path, expected_file: Path, tp_size: int) -> None:
    engine = make_engine(folder, tensor_parallel_size=tp_size)
    engine.load_weights(iter(weights_of(folder).items()), policy_version=0)
    engine.check_weights(weights_of(folder))
    sampling = SamplingConfig(temperature=1.0, max_response_tokens=40)
    own = tokens(generate(engine, make_prompts(5), sampling))
    if world_size == 1:
        torch.save(own, expected_file)
    else:
        expected = torch.load(expected_file)
        assert own == {name: expected[name] for name in own}
        num_replicas = world_size // tp_size
        assert sorted(own) == [f"p/{i}" for i in range(5) if i % num_replicas == rank // tp_size]
        assert engine.is_replica_leader == (rank % tp_size == 0)
    engine.close()


def test_replicas_and_tensor_parallel_ranks_give_the_tokens_of_one_engine(tiny_models, tmp_path):
    expected = tmp_path / "expected.pt"
    run_ranks(_replicas, 1, tiny_models["qwen2"], expected, 1)
    run_ranks(_replicas, 2, tiny_models["qwen2"], expected, 1)
    run_ranks(_replicas, 2, tiny_models["qwen2"], expected, 2)
    run_ranks(_replicas, 4, tiny_models["qwen2"], expected, 2)
