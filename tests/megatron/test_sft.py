"""Supervised fine-tuning on real megatron-core: transformers' loss, equal at every layout and packing, and it learns.

The last test puts one model through transformers, Megatron and vLLM.
"""

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.trainer_cases import make_trainer
from tests.engine.engines import all_rollouts, generate, make_engine, make_prompts
from tlt.config import OptimizerConfig
from tlt.rl.losses import LikelihoodObjective
from tlt.sft.examples import weighted
from tlt.types import SamplingConfig, TrainBatch, TrainSequence

pytestmark = pytest.mark.megatron


def examples(num: int = 6, seed: int = 0) -> tuple[TrainSequence, ...]:
    """Random prompts and responses of different lengths, as one optimizer step."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    shapes = [(integers(2, 9, 1)[0], integers(1, 20, 1)[0]) for _ in range(num)]
    return weighted(
        [
            TrainSequence(
                token_ids=tuple(integers(3, 256, prompt + response)), num_prompt_tokens=prompt, advantage=0.0,
                rollout_logprobs=(), loss_weight=0.0,
            )
            for prompt, response in shapes
        ]
    )  # fmt: skip


def batch(seed: int) -> TrainBatch:
    return TrainBatch(optimizer_steps=(examples(seed=seed),), policy_version=0)


def _fine_tune(rank: int, world_size: int, folder: Path, out: Path, case: dict) -> None:
    trainer = make_trainer(
        folder, objective=LikelihoodObjective(),
        optimizer=OptimizerConfig(lr=1e-3, use_distributed_optimizer=case.pop("use_distributed_optimizer", False)),
        **case,
    )  # fmt: skip
    history = []
    for seed in (0, 1):
        metrics = trainer.train_step(batch(seed))
        history.append([metrics["policy/nll"], metrics["policy/grad_norm"]])
    history.append([trainer.evaluate(examples(seed=2))["nll"]])
    weights = {name: tensor.clone() for name, tensor in trainer.named_hf_tensors()}
    if rank == 0:
        torch.save((history, weights), out)


@pytest.fixture(scope="module")
def one_rank(tiny_models, tmp_path_factory):
    out = tmp_path_factory.mktemp("sft") / "one.pt"
    run_ranks(_fine_tune, 1, tiny_models["llama"], out, {})
    return torch.load(out)


def test_the_loss_is_that_of_transformers(tiny_models, one_rank):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32).eval()
    total, count = 0.0, 0
    for sequence in examples(seed=0):
        labels = torch.tensor([sequence.token_ids])
        labels[0, : sequence.num_prompt_tokens] = -100
        with torch.no_grad():
            loss = model(torch.tensor([sequence.token_ids]), labels=labels).loss
        total += float(loss) * sequence.num_response_tokens
        count += sequence.num_response_tokens
    assert one_rank[0][0][0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "case"),
    [
        (1, {"max_tokens": 30}),
        (2, {}),
        (2, {"max_tokens": 40, "use_distributed_optimizer": True}),
        (2, {"tp": 2}),
        (2, {"pp": 2, "max_tokens": 40}),
        (4, {"tp": 2, "pp": 2, "max_tokens": 60}),
    ],
)
def test_fine_tuning_does_not_depend_on_layout_or_packing(tiny_models, one_rank, tmp_path, world_size, case):
    run_ranks(_fine_tune, world_size, tiny_models["llama"], tmp_path / "result.pt", case)
    history, weights = torch.load(tmp_path / "result.pt")
    for ours, expected in zip(history, one_rank[0], strict=True):
        # fp32 gradients, added in another order; later steps start from weights that differ so
        assert ours == pytest.approx(expected, rel=2e-4, abs=2e-5)
    for name, tensor in one_rank[1].items():
        # Adam turns a relative difference of a tiny gradient into one of the step (1e-3), so this is a bound on steps
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=4e-4)


def _learns_by_heart(rank: int, world_size: int, folder: Path) -> None:
    trainer = make_trainer(folder, objective=LikelihoodObjective(), optimizer=OptimizerConfig(lr=1e-2))
    losses = [trainer.train_step(batch(0))["policy/nll"] for _ in range(60)]
    assert losses[0] > 4, losses[0]  # about ln(512): random weights
    assert losses[-1] < 0.05, losses[-1]


def test_one_batch_is_learned_by_heart(tiny_models):
    run_ranks(_learns_by_heart, 1, tiny_models["llama"])


def _three_ways(rank: int, world_size: int, folder: Path) -> None:
    """vLLM samples; transformers and Megatron give the sampled tokens' log-probabilities."""
    from transformers import AutoModelForCausalLM

    engine = make_engine(folder)  # its own weights: the directory's, as a benchmark would load it
    sampling = SamplingConfig(temperature=1.0, max_response_tokens=24)
    rollouts = all_rollouts(generate(engine, make_prompts(3), sampling))
    sequences = weighted(
        [
            TrainSequence(
                token_ids=prompt.token_ids + rollout.token_ids, num_prompt_tokens=len(prompt.token_ids),
                advantage=0.0, rollout_logprobs=(), loss_weight=0.0,
            )
            for prompt, rollout in rollouts
        ]
    )  # fmt: skip
    trainer = make_trainer(folder, objective=LikelihoodObjective())
    ((_, outputs),) = trainer._forward_only(trainer.ddp, trainer._micro_batches(sequences))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for sequence in sequences:
        ids = torch.tensor([sequence.token_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, ids[0, 1:, None])[sequence.num_prompt_tokens - 1 :, 0]
        expected.append(picked)
    expected = torch.cat(expected)
    sampled = torch.tensor([value for _, rollout in rollouts for value in rollout.logprobs])
    # fp32 sums of other implementations
    torch.testing.assert_close(outputs.logprobs, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sampled, expected, rtol=1e-3, atol=1e-3)
    engine.close()


def _writes_a_directory(rank: int, world_size: int, folder: Path, out: Path) -> None:
    from tlt.weight_sync.hf_directory import write_hf_directory

    trainer = make_trainer(folder, tp=2, objective=LikelihoodObjective(), optimizer=OptimizerConfig(lr=1e-2))
    for seed in range(3):
        trainer.train_step(batch(seed))
    write_hf_directory(out, trainer.named_hf_tensors(), like=folder, parallel=trainer.parallel)


@pytest.mark.engine
def test_the_tuned_model_is_one_in_transformers_megatron_and_vllm(tiny_models, tmp_path):
    run_ranks(_writes_a_directory, 2, tiny_models["llama"], tmp_path / "hf")
    run_ranks(_three_ways, 1, tmp_path / "hf")
