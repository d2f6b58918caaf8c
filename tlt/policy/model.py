"""Megatron GPTModel from a Hugging Face config: Llama, Qwen2/2.5, Qwen3 and Qwen3-MoE.

Shapes: T packed tokens, N response tokens, H hidden, V_tp vocabulary shard. Megatron's activations are [T, 1, H];
converted here.
"""

import importlib.util
import logging
from dataclasses import replace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import unwrap_model

from tlt.config import ModelConfig
from tlt.config.architecture import Experts, experts_of, has_qk_norms, head_dim, supported_rope
from tlt.parallel import Parallel
from tlt.policy.attention import PackedAttention, fastest_kernel, packed_bounds
from tlt.types import PackedMicroBatch

logger = logging.getLogger(__name__)


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Resolve --transformer-impl on this machine. Raises ValueError where it asks for what is not there.

    In float32 the local layers compute: Transformer Engine multiplies in TF32, and attends without its fast kernels.
    """
    is_there = importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available() and model.bf16
    if model.transformer_impl == "transformer_engine" and not is_there:
        raise ValueError(
            "--transformer-impl transformer_engine needs a GPU, the package transformer-engine and --bf16; use local "
            "or auto"
        )
    return model.transformer_impl != "local" and is_there


def transformer_config(hf_config: dict, model: ModelConfig) -> TransformerConfig:
    """Megatron's config of the same network; no fusion that only CUDA has."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    experts = experts_of(hf_config)
    attention_bias = bool(hf_config.get("attention_bias", False))
    if attention_bias and hf_config["model_type"] != "qwen2":
        raise ValueError("--hf-model: attention_bias is supported for qwen2 only (there on q, k and v)")
    return TransformerConfig(
        num_layers=hf_config["num_hidden_layers"],
        hidden_size=hf_config["hidden_size"],
        ffn_hidden_size=hf_config["intermediate_size"],
        num_attention_heads=hf_config["num_attention_heads"],
        num_query_groups=hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"],
        kv_channels=head_dim(hf_config),
        normalization="RMSNorm",
        layernorm_epsilon=hf_config["rms_norm_eps"],
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=hf_config["model_type"] == "qwen2",
        qk_layernorm=has_qk_norms(hf_config),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=model.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        sequence_parallel=model.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # the default is refused with variable lengths, even in a dense model
        batch_p2p_comm=False,
        # Losses arrive normalised over the whole optimizer step (rl/train_batch.py): Megatron must sum, not average.
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        # Every weight is loaded, but initialisation marks sharded parameters, and the gradient norm needs the marks.
        perform_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        recompute_granularity=None if model.recompute_granularity == "none" else model.recompute_granularity,
        recompute_method="uniform" if model.recompute_granularity == "full" else None,
        recompute_num_layers=1 if model.recompute_granularity == "full" else None,
        **({} if experts is None else expert_settings(experts, model)),
    )


def expert_settings(experts: Experts, model: ModelConfig) -> dict:
    """Fields of Megatron's config. No loss balances the experts: the policy's objective is the user's, and responses
    come from an engine that routes as it learned to."""
    return {
        "num_moe_experts": experts.num,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.width,
        # The softmax of the chosen logits is that of all of them, made to add up to 1.
        "moe_router_pre_softmax": not experts.renormalizes,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": uses_transformer_engine(model),
        "expert_model_parallel_size": model.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
    }


