"""Which Megatron parameter is which Hugging Face tensors, and how it is laid out over tensor-parallel ranks.

Pure functions of names and tensors; one table serves loading, weight sync and conversion. Shapes: H hidden, F
feed-forward width, V vocabulary, D head dimension.

Experts are whole (Megatron's expert tensor parallel size is 1): expert-parallel ranks have some of them each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tlt.config.architecture import experts_of, has_qk_norms, head_dim

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
    expert: int | None = None
    """Which of its layer's experts it is of; None where it is of none."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How parameters are dealt out over ranks: layers to pipeline stages, experts to expert-parallel ranks."""

    num_layers: int
    pp_size: int
    num_experts: int = 0
    ep_size: int = 1

    def stage(self, weight: Weight) -> int:
        """Pipeline stage that owns the parameter."""
        if weight.stage_layer < 0:
            return 0
        if weight.stage_layer >= self.num_layers:
            return self.pp_size - 1
        return weight.stage_layer // (self.num_layers // self.pp_size)

    def ep_rank(self, weight: Weight) -> int | None:
        """Expert-parallel rank that owns the parameter; None where all of them have it."""
        return None if weight.expert is None else weight.expert // (self.num_experts // self.ep_size)

    def local_name(self, weight: Weight) -> str:
        """The parameter's name on the rank that owns it, where layers and experts are numbered from 0 again."""
        name = weight.name
        if 0 <= weight.stage_layer < self.num_layers:
            local = weight.stage_layer % (self.num_layers // self.pp_size)
            name = name.replace(f"layers.{weight.stage_layer}.", f"layers.{local}.", 1)
        if weight.expert is None:
            return name
        expert = weight.expert % (self.num_experts // self.ep_size)
        if name.endswith(".weight"):
            return name.replace(f"local_experts.{weight.expert}.", f"local_experts.{expert}.")
        return name.removesuffix(str(weight.expert)) + str(expert)  # Transformer Engine has them in one module


def layout_of(hf_config: dict, *, pp_size: int, ep_size: int) -> Layout:
    """Of a model over that many stages and expert-parallel ranks."""
    experts = experts_of(hf_config)
    return Layout(
        num_layers=hf_config["num_hidden_layers"],
        pp_size=pp_size,
        num_experts=0 if experts is None else experts.num,
        ep_size=ep_size,
    )


def weight_table(hf_config: dict, *, transformer_engine: bool) -> list[Weight]:
    """Every parameter of a Llama, Qwen2, Qwen3 or Qwen3-MoE model, in the order of the forward pass."""
    hidden, experts = hf_config["hidden_size"], experts_of(hf_config)
    heads = hf_config["num_attention_heads"]
    kv_heads, dim = query_groups(hf_config), head_dim(hf_config)
    vocab, num_layers = hf_config["vocab_size"], hf_config["num_hidden_layers"]
    qkv_rows = (heads * dim, kv_heads * dim, kv_heads * dim)

    table = [
        Weight("embedding.word_embeddings.weight", "column", ("model.embed_tokens.weight",), ((vocab, hidden),), -1)
    ]
    for layer in range(num_layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        qkv = tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv")
        input_norm = "self_attention.linear_qkv.layer_norm_weight" if transformer_engine else "input_layernorm.weight"
        has_norm_in_mlp = transformer_engine and experts is None
        mlp_norm = "mlp.linear_fc1.layer_norm_weight" if has_norm_in_mlp else "pre_mlp_layernorm.weight"

        def add(
            name: str, kind: Kind, hf: Sequence[str], shapes: Sequence[tuple[int, ...]], expert: int | None = None,
            layer=layer, ours=ours,
        ):  # fmt: skip
            table.append(Weight(f"{ours}.{name}", kind, tuple(hf), tuple(shapes), layer, expert))

        def add_feed_forward(names: tuple[str, str], theirs: str, width: int, expert: int | None = None, add=add):
            gate_up = [f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"]
            add(names[0], "gate_up", gate_up, [(width, hidden)] * 2, expert)
            add(names[1], "row", [f"{theirs}.down_proj.weight"], [(hidden, width)], expert)

        add(input_norm, "replicated", [f"{theirs}.input_layernorm.weight"], [(hidden,)])
        add("self_attention.linear_qkv.weight", "qkv", [f"{n}.weight" for n in qkv], [(r, hidden) for r in qkv_rows])
        if hf_config["model_type"] == "qwen2":
            add("self_attention.linear_qkv.bias", "qkv", [f"{n}.bias" for n in qkv], [(r,) for r in qkv_rows])
        if has_qk_norms(hf_config):
            add("self_attention.q_layernorm.weight", "replicated", [f"{theirs}.self_attn.q_norm.weight"], [(dim,)])
            add("self_attention.k_layernorm.weight", "replicated", [f"{theirs}.self_attn.k_norm.weight"], [(dim,)])
        add("self_attention.linear_proj.weight", "row", [f"{theirs}.self_attn.o_proj.weight"], [(hidden, heads * dim)])
        add(mlp_norm, "replicated", [f"{theirs}.post_attention_layernorm.weight"], [(hidden,)])
        if experts is None:
            names = ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
            add_feed_forward(names, f"{theirs}.mlp", hf_config["intermediate_size"])
            continue
        add("mlp.router.weight", "replicated", [f"{theirs}.mlp.gate.weight"], [(experts.num, hidden)])
        for expert in range(experts.num):
            names = expert_names(expert, transformer_engine=transformer_engine)
            add_feed_forward(names, f"{theirs}.mlp.experts.{expert}", experts.width, expert)
    table.append(
        Weight("decoder.final_layernorm.weight", "replicated", ("model.norm.weight",), ((hidden,),), num_layers)
    )
    if not hf_config.get("tie_word_embeddings", False):
        table.append(Weight("output_layer.weight", "column", ("lm_head.weight",), ((vocab, hidden),), num_layers))
    return table


def expert_names(expert: int, *, transformer_engine: bool) -> tuple[str, str]:
    """Of its two Megatron parameters, in its layer."""
    if transformer_engine:
        return f"mlp.experts.linear_fc1.weight{expert}", f"mlp.experts.linear_fc2.weight{expert}"
    own = f"mlp.experts.local_experts.{expert}"
    return f"{own}.linear_fc1.weight", f"{own}.linear_fc2.weight"


def query_groups(hf_config: dict) -> int:
    return hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"]


def shard(weight: Weight, tensors: Sequence[torch.Tensor], *, groups: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Full Hugging Face tensors -> this rank's part of the Megatron parameter. `groups`: query groups of the model."""
    if weight.expert is not None:
        tp_rank, tp_size = 0, 1
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
    if weight.expert is not None:
        shards = shards[:1]
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
