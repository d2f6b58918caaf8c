"""Reads weights back out of a live engine, to prove that it holds what the policy sent.

On CPU the engine packs a linear layer's weight and frees the original, so the weight is read by what the layer does:
a row of the identity in gives one column of the weight out, exactly (one product, the rest zeros).
"""

import torch
from torch import nn

COLUMNS_READ = 8
"""Columns read of a packed linear layer, spread over its width."""

FUSED = {
    "q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
}  # fmt: skip
ROW_PARALLEL = ("o_proj", "down_proj")


def mismatch(model: nn.Module, name: str, sent: torch.Tensor, *, tp_rank: int, tp_size: int) -> str | None:
    """What differs between the engine's part of a weight and the full tensor `sent` under its Hugging Face name."""
    path, _, leaf = name.rpartition(".")
    parent, _, own = path.rpartition(".")
    fused, part = FUSED.get(own, (own, None))
    module = model.get_submodule(f"{parent}.{fused}" if parent else fused)
    sent = sent.to(next(model.parameters()).device)
    if own in ("embed_tokens", "lm_head"):
        begin, end = module.shard_indices.org_vocab_start_index, module.shard_indices.org_vocab_end_index
        expected = sent[begin:end]
        live = module.weight.data[: end - begin] if own == "embed_tokens" else _columns(module, sent.shape[1])
    elif own in ROW_PARALLEL:
        expected = sent.chunk(tp_size, dim=1)[tp_rank]
        live = _columns(module, expected.shape[1])
    elif part is not None:
        sizes = module.output_partition_sizes
        begin = sum(sizes[:part])
        expected = _rows_of(sent, sizes[part], tp_rank, tp_size)
        if leaf == "bias":
            live = module.bias.data[begin : begin + sizes[part]]
        else:
            live = _columns(module, sent.shape[1])
            live = {column: values[begin : begin + sizes[part]] for column, values in live.items()}
    else:
        expected, live = sent, getattr(module, leaf).data
    if isinstance(live, torch.Tensor):
        return None if torch.equal(live, expected.to(live.dtype)) else f"{name}: values differ"
    for column, values in live.items():
        if not torch.equal(values[: expected.shape[0]], expected[:, column].to(values.dtype)):
            return f"{name}: column {column} differs"
    return None


def _rows_of(sent: torch.Tensor, rows: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """This rank's rows of a column-parallel weight; key and value heads may be shared by several ranks."""
    replicas = max(1, rows * tp_size // sent.shape[0])
    index = tp_rank // replicas
    return sent[index * rows : (index + 1) * rows]


def _columns(module: nn.Module, width: int) -> dict[int, torch.Tensor]:
    """Some columns of a linear layer's weight as it computes with it, by column index: [rows] each.

    The layer's parameter is not looked at: on CPU it is gone, or stays behind when what it computes with is a packed
    copy.
    """
    columns = sorted({round(step * (width - 1) / (COLUMNS_READ - 1)) for step in range(COLUMNS_READ)})
    parameter = next(module.parameters())
    probes = torch.zeros(len(columns), width, dtype=parameter.dtype, device=parameter.device)
    for row, column in enumerate(columns):
        probes[row, column] = 1.0
    outputs = module.quant_method.apply(module, probes, None)
    return dict(zip(columns, outputs, strict=True))
