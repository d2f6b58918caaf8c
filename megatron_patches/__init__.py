"""Fixes of upstream that Megatron needs on a machine without CUDA; applied by an explicit call, never at import."""

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
    "cpu_distributed_step",
    "cpu_tied_embedding",
    "cpu_checkpoint_preload",
    "cpu_checkpoint_verify",
)
"""File names, in the order they are applied."""


def load_patch(name: str) -> Patch:
    return importlib.import_module(f"megatron_patches.{name}").PATCH


def apply_patches() -> list[str]:
    """Apply what this machine needs (nothing where CUDA is there) and return the names of the patches in force."""
    import torch

    if torch.cuda.is_available():
        return []
    for name in CPU_PATCHES:
        load_patch(name).apply()
    logger.info("patches for a machine without CUDA: %s", ", ".join(CPU_PATCHES))
    return list(CPU_PATCHES)


def readme() -> str:
    """The table of README.md; a test compares it with the file."""
    rows = [load_patch(name) for name in CPU_PATCHES]
    lines = [
        "# Patches of upstream",
        "",
        "One file each; applied by `apply_patches()` where CUDA is not available. A version or source text that a",
        "patch was not written for stops the run. Tests in `tests/patches/` show that each bug is there unpatched, so",
        "they say when a patch can go.",
        "",
        "| name | symbol | versions | why | watch |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | `{row.target}` | {row.distribution} {row.versions} | {row.reason} | {row.upstream} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"
