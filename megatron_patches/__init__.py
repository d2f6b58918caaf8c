"""Fixes of upstream: what Megatron needs without Transformer Engine and Apex, and what it needs without CUDA as well;
applied by an explicit call, never at import."""

import importlib
import logging

from megatron_patches.patch import Patch

logger = logging.getLogger(__name__)

CPU_PATCHES = (
    "cpu_current_device",
    "cpu_rng_fork",
    "cpu_rng_get",
    "cpu_rng_set",
    "cpu_schedule_no_pipelining",
    "cpu_schedule_pipelining",
    "cpu_pipeline_shapes",
    "cpu_l2_norm",
    "cpu_grad_norm",
    "cpu_clip_grad",
    "cpu_fp32_optimizer",
    "cpu_mixed_precision_optimizer",
    "cpu_master_weights",
    "cpu_distributed_optimizer",
    "cpu_distributed_checkpoint",
    "cpu_tied_embedding",
    "cpu_checkpoint_preload",
    "cpu_checkpoint_verify",
    "cpu_moe_splits",  # before what calls it: a copy keeps the globals of its time
    "cpu_moe_dispatcher",
    "cpu_moe_synchronize",
)
"""Files for a machine without CUDA, in the order they are applied."""
EVERYWHERE = ("adamw_distributed_step", "moe_router_linear")
"""Files for all machines: what Megatron does where Transformer Engine and Apex are not installed."""
GPU_PATCHES = ("moe_topk_ties",)
"""Files for a machine with CUDA."""
ALL_PATCHES = CPU_PATCHES + EVERYWHERE + GPU_PATCHES


def load_patch(name: str) -> Patch:
    return importlib.import_module(f"megatron_patches.{name}").PATCH


def apply_patches() -> list[str]:
    """Apply what this machine needs and return the names of the patches in force."""
    import torch

    names = EVERYWHERE + GPU_PATCHES if torch.cuda.is_available() else CPU_PATCHES + EVERYWHERE
    for name in names:
        load_patch(name).apply()
    logger.info("patches of Megatron for this machine: %s", ", ".join(names))
    return list(names)


def readme() -> str:
    """The table of README.md; a test compares it with the file."""
    rows = [load_patch(name) for name in ALL_PATCHES]
    lines = [
        "# Patches of upstream",
        "",
        "One file each; applied by `apply_patches()`: `cpu_*` where CUDA is not available, `moe_topk_ties` where it",
        "is, the others everywhere. A version or source text that a patch was not written for stops the run. Tests in",
        "`tests/patches/` show that each bug is there unpatched, so they say when a patch can go.",
        "",
        "| name | symbol | versions | why | watch |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | `{row.target}` | {row.distribution} {row.versions} | {row.reason} | {row.upstream} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
