"""The dispatcher of a mixture of experts' tokens copies counts to the host on a CUDA stream of its own, which it makes
even where counts are on the host. A CPU has one order of things, so its streams wait for nothing.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_moe_dispatcher",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.transformer.moe.token_dispatcher:MoEAlltoAllTokenDispatcher.__init__",
    source_sha256=("dfafd17183db",),
    reason="the dispatcher of experts' tokens makes a CUDA stream",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/transformer/moe/token_dispatcher.py",
    make=on_cpu,
)
