"""Which Megatron parameter is which Hugging Face tensors, and how it is laid out over tensor-parallel ranks.

Pure functions of names and tensors; one table serves loading, weight sync and conversion. Shapes: H hidden, F
feed-forward width, V vocabulary, D head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["replicated", "column", "row", "gate_up", "qkv"]
"""How a parameter is sharded: not at all; rows (output features); columns (input features); rows of gate and of up,
laid one behind the other on each rank; whole query groups, each its query heads, then key, then value."""


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter of the whole model (layers numbered over all pipeline stages)."""

    name: str
    kind: Kind
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    stage_layer: int
    """Layer whose pipeline stage owns it: -1 is the first stage (embedding), num_layers the last (norm, output
    layer)."""


def weight_table(hf_config: dict, *, transformer_engine: bool) -> list[Weight]:
    """Every parameter of a Llama, Qwen2 or Qwen3 model, in the order of the forward pass."""
    hidden, width = hf_config["hidden_size"], hf_config["intermediate_size"]
    heads = hf_config["num_attention_heads"]
    kv_heads = hf_config.get("num_key_value_heads") or heads
    dim = hf_config.get("head_dim") or hidden // heads
    vocab, num_layers = hf_config["vocab_size"], hf_config["num_hidden_layers"]
    qkv_rows = (heads * dim, kv_heads * dim, kv_heads * dim)

    table = [
        Weight("embedding.word_embeddings.weight", "column", ("model.embed_tokens.weight",), ((vocab, hidden),), -1)
    ]
    for layer in range(num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        qkv = tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")
        input_norm = "self_attention.linear_qkv.layer_norm_weight" if transformer_engine else "input_layernorm.weight"
        mlp_norm = "mlp.linear_fc1.layer_norm_weight" if transformer_engine else "pre_mlp_layernorm.weight"

        def add(name: str, kind: Kind, hf: Sequence[str], shapes: Sequence[tuple[int, ...]], layer=layer, ours=ours):
            table.append(Weight(f"{ours}.{name}", kind, tuple(hf), tuple(shapes), layer))

        add(input_norm, "replicated", [f"{theirs}.input_layernorm.weight"], [(hidden,)])
        add("self_attention.linear_qkv.weight", "qkv", [f"{n}.weight" for n in qkv], [(r, hidden) for r in qkv_rows])
        if hf_config["model_type"] == "qwen2":
            add("self_attention.linear_qkv.bias", "qkv", [f"{n}.bias" for n in qkv], [(r,) for r in qkv_rows])
        if hf_config["model_type"] == "qwen3":
            add("self_attention.q_layernorm.weight", "replicated", [f"{theirs}.self_attn.q_norm.weight"], [(dim,)])
            add("self_attention.k_layernorm.weight", "replicated", [f"{theirs}.self_attn.k_norm.weight"], [(dim,)])
        add("self_attention.linear_proj.weight", "row", [f"{theirs}.self_attn.o_proj.weight"], [(hidden, heads * dim)])
        add(mlp_norm, "replicated", [f"{theirs}.post_attention_layernorm.weight"], [(hidden,)])
        gate_up = [f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"]
        add("mlp.linear_fc1.weight", "gate_up", gate_up, [(width, hidden)] * 2)
        add("mlp.linear_fc2.weight", "row", [f"{theirs}.mlp.down_proj.weight"], [(hidden, width)])
    table.append(
        Weight("decoder.final_layernorm.weight", "replicated", ("model.norm.weight",), ((hidden,),), num_layers)
    )
    if not hf_config.get("tie_word_embeddings", False):
        table.append(Weight("output_layer.weight", "column", ("lm_head.weight",), ((vocab, hidden),), num_layers))
    return table


def stage_of(weight: Weight, *, num_layers: int, pp_size: int) -> int:
    """Pipeline stage that owns the parameter."""
    if weight.stage_layer < 0:
        return 0
    if weight.stage_layer >= num_layers:
        return pp_size - 1
    return weight.stage_layer // (num_layers // pp_size)


def local_name(weight: Weight, *, num_layers: int, pp_size: int) -> str:
    """The parameter's name on the stage that owns it, where layers are numbered from 0 again."""
    if not 0 <= weight.stage_layer < num_layers:
        return weight.name
    local = weight.stage_layer % (num_layers // pp_size)
    return weight.name.replace(f"layers.{weight.stage_layer}.", f"layers.{local}.", 1)


def query_groups(hf_config: dict) -> int:
    return hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"]


def shard(weight: Weight, tensors: Sequence[torch.Tensor], *, groups: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Full Hugging Face tensors -> this rank's part of the Megatron parameter. `groups`: query groups of the model."""
    if weight.kind == "replicated":
        return tensors[0]
    if weight.kind == "column":
        return tensors[0].chunk(tp_size, dim=0)[tp_rank]
    if weight.kind == "row":
        return tensors[0].chunk(tp_size, dim=1)[tp_rank]
    if weight.kind == "gate_up":
        return torch.cat([tensor.chunk(tp_size, dim=0)[tp_rank] for tensor in tensors])
    grouped = torch.cat([tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in tensors], dim=1)
    return grouped.chunk(tp_size, dim=0)[tp_rank].flatten(0, 1)


def unshard(weight: Weight, shards: Sequence[torch.Tensor], *, groups: int) -> list[torch.Tensor]:
    """Every rank's part of the Megatron parameter -> full Hugging Face tensors, in the order of `hf_names`."""
    if weight.kind == "replicated":
        return [shards[0]]
    if weight.kind == "column":
        return [torch.cat(list(shards), dim=0)]
    if weight.kind == "row":
        return [torch.cat(list(shards), dim=1)]
    if weight.kind == "gate_up":
        halves = [part.chunk(2, dim=0) for part in shards]
        return [torch.cat([half[index] for half in halves]) for index in (0, 1)]
    grouped = torch.cat([part.reshape(groups // len(shards), -1, *part.shape[1:]) for part in shards])
    rows = [shape[0] // groups for shape in weight.hf_shapes]
    return [part.flatten(0, 1).contiguous() for part in grouped.split(rows, dim=1)]
