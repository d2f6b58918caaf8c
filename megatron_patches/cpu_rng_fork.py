"""Dropout and initialisation fork a named CUDA generator per tensor-parallel rank. Without CUDA no state can be added
and
`fork` raises. A null context is right where nothing is drawn inside: this project trains with dropout 0 and loads its
weights, and `policy/model.py` sets both.

Remove when upstream runs this on a machine without CUDA.
"""

import contextlib

from megatron_patches.patch import Patch


def make(original):
    def fork(self, name: str = "model-parallel-rng"):
        return contextlib.nullcontext()  # patched: upstream switches CUDA generators

    return fork


PATCH = Patch(
    name="cpu_rng_fork",
    distribution="megatron-core",
    versions=">=0.16.1,<0.17",
    target="megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
    source_sha256=("6821e1e39725",),
    reason="the tracker forks a CUDA generator, which no CPU machine has, and raises that its state was not added",
    upstream="https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/tensor_parallel/random.py",
    make=make,
)
