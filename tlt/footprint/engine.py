"""Bytes that the rollout engine takes on one GPU: its weights, its KV cache, and what drafters keep of each token."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from tlt.config import RolloutConfig
from tlt.config.architecture import experts_of, head_dim
from tlt.footprint.policy import FP32, num_entries, table_of
from tlt.weight_sync.names import query_groups

BATCHED_TOKENS = 16384
"""vLLM's tokens of an engine step, where --rollout-max-num-batched-tokens does not say, on a GPU of 70 GiB or more."""
BLOCK_SIZE = 16
"""Tokens of a block of vLLM's KV cache."""


@dataclass(frozen=True, kw_only=True)
class EngineFootprint:
    """Of one rank of a replica."""

    weights: int
    step: int
    """Activations of its largest step."""
    kv_cache: int
    kv_tokens: int
    """Tokens of all requests that the KV cache has room for."""
    token_pool: int
    """Hidden states and keys of drafters, a slot for each token of the KV cache."""
    drafter_weights: int
    draft_probs: int
    """fp32 probabilities of the present draft's tokens."""
    drafter_trainer: int
    """fp32: a head's weights, their average and Adam's moments; output rows."""
    drafter_step: int
    """What its steps take besides: gradients, these laid together, output rows that take the old ones' place."""


@dataclass(frozen=True, kw_only=True)
class Drafters:
    """What learned drafters take; the default is none."""

    head_parameters: int = 0
    """Of all heads."""
    num_heads: int = 0
    states: Mapping[str, int]
    """Layers whose hidden states are kept of each token, by name (`SpecPlan.kept_states`)."""
    trained_parameters: int = 0
    """Of the head that idle ranks train."""
    trained_rows: int = 0
    """Of the output layer that it is trained with."""
    verified_tokens: int = 0
    """Of a step at most: the last token of each request and its drafts."""
    draft_probs: int = 0
    """Probabilities that heads keep of a draft, entries of all of them."""
    copied_rows: int = 0
    """Of the vocabulary, that ranks keep whole on the host for it."""


def engine_footprint(
    hf_config: dict, rollout: RolloutConfig, drafters: Drafters, *, item_bytes: int, device_bytes: int | None
) -> EngineFootprint:
    """`device_bytes` of the GPU; None is a CPU, whose cache has a size of its own."""
    size = rollout.tensor_parallel_size
    weights = item_bytes * sum(
        num_entries(weight) // (1 if weight.kind == "replicated" else size) for weight in table_of(hf_config)
    )
    plain, step = (
        step_bytes(hf_config, rollout, num_rows=max(rows, rollout.max_num_seqs), item_bytes=item_bytes)
        for rows in (0, drafters.verified_tokens)
    )
    token = kv_token_bytes(hf_config, tp_size=size, item_bytes=item_bytes)
    if rollout.num_gpu_blocks_override is not None:
        kv_cache = rollout.num_gpu_blocks_override * BLOCK_SIZE * token
    elif device_bytes is None:
        kv_cache = rollout.kv_cache_gib * 2**30
    else:
        # vLLM measures a step that verifies nothing: what drafts take comes on top of its share.
        kv_cache = max(int(rollout.gpu_memory_utilization * device_bytes) - weights - plain, 0)
    kv_tokens = kv_cache // token
    rows = drafters.trained_rows * hf_config["hidden_size"]
    return EngineFootprint(
        weights=weights,
        step=step,
        kv_cache=kv_cache,
        kv_tokens=kv_tokens,
        token_pool=kv_tokens * pool_token_bytes(hf_config, drafters, item_bytes=item_bytes),
        drafter_weights=drafters.head_parameters * item_bytes,
        draft_probs=FP32 * drafters.draft_probs,
        drafter_trainer=FP32 * (4 * drafters.trained_parameters + rows),
        drafter_step=FP32 * (2 * drafters.trained_parameters + rows),
    )


def kv_token_bytes(hf_config: dict, *, tp_size: int, item_bytes: int) -> int:
    """Keys and values of one token over all layers; ranks beyond the number of key-value heads have copies."""
    heads = max(query_groups(hf_config) // tp_size, 1)
    return prod((2, hf_config["num_hidden_layers"], heads, head_dim(hf_config), item_bytes))


def pool_token_bytes(hf_config: dict, drafters: Drafters, *, item_bytes: int) -> int:
    """Of one token: its hidden states, and its key and value in each head, whole on every rank of a replica."""
    states = sum(drafters.states.values()) * hf_config["hidden_size"]
    keys = drafters.num_heads * 2 * query_groups(hf_config) * head_dim(hf_config)
    return (states + keys) * item_bytes


def step_bytes(hf_config: dict, rollout: RolloutConfig, *, num_rows: int, item_bytes: int) -> int:
    """Two residual streams and the widest activations of a layer for all tokens of a step; four fp32 rows of the
    vocabulary for each token that is drawn: logits, scaled ones, probabilities, terms of the entropy."""
    num_tokens = rollout.max_num_batched_tokens or BATCHED_TOKENS
    experts = experts_of(hf_config)
    width = hf_config["intermediate_size"] if experts is None else experts.per_token * experts.width
    wide = 3 * width // rollout.tensor_parallel_size
    layer = num_tokens * (4 * hf_config["hidden_size"] + wide) * item_bytes
    return layer + 4 * num_rows * hf_config["vocab_size"] * FP32
