"""The rollout engines."""

from dataclasses import dataclass
from typing import Literal

from tlt.config.requirement import require


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Flags --rollout-*: the vLLM engines colocated with the policy ranks."""

    tensor_parallel_size: int = 1
    """Ranks of one rollout replica, independent of the policy's layout; divides the world size and the model's
    heads."""
    temperature: float = 1.0
    """Temperature that responses are sampled and trained at."""
    top_p: float = 1.0
    """Nucleus mass that responses are sampled from and trained on."""
    top_k: int = 0
    """Most probable tokens that responses are sampled from and trained on; 0 keeps all."""
    max_response_tokens: int = 256
    """Tokens after which a response is cut."""
    max_model_len: int | None = None
    """Context length in tokens (prompt and response); None takes the model's own."""
    max_num_seqs: int = 64
    """Requests of one engine that decode at the same time."""
    max_num_batched_tokens: int | None = None
    """Tokens of one engine step (longer prompts are prefilled in chunks); None takes vLLM's own."""
    num_gpu_blocks_override: int | None = None
    """Blocks of the KV cache; None sizes it by memory (GPU fraction, or --rollout-kv-cache-gib)."""
    gpu_memory_utilization: float = 0.5
    """Fraction of GPU memory for weights and KV cache of the engine (GPU)."""
    kv_cache_gib: int = 1
    """GiB of host memory for the KV cache of each rank's engine (CPU)."""
    consolidate_tail: Literal["off", "on"] = "off"
    """Move unfinished responses from crowded replicas to those that are done, where measured step times and past
    lengths say that it saves time; responses stay the same."""
    save_interval: int = 0
    """Iterations between which all responses with their probabilities are written to <save>/rollouts; 0 writes
    none."""
    engine_args: str = "{}"
    """JSON object of further arguments of vLLM's engine. What other flags decide, what would change model, weights or
    the distribution of responses, and what vLLM does not have, is refused."""
    enforce_eager: bool = False
    """Run the engine without CUDA graphs (GPU; a CPU engine always does)."""

    def __post_init__(self):
        for flag in ("tensor_parallel_size", "max_response_tokens", "max_num_seqs", "kv_cache_gib"):
            value = getattr(self, flag)
            require(value >= 1, "--rollout-" + flag.replace("_", "-"), value, "at least 1")
        for flag in ("max_model_len", "max_num_batched_tokens", "num_gpu_blocks_override"):
            value = getattr(self, flag)
            require(value is None or value >= 1, "--rollout-" + flag.replace("_", "-"), value, "at least 1")
        require(
            self.temperature > 0,
            "--rollout-temperature",
            self.temperature,
            "above 0: a policy gradient needs the probability of what was sampled",
        )
        require(0 < self.top_p <= 1, "--rollout-top-p", self.top_p, "in (0, 1]")
        require(self.save_interval >= 0, "--rollout-save-interval", self.save_interval, "at least 0 iterations")
        require(self.top_k >= 0, "--rollout-top-k", self.top_k, "at least 0")
        require(
            0 < self.gpu_memory_utilization < 1,
            "--rollout-gpu-memory-utilization",
            self.gpu_memory_utilization,
            "in (0, 1)",
        )
