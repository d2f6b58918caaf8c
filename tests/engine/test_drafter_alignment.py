"""A head is trained on what the engine feeds its drafter, and offline acceptance is what the engine counts.

One engine: it answers with hidden states recorded, a head learns from them, is loaded, and drafts for other prompts.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.distributed.ranks import run_ranks
from tests.engine.engines import generate, make_engine, make_prompts
from tests.engine.test_speculation import write_head
from tests.tiny_models import write_tiny_model
from tlt.config import DrafterConfig, RolloutConfig, SpecConfig, read_hf_config
from tlt.drafter.batch import pack, whole
from tlt.drafter.evaluation import SampledText, evaluate
from tlt.drafter.model import load_head, save_head
from tlt.drafter.trainer import DrafterTrainer, Target
from tlt.drafter.unroll import unroll
from tlt.rollout.vllm.engine import set_engine_environment
from tlt.rollout.vllm.learned_drafter import LearnedDrafter
from tlt.rollout.vllm.speculation import LEARNED
from tlt.rollout.vllm.target_weights import EMBEDDING, read_weight
from tlt.spec.draft_kind import FixedKind
from tlt.spec.randomness import request_seed
from tlt.spec.strategy import FixedStrategy, parse_strategy
from tlt.types import OFF, SamplingConfig
from tlt.weight_sync.gather import HfDirectory

pytestmark = pytest.mark.engine

# Random, yet to be learned by a small head in seconds (`repetitive`); ends at a length, so that no draft lies behind
# the text's end.
SAMPLING = SamplingConfig(temperature=0.9, max_response_tokens=60, ignore_eos=True)
NUM_DRAFT_TOKENS = 3


class Feed:
    """Records what drafters of an engine are given at verified positions, and what they made of a request's last one:
    (request's name, position) -> token, hidden state, output or None."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.inputs: dict[tuple[str, int], tuple[int, torch.Tensor, torch.Tensor | None]] = {}
        catch_up, forward = LearnedDrafter._catch_up, LearnedDrafter.forward
        names: list[str] = []

        def recording_catch_up(drafter, requests, block_table):
            begins = [drafter._num_cached.get(request.request_id, 0) for request in requests]
            for request, begin in zip(requests, begins, strict=True):
                names.extend([request.name] * (request.num_tokens - 1 - begin))
            return catch_up(drafter, requests, block_table)

        def recording_forward(drafter, tokens, hidden, position, *args, rows=None):
            output = forward(drafter, tokens, hidden, position, *args, rows=rows)
            last = {} if rows is None else dict(zip(rows.tolist(), output, strict=True))
            for index, name in enumerate(names):  # empty in passes on the head's own outputs
                self.inputs[name, int(position[index])] = (int(tokens[index]), hidden[index], last.get(index))
            names.clear()
            return output

        monkeypatch.setattr(LearnedDrafter, "_catch_up", recording_catch_up)
        monkeypatch.setattr(LearnedDrafter, "forward", recording_forward)


def check_feed(feed: Feed, learned: LearnedDrafter, samples: list) -> int:
    """Compares every recorded position with the training batch of the same sample; how many there were."""
    embedding = learned.runner.get_model().model.embed_tokens.weight
    num = 0
    for sample in samples:
        batch = pack([whole(sample)], num_depths=1, reads=learned.head.reads)
        with torch.no_grad():
            states = learned.head.fuse(batch.hidden_states)
        for start, row in zip(batch.starts.tolist(), batch.start_rows.tolist(), strict=True):
            assert int(batch.row_position_ids[row]) == start
        for position in batch.position_ids.tolist():
            token, hidden, _ = feed.inputs.get((sample.request_id, position), (None, None, None))
            if token is None:
                continue  # the last positions of a request that can use no more drafts
            num += 1
            assert token == int(batch.next_token_ids[position])
            # A step that verifies drafts computes the same states in other batches: fp32 rounding of four layers.
            torch.testing.assert_close(hidden, states[position], rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            (depth,) = unroll(learned.head, batch, embedding, num_depths=1)
        num_compared = 0
        for output, start in zip(depth.output, batch.starts.tolist(), strict=True):
            *_, expected = feed.inputs.get((sample.request_id, start), (None,))
            if expected is not None:
                num_compared += 1
                torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
        assert num_compared > 1, "a draft begins at most NUM_DRAFT_TOKENS + 1 positions after the one before"
    return num


def texts_of(samples: list, *, seed: int) -> list[SampledText]:
    return [
        SampledText(
            sample=sample,
            seed=request_seed(seed, sample.request_id.rpartition("#")[0], int(sample.request_id.rpartition("#")[2])),
        )
        for sample in samples
    ]


def _aligned(rank: int, world_size: int, folder: Path, head: Path, out: Path) -> None:
    spec = SpecConfig(
        strategy=f"eagle:{NUM_DRAFT_TOKENS}", drafter=(str(head),), hidden_states_mib=64, collapse_frac=0.0
    )  # fmt: skip
    engine = make_engine(folder, spec=spec)
    speculation = engine.speculation
    (learned,) = (drafter for name, drafter in speculation.drafting.drafters.items() if name == LEARNED)
    strategies = {
        "off": FixedStrategy(OFF), "on": FixedStrategy(parse_strategy(f"eagle:{NUM_DRAFT_TOKENS}", "test")),
    }  # fmt: skip
    speculation.policy = strategies["off"]
    generate(engine, make_prompts(40), SAMPLING, group_size=4, seed=3)
    samples = list(speculation.buffer)

    embedding = read_weight(folder, EMBEDDING)
    target = Target(
        embedding=embedding, output_weight=embedding[learned.head.draft_token_ids],
        temperature=SAMPLING.temperature,
    )  # fmt: skip
    config = read_hf_config(str(folder))
    trainer = DrafterTrainer(
        load_head(head, flag="test", target_config=config, dtype=torch.float32),
        DrafterConfig(num_depths=NUM_DRAFT_TOKENS, deep_frac=0.5, starts_per_step=256, lr=4e-3),
        target=target, seed=1,
    )  # fmt: skip
    steps = []
    trainer.train(
        [whole(sample) for sample in samples], progress=lambda: trainer.num_steps / 200, on_step=steps.append
    )
    assert steps[-1]["kl"] < 0.3 * steps[0]["kl"], (steps[0], steps[-1])
    engine.load_drafter(trainer.published(), drafter_version=1)

    other = [replace(prompt, prompt_id=f"other/{i}") for i, prompt in enumerate(make_prompts(6, length=17))]
    speculation.policy = strategies["on"]
    for drafts in ("one-hot", "coupled"):
        learned.kinds = FixedKind(drafts)
        before = len(speculation.buffer)
        with pytest.MonkeyPatch.context() as monkeypatch:
            feed = Feed(monkeypatch)
            generate(engine, other, SAMPLING, seed=9)
        found = list(speculation.buffer)[before:]
        assert len(found) == 12
        assert check_feed(feed, learned, found) > 12 * 40
        offline = evaluate(
            learned.head, texts_of(found, seed=9), target=target, num_draft_tokens=NUM_DRAFT_TOKENS,
            max_response_tokens=SAMPLING.max_response_tokens,
        )  # fmt: skip
        stats, counted = (
            offline.one_hot if drafts == "one-hot" else offline.coupled,
            engine.stats().acceptance[LEARNED],
        )
        assert (stats.num_drafts, stats.drafted, stats.accepted) == (
            counted.num_drafts, counted.drafted, counted.accepted
        ), drafts  # fmt: skip
        assert counted.acceptance_length > 1.3  # the head learned something: not equal by being zero

    learned.kinds = FixedKind("one-hot")
    before = len(speculation.buffer)
    generate(engine, other, replace(SAMPLING, temperature=0.01), group_size=1)  # greedy text itself is not recorded
    trained = load_head(head, flag="test", target_config=config, dtype=torch.float32)
    trained.load_state_dict(trainer.published())
    save_head(trained, out / "head", target_config=config)
    torch.save((list(speculation.buffer)[before:], embedding), out / "greedy.pt")
    engine.close()


def _stock(rank: int, world_size: int, folder: Path, out: Path) -> None:
    """Stock vLLM answers the prompts of the greedy texts with the exported head."""
    set_engine_environment(RolloutConfig())
    from vllm import LLM, SamplingParams

    samples, _ = torch.load(out / "greedy.pt", weights_only=False)
    llm = LLM(
        model=str(folder), dtype="float32", max_model_len=256, num_gpu_blocks_override=256, enforce_eager=True,
        disable_log_stats=False,
        speculative_config={
            "method": "eagle", "model": str(out / "head"), "num_speculative_tokens": NUM_DRAFT_TOKENS
        },
    )  # fmt: skip
    prompts = [{"prompt_token_ids": sample.token_ids[: sample.num_prompt_tokens].tolist()} for sample in samples]
    params = SamplingParams(
        temperature=0.0, max_tokens=SAMPLING.max_response_tokens, ignore_eos=True, detokenize=False
    )  # fmt: skip
    outputs = llm.generate(prompts, params, use_tqdm=False)
    counters = {metric.name: metric.value for metric in llm.get_metrics() if metric.name.startswith("vllm:spec")
                and hasattr(metric, "value")}  # fmt: skip
    torch.save(([list(output.outputs[0].token_ids) for output in outputs], counters), out / "stock.pt")


def repetitive(folder: Path) -> None:
    """Layers add little to the residual stream, so with a tied output layer the last token is likely to come again:
    about half of the time at `SAMPLING`, and the rest is spread over all others."""
    tensors = {name: file.get_tensor(name) for name, file in HfDirectory(folder).owner.items()}
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = 0.01 * tensors[name]
    tensors["model.norm.weight"] = 0.4 * tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_training_inputs_and_offline_acceptance_of_a_head_of_three_layers_are_the_engines(tmp_path):
    folder = write_tiny_model("llama", tmp_path, initializer_range=0.2)
    repetitive(folder)
    head = write_head(tmp_path / "head", folder, draft_token_ids=torch.arange(300), aux_layers=(1, 2, 3))
    run_ranks(_aligned, 1, folder, head, tmp_path)


def test_training_inputs_offline_acceptance_and_the_exported_head_are_the_engines(tmp_path):
    folder = write_tiny_model("llama", tmp_path, initializer_range=0.2)
    repetitive(folder)
    head = write_head(tmp_path / "head", folder, draft_token_ids=torch.arange(300))  # some text is out of its reach
    run_ranks(_aligned, 1, folder, head, tmp_path)
    # The exported head drafts in stock vLLM as offline evaluation over the whole vocabulary says.
    run_ranks(_stock, 1, folder, tmp_path)
    samples, embedding = torch.load(tmp_path / "greedy.pt", weights_only=False)
    responses, counters = torch.load(tmp_path / "stock.pt", weights_only=False)
    assert responses == [sample.token_ids[sample.num_prompt_tokens :].tolist() for sample in samples]
    config = read_hf_config(str(folder))
    exported = load_head(tmp_path / "head", flag="test", target_config=config, dtype=torch.float32)
    exported.draft_token_ids = None
    target = Target(embedding=embedding, output_weight=embedding, temperature=1.0)
    offline = evaluate(
        exported, texts_of(samples, seed=1), target=target, num_draft_tokens=NUM_DRAFT_TOKENS,
        max_response_tokens=SAMPLING.max_response_tokens,
    )  # fmt: skip
    stock = 1 + counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_drafts"]
    assert stock > 2
    assert stock == pytest.approx(offline.one_hot.acceptance_length, rel=0.03)
