"""A trainer of a tiny model at any layout, for tests that run on several ranks."""

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch

from megatron_patches import apply_patches
from tlt import parallel as process_groups
from tlt.config import ModelConfig, OptimizerConfig, RLConfig
from tlt.policy.trainer import MegatronPolicyTrainer
from tlt.rl.losses import Objective, PolicyObjective
from tlt.trace import NoTrace
from tlt.types import SamplingConfig, TrainBatch, TrainSequence
from tlt.weight_sync.gather import PolicyWeights


def make_trainer(
    folder: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    sequence_parallel: bool = False,
    bf16: bool = False,
    max_tokens: int = 4096,
    recompute: str = "none",
    rl: RLConfig | None = None,
    objective: Objective | None = None,
    optimizer: OptimizerConfig | None = None,
    sampling: SamplingConfig | None = None,
) -> MegatronPolicyTrainer:
    """Collective over all ranks; all must call."""
    apply_patches()
    model = ModelConfig(
        hf_model=str(folder), tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep, sequence_parallel=sequence_parallel, bf16=bf16,
        max_tokens_per_micro_batch=max_tokens, recompute_granularity=recompute,
    )  # fmt: skip
    hf_config = json.loads((folder / "config.json").read_text())
    parallel = process_groups.initialize(model, timeout=timedelta(seconds=120))

    def weights(stage: torch.nn.Module) -> PolicyWeights:
        return PolicyWeights(stage, hf_config, parallel, transformer_engine=False)

    return MegatronPolicyTrainer(
        hf_config=hf_config,
        model=model,
        optimizer=optimizer or OptimizerConfig(lr=1e-3),
        objective=objective or PolicyObjective(rl or RLConfig(max_logprob_diff=None)),
        sampling=sampling or SamplingConfig(temperature=1.0, max_response_tokens=64),
        parallel=parallel,
        train_iters=10,
        trace=NoTrace(),
        fill=lambda stage: weights(stage).load(folder),
        hf_tensors=lambda stage: weights(stage).hf_tensors(),
    )


def make_batch(*, seed: int = 0, num_steps: int = 2, sequences_per_step: int = 6, vocab: int = 256) -> TrainBatch:
    """Random sequences of different lengths with both signs of advantage; weights are those of token-mean."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    def step() -> Sequence[TrainSequence]:
        shapes = [(integers(2, 9, 1)[0], integers(1, 20, 1)[0]) for _ in range(sequences_per_step)]
        total = sum(response for _, response in shapes)
        return tuple(
            TrainSequence(
                token_ids=tuple(integers(3, vocab, prompt + response)),
                num_prompt_tokens=prompt,
                advantage=float(torch.randn((), generator=generator)),
                rollout_logprobs=tuple((-5 - torch.rand(response, generator=generator)).tolist()),
                loss_weight=1.0 / total,
            )
            for prompt, response in shapes
        )

    return TrainBatch(optimizer_steps=tuple(step() for _ in range(num_steps)), policy_version=0)