def block_spec(
    config: TransformerConfig, *, transformer_engine: bool, device: torch.device
) -> ModuleSpec | TransformerBlockSubmodules:
    """A stage's layers: Transformer Engine's on GPU, or Megatron's local ones with packed attention."""
    if transformer_engine:
        logger.info("policy: Transformer Engine's layers")
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    if device.type == "cuda":
        logger.info("policy: Megatron's local layers; Transformer Engine is absent or not asked for")
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    attention = spec.submodules.self_attention
    core = ModuleSpec(module=PackedAttention, params={"kernel": fastest_kernel(config, device)})
    norms = {"q_layernorm": PolicyNorm, "k_layernorm": PolicyNorm} if config.qk_layernorm else {}
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=core, **norms))
    stored_names = dict(spec.submodules.sharded_state_dict_keys_map)
    if config.num_moe_experts is not None:  # Transformer Engine fuses this norm with a dense layer only
        del stored_names["pre_mlp_layernorm."]
    layer = replace(
        spec.submodules,
        input_layernorm=PolicyNorm,
        pre_mlp_layernorm=PolicyNorm,
        self_attention=attention,
        sharded_state_dict_keys_map=stored_names,
    )
    layers = [replace(spec, submodules=layer)] * (config.num_layers // config.pipeline_model_parallel_size)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=PolicyNorm)


class PolicyNorm:
    """torch's RMSNorm. Megatron's own wrapper of it refuses sequence parallelism, under which each rank has the
    gradient of its part of the tokens and Megatron adds those of marked weights."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> torch.nn.RMSNorm:
        norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        norm.weight.sequence_parallel = config.sequence_parallel
        return norm


class PolicyModel(GPTModel):
    """GPTModel whose output layer runs on chosen positions only: prompts have no loss, and the vocabulary is wide."""

    output_positions: torch.Tensor | None = None  # [N] positions of the pack; None means all
    transformer_engine = False
    """Whether its layers are Transformer Engine's, whose kernels read the bounds of sequences on the device."""

    def _postprocess(self, hidden_states, *args, **kwargs):
        if self.post_process and self.output_positions is not None:
            hidden_states = hidden_states.index_select(0, self.output_positions)
        return super()._postprocess(hidden_states, *args, **kwargs)


def build_policy_model(hf_config: dict, model: ModelConfig, parallel: Parallel) -> PolicyModel:
    """This rank's stage, with uninitialised weights (`weight_sync/load.py` fills them)."""
    config = transformer_config(hf_config, model)
    rope = supported_rope(hf_config)
    transformer_engine = uses_transformer_engine(model)
    stage = PolicyModel(
        config=config,
        transformer_layer_spec=block_spec(config, transformer_engine=transformer_engine, device=parallel.device),
        vocab_size=hf_config["vocab_size"],
        max_sequence_length=hf_config["max_position_embeddings"],
        pre_process=parallel.pp_rank == 0,
        post_process=parallel.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=bool(hf_config.get("tie_word_embeddings", False)),
        position_embedding_type="rope",
        rotary_base=int(rope["rope_theta"]),
        rope_scaling=rope["rope_type"] == "llama3",
        rope_scaling_factor=rope.get("factor", 8.0),
    )
    stage.transformer_engine = transformer_engine
    for parameter in stage.parameters():
        if not getattr(parameter, "allreduce", True):
            # A whole expert: no two tensor-parallel ranks have the same one, but Megatron leaves what has no mark out
            # of the gradient's norm on all ranks but the first, and Transformer Engine's grouped layers set none.
            parameter.tensor_model_parallel = True
    return stage.to(device=parallel.device, dtype=config.params_dtype)


def forward_packed(model: torch.nn.Module, batch: PackedMicroBatch) -> torch.Tensor:
    """Run a stage on a packed micro-batch.

    On the last stage [N, V_tp]: logits at the positions that predict response tokens; before it Megatron's [T, 1, H].
    """
    stage = unwrap_model(model)
    # With sequence parallelism the hidden states here are one rank's part of the pack: all logits, then choose.
    stage.output_positions = None if stage.config.sequence_parallel else batch.predicting
    bounds = packed_bounds(batch.cu_seqlens, batch.token_ids.device)
    if stage.transformer_engine:
        bounds = replace(bounds, cu_seqlens_q=bounds.device_cu_seqlens, cu_seqlens_kv=bounds.device_cu_seqlens)
    output = model(batch.token_ids[None], batch.position_ids[None], None, packed_seq_params=bounds)
    if not stage.post_process:
        return output
    logits = output[0]  # the last stage puts the batch first: [1, positions, V_tp]
    return logits[batch.predicting] if stage.config.sequence_parallel else logits
