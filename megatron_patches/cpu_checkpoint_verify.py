"""Saving a checkpoint of the same shape again reuses the plan if all ranks agree, over a tensor made with
`device="cuda"`, which raises without CUDA. The same code runs with it on the CPU.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_checkpoint_verify",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.dist_checkpointing.strategies.state_dict_saver:verify_global_md_reuse",
    source_sha256=("d3d903351fc8",),
    reason='the agreement on a reused save plan is reached over a tensor made with device="cuda"',
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/dist_checkpointing/strategies/state_dict_saver.py",
    make=on_cpu,
)
