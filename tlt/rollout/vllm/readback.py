"""Reads weights back out of a live engine, to prove that it holds what the policy sent.

On CPU the engine packs a linear layer's weight and frees the original, so the weight is read by what the layer does:
a row of the identity in gives one column of the weight out, exactly (one product, the rest zeros).
"""

from dataclasses import dataclass

import torch
from torch import nn

from tlt.rollout.vllm import experts

COLUMNS_READ = 8
"""Columns read of a packed linear layer, spread over its width."""

FUSED = {
    "q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
}  # fmt: skip
ROW_PARALLEL = ("o_proj", "down_proj")
VOCABULARY = ("embed_tokens", "lm_head")
ROUTER = "gate"


@dataclass(frozen=True, kw_only=True)
class OwnPart:
    """What a rank's engine is to hold of a weight, as far as it is read back: a share of a full tensor's memory."""

    values: torch.Tensor  # [rows, columns], or the rank's part itself where it is no linear layer's matrix
    width: int | None
    """Inputs of the linear layer on this rank, of which `columns_read` are compared; None where it is none."""


def own_part(model: nn.Module, name: str, sent: torch.Tensor, *, tp_rank: int, tp_size: int) -> OwnPart:
    """A copy of what is compared of the full tensor `sent` under its Hugging Face name."""
    if (weight := experts.located(model, name)) is not None:
        return OwnPart(values=weight.own_part(sent, tp_rank=tp_rank, tp_size=tp_size), width=None)
    module, leaf, own, part = _located(model, name)
    found, is_matrix = sent, False
    if own in VOCABULARY:
        begin, end = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
        found, is_matrix = sent[begin:end], own == "lm_head"
    elif own in ROW_PARALLEL:
        found, is_matrix = sent.chunk(tp_size, dim=1)[tp_rank], True
    elif own == ROUTER:
        is_matrix = True
    elif part is not None:
        found, is_matrix = _rows_of(sent, module.output_partition_sizes[part], tp_rank, tp_size), leaf != "bias"
    if not is_matrix:
        return OwnPart(values=found.clone(), width=None)
    width = found.shape[1]
    return OwnPart(values=found[:, columns_read(width)], width=width)


def mismatch(model: nn.Module, name: str, expected: OwnPart) -> str | None:
    """What differs between the live engine's part of a weight and what it is to be."""
    values = expected.values.to(next(model.parameters()).device)
    if (weight := experts.located(model, name)) is not None:
        return None if weight.holds(values) else f"{name}: values differ"
    module, leaf, own, part = _located(model, name)
    begin = 0 if part is None else sum(module.output_partition_sizes[:part])
    rows = slice(begin, begin + len(values))
    if expected.width is None:
        live = getattr(module, leaf).data
        if part is not None or own in VOCABULARY:  # fused with others, or padded
            live = live[rows]
        return None if torch.equal(live, values.to(live.dtype)) else f"{name}: values differ"
    for index, (column, live) in enumerate(_columns(module, expected.width).items()):
        if not torch.equal(live[rows], values[:, index].to(live.dtype)):
            return f"{name}: column {column} differs"
    return None


def _located(model: nn.Module, name: str) -> tuple[nn.Module, str, str, int | None]:
    """(engine's module, attribute, own name, index among what is fused) of a weight; None where nothing is fused."""
    path, _, leaf = name.rpartition(".")
    parent, _, own = path.rpartition(".")
    fused, part = FUSED.get(own, (own, None))
    return model.get_submodule(f"{parent}.{fused}" if parent else fused), leaf, own, part


def _rows_of(sent: torch.Tensor, rows: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """This rank's rows of a column-parallel weight; key and value heads may be shared by several ranks."""
    replicas = max(1, rows * tp_size // sent.shape[0])
    index = tp_rank // replicas
    return sent[index * rows : (index + 1) * rows]


def columns_read(width: int) -> list[int]:
    """Of a linear layer of so many inputs."""
    return sorted({round(step * (width - 1) / (COLUMNS_READ - 1)) for step in range(COLUMNS_READ)})


def _columns(module: nn.Module, width: int) -> dict[int, torch.Tensor]:
    """Some columns of a linear layer's weight as it computes with it, by column index: [rows] each.

    The layer's parameter is not looked at: on CPU it is gone, or stays behind when what it computes with is a packed
    copy.
    """
    columns = columns_read(width)
    parameter = next(module.parameters())
    probes = torch.zeros(len(columns), width, dtype=parameter.dtype, device=parameter.device)
    for row, column in enumerate(columns):
        probes[row, column] = 1.0
    outputs = module.quant_method.apply(module, probes, None)
    return dict(zip(columns, outputs, strict=True))
