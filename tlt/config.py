"""Configuration: one frozen dataclass per component. Fields become flags (arguments.py), docstrings their help.

Groups without a prefix use Megatron's own flag names and meanings.
"""

import os
from dataclasses import dataclass
from typing import Literal


def require(condition: bool, flag: str, got: object, allowed: str) -> None:
    """Raise a ValueError that names the flag, what it got and what is allowed."""
    if not condition:
        raise ValueError(f"{flag} must be {allowed}, got {got!r}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Flags without a prefix: the run as a whole."""

    train_iters: int = 100
    """Iterations to train in all, counted from the start of the run, resumed or not."""
    seed: int = 1234
    """Seed of the data order and of every sampled token; a run is reproducible from it."""
    save: str
    """Folder of the run: checkpoints, metrics.jsonl, trace/, tensorboard/ and run.json are written here."""
    load: str | None = None
    """Folder of a run to resume from (its latest complete checkpoint); None starts from --hf-model. Resumes nothing
    and starts afresh, saying so, if the folder has no checkpoint yet."""
    save_interval: int = 0
    """Iterations between checkpoints; 0 saves only at the end and when interrupted."""
    save_retain: int = 2
    """Checkpoints kept in --save; older ones are deleted after a newer one is complete."""
    tensorboard_dir: str | None = None
    """Folder of TensorBoard events; None means <save>/tensorboard."""
    distributed_timeout_minutes: int = 10
    """Minutes until a collective that a rank does not reach raises instead of waiting on."""
    dry_run: bool = False
    """Check the configuration, print it and stop before any model is built."""

    def __post_init__(self):
        require(self.train_iters >= 0, "--train-iters", self.train_iters, "at least 0")
        require(0 <= self.seed < 2**31, "--seed", self.seed, "between 0 and 2**31 - 1")
        require(self.save_interval >= 0, "--save-interval", self.save_interval, "at least 0 iterations")
        require(self.save_retain >= 1, "--save-retain", self.save_retain, "at least 1 checkpoint")
        require(
            self.distributed_timeout_minutes >= 1,
            "--distributed-timeout-minutes",
            self.distributed_timeout_minutes,
            "at least 1 minute",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Flags without a prefix: the policy model and its layout over ranks."""

    hf_model: str
    """Hugging Face directory (config.json, *.safetensors, tokenizer) of the initial policy: Llama, Qwen2/2.5 or Qwen3
    dense; also what the rollout engine is built from."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer of the policy; divides heads, key-value heads and vocabulary."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the policy's layers in stages; divides the number of layers."""
    sequence_parallel: bool = False
    """Split activations of norms along the sequence over tensor-parallel ranks (GPU)."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; auto takes Transformer Engine on GPU where installed, else local."""
    bf16: bool = True
    """bf16 model with fp32 master weights; --no-bf16 is fp32 throughout."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, core attention (selective), or whole layers (full)."""
    max_tokens_per_micro_batch: int = 4096
    """Packed tokens of one forward and backward pass (sequences are never split: raised to the longest one)."""

    def __post_init__(self):
        for flag in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "max_tokens_per_micro_batch"):
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
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""

    def __post_init__(self):
        for flag in ("lr", "min_lr", "weight_decay", "clip_grad", "lr_warmup_iters"):
            value = getattr(self, flag)
            require(value >= 0, "--" + flag.replace("_", "-"), value, "at least 0")
        for flag in ("adam_beta1", "adam_beta2"):
            value = getattr(self, flag)
            require(0 <= value < 1, "--" + flag.replace("_", "-"), value, "in [0, 1)")
        require(self.adam_eps > 0, "--adam-eps", self.adam_eps, "above 0")
        require(self.min_lr <= self.lr, "--min-lr", self.min_lr, f"at most --lr ({self.lr})")


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Flags --rl-*: GRPO and its loss (equations in docs/algorithm.md)."""

    prompts_per_iteration: int = 8
    """Prompts (groups) of one iteration."""
    group_size: int = 8
    """Responses sampled per prompt."""
    optimizer_steps: int = 1
    """Optimizer steps of one iteration; its groups are split evenly over them."""
    advantage_std: bool = True
    """Divide a group's centred rewards by their standard deviation (GRPO); --no-rl-advantage-std leaves them
    (Dr.GRPO)."""
    loss_aggregation: Literal["token-mean", "sequence-mean-token-mean", "dr-grpo"] = "token-mean"
    """Denominator of the loss: all response tokens (DAPO); each response's own length, then the mean over responses
    (GRPO); --rollout-max-response-tokens times the number of responses (Dr.GRPO)."""
    clip_low: float = 0.2
    """Probability ratios below 1 - this are clipped."""
    clip_high: float = 0.2
    """Probability ratios above 1 + this are clipped; larger than --rl-clip-low is clip-higher (DAPO)."""
    dual_clip: float | None = None
    """Bound on ratio x |advantage| for negative advantages (at least 1; usual 3.0); None turns it off."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the reference policy (the initial one) in the loss; 0 builds no reference policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token KL estimator (Schulman's k1, k2, k3)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, in nats per token."""
    importance_sampling_cap: float | None = 2.0
    """Cap of exp(old logprob - rollout logprob), which corrects the mismatch of trainer and engine (truncated
    importance sampling); None does not correct."""
    drop_equal_groups: bool = False
    """Leave out groups whose rewards are all equal: they have no gradient (DAPO's dynamic sampling)."""
    refill_rounds: int = 0
    """Further rounds in which new prompts are sampled in place of groups of equal reward, at most; needs
    --rl-drop-equal-groups (DAPO's dynamic sampling)."""
    overlong_buffer_tokens: int = 0
    """Tokens before --rollout-max-response-tokens over which the reward falls linearly by --rl-overlong-penalty
    (DAPO's soft overlong punishment); 0 turns it off."""
    overlong_penalty: float = 1.0
    """Reward lost by a response of --rollout-max-response-tokens."""

    def __post_init__(self):
        for flag in ("prompts_per_iteration", "group_size", "optimizer_steps"):
            value = getattr(self, flag)
            require(value >= 1, "--rl-" + flag.replace("_", "-"), value, "at least 1")
        require(
            self.optimizer_steps <= self.prompts_per_iteration,
            "--rl-optimizer-steps",
            self.optimizer_steps,
            f"at most --rl-prompts-per-iteration ({self.prompts_per_iteration})",
        )
        require(0 <= self.clip_low <= 1, "--rl-clip-low", self.clip_low, "in [0, 1]")
        require(self.clip_high >= 0, "--rl-clip-high", self.clip_high, "at least 0")
        require(self.dual_clip is None or self.dual_clip >= 1, "--rl-dual-clip", self.dual_clip, "at least 1")
        require(
            self.refill_rounds == 0 or (self.refill_rounds > 0 and self.drop_equal_groups),
            "--rl-refill-rounds",
            self.refill_rounds,
            "0, or above 0 together with --rl-drop-equal-groups",
        )
        for flag in ("overlong_buffer_tokens", "overlong_penalty"):
            value = getattr(self, flag)
            require(value >= 0, "--rl-" + flag.replace("_", "-"), value, "at least 0")
        require(self.kl_coef >= 0, "--rl-kl-coef", self.kl_coef, "at least 0")
        require(
            self.importance_sampling_cap is None or self.importance_sampling_cap > 0,
            "--rl-importance-sampling-cap",
            self.importance_sampling_cap,
            "above 0",
        )


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
    save_interval: int = 0
    """Iterations between which all responses with their probabilities are written to <save>/rollouts; 0 writes
    none."""
    enforce_eager: bool = False
    """Run the engine without CUDA graphs (GPU; a CPU engine always does)."""

    def __post_init__(self):
        for flag in ("tensor_parallel_size", "max_response_tokens", "max_num_seqs", "kv_cache_gib"):
            value = getattr(self, flag)
            require(value >= 1, "--rollout-" + flag.replace("_", "-"), value, "at least 1")
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


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Flags --data-*: problems to train on."""

    train: tuple[str, ...]
    """Sources of training problems, each `reasoning-gym:<task>` or `reasoning-gym:<task>:<JSON configuration>` or
    `jsonl:<file>`; several are mixed by --data-weights."""
    weights: tuple[float, ...] | None = None
    """Share of each source of --data-train (normalised), in training and among held-out problems; None mixes
    evenly."""
    exclude: tuple[str, ...] | None = None
    """JSONL files whose questions are neither trained on nor held out, for instance those of a cold start."""
    instruction: str = ""
    """Text appended to every question."""
    chat_template: bool = True
    """Put the question through the tokenizer's chat template; --no-data-chat-template uses it as it is."""

    def __post_init__(self):
        require(len(self.train) > 0, "--data-train", self.train, "at least one source")
        if self.weights is not None:
            require(
                len(self.weights) == len(self.train),
                "--data-weights",
                self.weights,
                f"one number per source of --data-train ({len(self.train)})",
            )
            require(min(self.weights) > 0, "--data-weights", self.weights, "positive numbers")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Flags --eval-*: held-out problems, answered greedily and, on request, sampled as in training."""

    sources: tuple[str, ...] | None = None
    """Sources of held-out problems, written as in --data-train; None holds out problems of --data-train. Training
    never draws a problem whose question is held out."""
    num_prompts: int = 64
    """Held-out problems; 0 turns evaluation off."""
    num_samples: int = 0
    """Responses to each held-out problem sampled with the rollout's own distribution, beside the greedy one."""
    interval: int = 0
    """Iterations between evaluations; 0 evaluates before the first and after the last iteration only."""

    def __post_init__(self):
        require(self.num_prompts >= 0, "--eval-num-prompts", self.num_prompts, "at least 0")
        require(self.num_samples >= 0, "--eval-num-samples", self.num_samples, "at least 0")
        require(self.interval >= 0, "--eval-interval", self.interval, "at least 0 iterations")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Flags --reward-*: the processes that score responses."""

    workers: int = 1
    """Scoring processes of each rollout replica."""
    timeout_s: float = 10.0
    """Seconds after which the scoring of one response is stopped and counted as reward 0."""

    def __post_init__(self):
        require(self.workers >= 1, "--reward-workers", self.workers, "at least 1")
        require(self.timeout_s > 0, "--reward-timeout-s", self.timeout_s, "above 0 seconds")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is made of; components get their own part, never this."""

    training: TrainingConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    rl: RLConfig
    rollout: RolloutConfig
    data: DataConfig
    eval: EvalConfig
    reward: RewardConfig


def check_policy_layout(model: ModelConfig, *, world_size: int, hf_config: dict) -> None:
    """The policy's layout against world and model. `hf_config` is the model's config.json."""
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    flag = "--tensor-model-parallel-size"
    require(
        world_size % (tp * pp) == 0,
        f"{flag} x --pipeline-model-parallel-size",
        tp * pp,
        f"a divisor of the world size ({world_size} ranks)",
    )
    heads = hf_config["num_attention_heads"]
    kv_heads = hf_config.get("num_key_value_heads") or heads
    layers, vocabulary = hf_config["num_hidden_layers"], hf_config["vocab_size"]
    require(heads % tp == 0, flag, tp, f"a divisor of the model's {heads} attention heads")
    require(kv_heads % tp == 0, flag, tp, f"a divisor of the model's {kv_heads} key-value heads")
    require(vocabulary % tp == 0, flag, tp, f"a divisor of the model's vocabulary of {vocabulary}")
    require(layers % pp == 0, "--pipeline-model-parallel-size", pp, f"a divisor of the model's {layers} layers")


def check(config: RunConfig, *, world_size: int, hf_config: dict) -> None:
    """Cross-component checks, before any process group exists. `hf_config` is the model's config.json."""
    rollout = config.rollout
    check_policy_layout(config.model, world_size=world_size, hf_config=hf_config)
    flag, size = "--rollout-tensor-parallel-size", rollout.tensor_parallel_size
    require(world_size % size == 0, flag, size, f"a divisor of the world size ({world_size} ranks)")
    heads = hf_config["num_attention_heads"]
    require(heads % size == 0, flag, size, f"a divisor of the model's {heads} attention heads")
    context = hf_config["max_position_embeddings"]
    if rollout.max_model_len is not None:
        require(
            rollout.max_model_len <= context,
            "--rollout-max-model-len",
            rollout.max_model_len,
            f"at most the model's context of {context} tokens",
        )
        context = rollout.max_model_len
    require(
        config.rl.overlong_buffer_tokens < rollout.max_response_tokens,
        "--rl-overlong-buffer-tokens",
        config.rl.overlong_buffer_tokens,
        f"below --rollout-max-response-tokens ({rollout.max_response_tokens})",
    )
    require(
        rollout.max_response_tokens < context,
        "--rollout-max-response-tokens",
        rollout.max_response_tokens,
        f"below the context length of {context} tokens",
    )


def read_hf_config(folder: str) -> dict:
    """The model's config.json; a ValueError names what is missing."""
    import json

    path = os.path.join(folder, "config.json")
    require(os.path.isdir(folder), "--hf-model", folder, "an existing directory")
    require(os.path.isfile(path), "--hf-model", folder, "a Hugging Face model directory (config.json is missing)")
    with open(path) as file:
        config = json.load(file)
    supported = ("llama", "qwen2", "qwen3")
    require(
        config.get("model_type") in supported,
        "--hf-model",
        f"{folder} (model_type {config.get('model_type')!r})",
        f"a model of type {', '.join(supported)}",
    )
    return config
