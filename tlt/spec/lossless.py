"""Refuses engine settings under which a response would not have the policy's distribution, or under which the engine
would not be the one that weights are sent to and drafts are made in."""

from collections.abc import Mapping

BY_REASON = {
    "the engine would compute with other weights than the policy's, or round them otherwise": (
        "quantization", "quantization_config", "allow_deprecated_quantization", "load_format", "model_weights",
        "ignore_patterns", "revision", "weight_transfer_config", "enable_lora", "max_loras", "max_lora_rank",
        "default_mm_loras", "fully_sharded_loras", "max_cpu_loras", "lora_dtype", "lora_target_modules",
    ),
    "keys and values would be rounded as the policy's are not": ("kv_cache_dtype", "kv_cache_dtype_skip_layers"),
    "the model would be another one than the policy; it is what --hf-model says": (
        "hf_overrides", "hf_config_path", "config_format", "model_class_overrides", "model_impl", "runner", "convert",
        "pooler_config", "disable_sliding_window",
    ),
    "it may run code of the model's folder": ("trust_remote_code", "code_revision"),
    "prompts are made with the tokenizer of --hf-model": (
        "tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init",
    ),
    "the trainer has no such distribution": (
        "generation_config", "override_generation_config", "watermark_config", "diffusion_config", "reasoning_config",
        "reasoning_parser", "enable_trace_replay", "bad_words", "logits_processors",
    ),
    "drafters are configured by --spec-* and are verified by this project's own sampler": (
        "speculative_config", "spec_method", "spec_model", "spec_tokens",
    ),
    "each engine is one replica, whose ranks are those of --rollout-tensor-parallel-size": (
        "pipeline_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size", "nnodes",
        "node_rank", "master_addr", "master_port",
    ),
    "weights are sent to experts that each rank has a part of, in their order": (
        "enable_expert_parallel", "enable_eplb", "eplb_config", "enable_elastic_ep",
    ),
    "speculation and sampling are installed in vLLM's own": (
        "worker_cls", "worker_extension_cls", "scheduler_cls", "enable_batch_sharded_sampling",
    ),
    "what drafters keep of a token lies where its keys and values are": (
        "kv_transfer_config", "kv_offloading_size", "kv_offloading_backend",
    ),
}  # fmt: skip
REFUSED = {name: reason for reason, names in BY_REASON.items() for name in names} | {
    "rejection_sample_method": "vLLM's `synthetic` and `fly` accept drafts that the policy would not have drawn; "
    "verification is this project's own (tlt/spec/verification.py)",
    "synthetic_acceptance_rates": "acceptance would be invented",
    "synthetic_acceptance_length": "acceptance would be invented",
    "typical_acceptance": "typical acceptance keeps drafts by a threshold, not by their probability",
    "posterior_threshold": "typical acceptance keeps drafts by a threshold, not by their probability",
    "posterior_alpha": "typical acceptance keeps drafts by a threshold, not by their probability",
    "min_p": "the trainer has no such distribution, and vLLM does not verify drafts under it",
    "logit_bias": "the trainer has no such distribution, and vLLM does not verify drafts under it",
    "presence_penalty": "the distribution would depend on the text so far in a way that the trainer does not know",
    "frequency_penalty": "the distribution would depend on the text so far in a way that the trainer does not know",
    "repetition_penalty": "the distribution would depend on the text so far in a way that the trainer does not know",
    "async_scheduling": "the strategy of an engine step is decided between steps",
    "data_parallel_size": "vLLM switches adaptive speculation off; replicas are engines of their own",
}
"""Setting of vLLM -> why it is refused."""


HARMLESS = {
    "kv_cache_dtype": ("auto",),
    "load_format": ("auto", "safetensors", "fastsafetensors"),  # the same weights, read otherwise
    "generation_config": ("auto", "vllm"),  # each request has its own settings
    "pipeline_parallel_size": (1,), "data_parallel_size": (1,),
}  # fmt: skip
"""Values under which a setting changes nothing."""


def refuse_lossy(settings: Mapping[str, object], flag: str) -> None:
    """Raises ValueError naming the flag, the setting and the reason."""
    for name in settings:
        if name in REFUSED and settings[name] not in HARMLESS.get(name, ()):
            raise ValueError(f"{flag} must not set {name} (got {settings[name]!r}): {REFUSED[name]}")
