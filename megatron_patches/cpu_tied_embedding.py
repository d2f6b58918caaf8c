"""With tied embeddings and pipeline stages, first and last stage all-reduce their copies after `weight.data.cuda()`,
which raises without CUDA. During this call `Tensor.cuda` returns the tensor itself: it is where it belongs.

Remove when upstream runs this on a machine without CUDA.
"""

from megatron_patches.cpu_torch import with_cuda_as_identity
from megatron_patches.patch import Patch

PATCH = Patch(
    name="cpu_tied_embedding",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.models.common.language_module.language_module:LanguageModule.setup_embeddings_and_output_layer",
    source_sha256=("005bdd3315b0",),
    reason="tied embeddings on several pipeline stages are moved by Tensor.cuda() before their all-reduce",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/models/common/language_module/language_module.py",
    make=with_cuda_as_identity,
)
