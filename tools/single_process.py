"""Megatron's groups for a conversion: the ranks of torchrun, or one process of its own."""

import argparse
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def layout_flags(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's two layout flags; with more than one rank start under torchrun."""
    for name in ("tensor", "pipeline"):
        parser.add_argument(
            f"--{name}-model-parallel-size", type=int, default=1, metavar="INT", help="ranks (default: 1)"
        )


def dtype_of(hf_config: dict) -> torch.dtype:
    """Of a model's weights, as its config.json says; ValueError for others than ours."""
    from tlt.config import require

    dtype = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    require(dtype in ("bfloat16", "float32"), "--hf-model", dtype, "a model in bfloat16 or float32")
    return getattr(torch, dtype)


def start_layout(hf_model: Path, hf_config: dict, *, tp: int, pp: int):
    """(Parallel, ModelConfig) in the dtype of the model; outside torchrun a world of this process alone.

    Raises ValueError where the layout does not fit model or world. Collective over all ranks; all must call.
    """
    from megatron_patches import apply_patches
    from tlt import parallel
    from tlt.config import ModelConfig, require

    dtype = dtype_of(hf_config)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    require(
        tp * pp == world_size,
        "--tensor-model-parallel-size x --pipeline-model-parallel-size",
        tp * pp,
        f"the number of ranks ({world_size})",
    )
    model = ModelConfig(
        hf_model=str(hf_model),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        bf16=dtype == torch.bfloat16,
    )
    apply_patches()
    if world_size == 1 and not dist.is_initialized():
        store = tempfile.mkdtemp()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}/store", rank=0, world_size=1)
    return parallel.initialize(model, timeout=timedelta(minutes=10)), model
