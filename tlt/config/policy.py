"""The policy model, its layout over ranks and its optimizer."""

from dataclasses import dataclass
from typing import Literal

from tlt.config.requirement import require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Flags without a prefix: the policy model and its layout over ranks."""

    hf_model: str
    """Hugging Face directory (config.json, *.safetensors, tokenizer) of the initial policy: Llama, Qwen2/2.5, Qwen3 or
    Qwen3-MoE; also what the rollout engine is built from."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer of the policy; divides heads, key-value heads and vocabulary."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the policy's layers in stages; divides the number of layers."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of each mixture-of-experts layer, each having some of them whole; they are also
    data-parallel or tensor-parallel ranks."""
    sequence_parallel: bool = False
    """Split activations of norms along the sequence over tensor-parallel ranks; a mixture of experts needs that."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto takes Transformer Engine on GPU where installed, else local."""
    bf16: bool = True
    """bf16 model with fp32 master weights; --no-bf16 is fp32 throughout."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, core attention (selective), or whole layers (full)."""
    max_tokens_per_micro_batch: int = 4096
    """Packed tokens of one forward and backward pass (sequences are never split: raised to the longest one)."""

    def __post_init__(self):
        for flag in (
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
            "max_tokens_per_micro_batch",
        ):  # fmt: skip
            value = getattr(self, flag)
            require(value >= 1, "--" + flag.replace("_", "-"), value, "at least 1")
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "--sequence-parallel",
            True,
            "off when --tensor-model-parallel-size is 1",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Flags without a prefix: AdamW as in Megatron."""

    lr: float = 1e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the schedule after warm-up, over all optimizer steps of --train-iters."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up from 0."""
    weight_decay: float = 0.0
    """AdamW weight decay (not applied to norms and biases)."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Term added to the denominator."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    max_skipped_steps: int = 3
    """Optimizer steps in a row that may be skipped, each counted (`policy/skipped_steps`), because gradients are not
    finite or --rl-max-logprob-diff is exceeded; one more stops the run."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still computes others."""
    overlap_param_gather: bool = False
    """With the two above: gather a step's parameters while the next step's forward pass computes."""

    def __post_init__(self):
        for flag in ("lr", "min_lr", "weight_decay", "clip_grad", "lr_warmup_iters", "max_skipped_steps"):
            value = getattr(self, flag)
            require(value >= 0, "--" + flag.replace("_", "-"), value, "at least 0")
        for flag in ("adam_beta1", "adam_beta2"):
            value = getattr(self, flag)
            require(0 <= value < 1, "--" + flag.replace("_", "-"), value, "in [0, 1)")
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "--overlap-param-gather",
            True,
            "off without --use-distributed-optimizer and --overlap-grad-reduce",
        )
        require(self.adam_eps > 0, "--adam-eps", self.adam_eps, "above 0")
        require(self.min_lr <= self.lr, "--min-lr", self.min_lr, f"at most --lr ({self.lr})")
