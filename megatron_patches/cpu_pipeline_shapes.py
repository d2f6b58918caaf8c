"""With variable sequence lengths, stages first send each other shapes and then call `torch.cuda.synchronize()`
against a race of NCCL, which raises without CUDA. Gloo's receives are complete when waited for, so there is nothing to
synchronise.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_pipeline_shapes",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.pipeline_parallel.p2p_communication:P2PCommunicator._communicate_shapes",
    source_sha256=("64129c790b8b",),
    reason="the exchange of shapes between pipeline stages calls torch.cuda.synchronize unconditionally",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/pipeline_parallel/p2p_communication.py",
    make=on_cpu,
)
