"""The dispatcher of a mixture of experts' tokens waits for its CUDA stream before it reads counts on the host. On a
CPU they are there.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_moe_synchronize",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
    source_sha256=("306811df7107",),
    reason="the dispatcher of experts' tokens waits for a CUDA stream before it reads counts",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/transformer/moe/token_dispatcher.py",
    make=on_cpu,
)
