"""A rollout engine of a tiny model inside a rank of tests/distributed/ranks.py."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_patches import apply_patches
from tlt.config import RolloutConfig, SpecConfig, read_hf_config
from tlt.drafter.history import SuffixHistory
from tlt.rollout.consolidation import NoConsolidation
from tlt.rollout.outlook import NoOutlook
from tlt.rollout.vllm.engine import VLLMRolloutEngine
from tlt.rollout.vllm.speculation import read_spec_plan
from tlt.types import Prompt, Rollout, RolloutGroup, SamplingConfig

EXACT = "bfloat16" if torch.cuda.is_available() else "float32"
"""Heads attend in 16 bits on a GPU."""
EOS = 258  # <|im_end|> of tests/tiny_models.py


def make_engine(
    folder: Path, *, dtype: str = EXACT, should_stop: Callable[[], bool] = lambda: False,
    spec: SpecConfig | None = None, history_mib: int = 0, is_trained: bool = False, **config,
) -> VLLMRolloutEngine:  # fmt: skip
    """Collective over all ranks; all must call."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")  # the world exists already: nothing listens there
    apply_patches()
    rollout = RolloutConfig(
        **{"max_num_seqs": 8, "max_model_len": 256, "num_gpu_blocks_override": 256, **config}  # a small cache
    )
    plan = read_spec_plan(
        spec or SpecConfig(), target_config=read_hf_config(str(folder)), dtype=getattr(torch, dtype),
        tp_size=rollout.tensor_parallel_size, is_trained=is_trained,
    )  # fmt: skip
    return VLLMRolloutEngine(
        rollout,
        hf_model=str(folder),
        dtype=dtype,
        seed=0,
        stop_token_ids=[EOS],
        decode=lambda ids: " ".join(map(str, ids)),
        should_stop=should_stop,
        spec=plan,
        history=SuffixHistory(history_mib * 2**20),
        outlook=NoOutlook(),
        consolidation=NoConsolidation(),
    )


def make_prompts(num: int, length: int = 12) -> list[Prompt]:
    return [
        Prompt(
            prompt_id=f"p/{i}",
            source="p",
            token_ids=tuple(3 + (7 * i + 5 * t) % 250 for t in range(length + i)),
            text="",
            answer={},
        )
        for i in range(num)
    ]


def generate(
    engine: VLLMRolloutEngine, prompts: list[Prompt], sampling: SamplingConfig, *, group_size: int = 2, seed: int = 1
) -> list[RolloutGroup]:
    return engine.generate(
        prompts, sampling, group_size=group_size, seed=seed, on_finished=lambda prompt, sample, rollout: None
    )


def tokens(groups: list[RolloutGroup]) -> dict[str, list[tuple[int, ...]]]:
    return {group.prompt.prompt_id: [rollout.token_ids for rollout in group.rollouts] for group in groups}


def all_rollouts(groups: list[RolloutGroup]) -> list[tuple[Prompt, Rollout]]:
    return [(group.prompt, rollout) for group in groups for rollout in group.rollouts]
