"""The 1F1B schedule keeps its token count in a tensor made with `device="cuda"`, which raises without CUDA. The same
code runs with that tensor on the CPU.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_schedule_pipelining",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.pipeline_parallel.schedules:forward_backward_pipelining_without_interleaving",
    source_sha256=("ecf7d69308cd",),
    reason='the token counter of the 1F1B schedule is allocated with device="cuda"',
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/pipeline_parallel/schedules.py",
    make=on_cpu,
)
