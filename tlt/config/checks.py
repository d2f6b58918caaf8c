"""Checks across components and against the model's files, before any process group exists."""

import dataclasses
import os
from pathlib import Path

from tlt.config.architecture import experts_of
from tlt.config.drafter import DrafterConfig
from tlt.config.policy import ModelConfig
from tlt.config.requirement import read_object, require
from tlt.config.run import RunConfig

SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
EXPERTS = ("num_experts_per_tok", "moe_intermediate_size")

NOT_SPOTS = {
    "lr": "at --spot-lr",
    "min_lr_frac": "at a constant --spot-lr",
    "warmup_steps": "after --spot-warmup-steps",
    "ema_decay": "with --spot-ema-decay",
}
"""Fields of DrafterConfig that idle ranks do not follow -> what they do."""
DEFAULTS = {field.name: field.default for field in dataclasses.fields(DrafterConfig)}


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
    check_feed_forward(model, world_size=world_size, hf_config=hf_config)


def check_feed_forward(model: ModelConfig, *, world_size: int, hf_config: dict) -> None:
    """How dense feed-forward layers, or experts, are dealt out."""
    tp, ep = model.tensor_model_parallel_size, model.expert_model_parallel_size
    flag, experts = "--expert-model-parallel-size", experts_of(hf_config)
    if experts is None:
        width = hf_config["intermediate_size"]
        tensor_flag = "--tensor-model-parallel-size"
        require(width % tp == 0, tensor_flag, tp, f"a divisor of the model's feed-forward width of {width}")
        require(ep == 1, flag, ep, f"1: a model of type {hf_config['model_type']} has no experts")
        return
    ranks = world_size // model.pipeline_model_parallel_size
    require(experts.num % ep == 0, flag, ep, f"a divisor of the model's {experts.num} experts")
    require(ranks % ep == 0, flag, ep, f"a divisor of the {ranks} ranks of a pipeline stage")
    # Experts are whole on their ranks, so tensor-parallel ranks have to send them different tokens; and megatron-core
    # adds what they learn from these over all ranks of a stage only where experts are spread over ranks.
    why = f"the model has experts and --tensor-model-parallel-size is {tp}"
    require(tp == 1 or model.sequence_parallel, "--sequence-parallel", "off", f"on: {why}")
    require(tp == 1 or ep > 1, flag, ep, f"at least 2: {why}")


def check(config: RunConfig, *, world_size: int, ranks_per_node: int, hf_config: dict) -> None:
    """Cross-component checks, before any process group exists. `hf_config` is the model's config.json."""
    rollout = config.rollout
    check_policy_layout(config.model, world_size=world_size, hf_config=hf_config)
    flag, size = "--rollout-tensor-parallel-size", rollout.tensor_parallel_size
    require(world_size % size == 0, flag, size, f"a divisor of the world size ({world_size} ranks)")
    heads = hf_config["num_attention_heads"]
    require(heads % size == 0, flag, size, f"a divisor of the model's {heads} attention heads")
    experts = experts_of(hf_config)
    if experts is not None:
        require(experts.width % size == 0, flag, size, f"a divisor of the experts' width of {experts.width}")
    # Ranks of a replica exchange tensors in every layer of every token; on CPUs they do so through shared memory.
    require(ranks_per_node % size == 0, flag, size, f"a divisor of the ranks of a node ({ranks_per_node})")
    context = hf_config["max_position_embeddings"]
    if rollout.max_model_len is not None:
        require(
            rollout.max_model_len <= context,
            "--rollout-max-model-len",
            rollout.max_model_len,
            f"at most the model's context of {context} tokens",
        )
        context = rollout.max_model_len
    check_spot(config)
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


def check_spot(config: RunConfig) -> None:
    """What training of the drafter on idle ranks needs, and what it would not read."""
    for field, instead in NOT_SPOTS.items():
        flag, value, default = "--drafter-" + field.replace("_", "-"), getattr(config.drafter, field), DEFAULTS[field]
        require(value == default, flag, value, f"left at {default}: idle ranks train {instead}")
    if config.spot.training == "off":
        return
    spec, flag = config.spec, "--spot-training on"
    require(bool(spec.drafter), f"{flag}: --spec-drafter", spec.drafter, "the EAGLE head to train")
    require(
        spec.hidden_states_mib > 0,
        f"{flag}: --spec-hidden-states-mib",
        spec.hidden_states_mib,
        "room for its data",
    )
    require(config.rollout.temperature > 0, f"{flag}: --rollout-temperature", config.rollout.temperature, "above 0")
    require(
        config.rollout.top_p == 1 and config.rollout.top_k == 0,
        f"{flag}: --rollout-top-p, --rollout-top-k",
        f"{config.rollout.top_p}, {config.rollout.top_k}",
        "1 and 0: the head learns the whole distribution",
    )


def read_hf_config(folder: str) -> dict:
    """The model's config.json; a ValueError names what is missing, or not what it should be."""
    path = os.path.join(folder, "config.json")
    require(os.path.isdir(folder), "--hf-model", folder, "an existing directory")
    require(os.path.isfile(path), "--hf-model", folder, "a Hugging Face model directory (config.json is missing)")
    config = read_object(Path(path), "--hf-model")
    supported = ("llama", "qwen2", "qwen3", "qwen3_moe")
    require(
        config.get("model_type") in supported,
        "--hf-model",
        f"{folder} (model_type {config.get('model_type')!r})",
        f"a model of type {', '.join(supported)}",
    )
    dense = (config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or [])
    require(
        dense == (1, []),
        f"--hf-model {folder}: decoder_sparse_step, mlp_only_layers",
        dense,
        "1 and []: a mixture of experts in all layers",
    )
    check_shape(config, folder)
    return config


def check_shape(hf_config: dict, folder: str) -> None:
    """That config.json has the numbers that a model is made of."""
    needed = [*SHAPE]
    if hf_config["model_type"] == "qwen3_moe":
        is_renamed = not hf_config.get("num_experts") and "num_local_experts" in hf_config  # as transformers 5 writes
        needed += ["num_local_experts" if is_renamed else "num_experts", *EXPERTS]
    given = [name for name in ("num_key_value_heads", "head_dim") if hf_config.get(name) is not None]
    for name in (*needed, *given):
        value = hf_config.get(name)
        is_count = type(value) is int and value >= 1
        require(is_count, f"--hf-model {folder}: {name} in config.json", value, "a whole number of at least 1")
    epsilon = hf_config.get("rms_norm_eps")
    is_positive = isinstance(epsilon, int | float) and epsilon > 0
    require(is_positive, f"--hf-model {folder}: rms_norm_eps in config.json", epsilon, "a number above 0")
    for name in ("rope_parameters", "rope_scaling"):
        value = hf_config.get(name)
        is_object = value is None or isinstance(value, dict)
        require(is_object, f"--hf-model {folder}: {name} in config.json", value, "an object")
