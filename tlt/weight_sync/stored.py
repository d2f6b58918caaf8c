"""Weights of a Megatron checkpoint (torch_dist) as Hugging Face tensors, layer by layer, without a model in memory.

A checkpoint has each parameter whole, under Transformer Engine's names whatever layers wrote it; those of all layers
are one array with a first axis of layers.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from tlt.weight_sync.names import Weight, query_groups, unshard, weight_table


def stored_hf_tensors(
    checkpoint: Path, hf_config: dict, *, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:  # fmt: skip
    """(Hugging Face name, full tensor) of the whole model; a layer's parameters exist at a time.

    torch.distributed must be initialised, with one rank.
    """
    groups, num_layers = query_groups(hf_config), hf_config["num_hidden_layers"]
    table = weight_table(hf_config, transformer_engine=True)
    for _, weights in groupby(table, key=lambda weight: weight.stage_layer):
        own = list(weights)
        state = {weight.name: request(weight, num_layers=num_layers, dtype=dtype) for weight in own}
        # Other layers are not asked for, which Megatron would take for a mistake.
        found = dist_checkpointing.load(state, str(checkpoint), validate_access_integrity=False)
        for weight in own:
            yield from zip(weight.hf_names, unshard(weight, [found[weight.name]], groups=groups), strict=True)


def request(weight: Weight, *, num_layers: int, dtype: torch.dtype) -> ShardedTensor:
    """Where a parameter lies: all of its own array, or its layer's row of the array of all layers."""
    rows = sum(shape[0] for shape in weight.hf_shapes)
    data = torch.empty(rows, *weight.hf_shapes[0][1:], dtype=dtype)
    if not 0 <= weight.stage_layer < num_layers:
        return ShardedTensor.from_rank_offsets(weight.name, data)
    key = weight.name.replace(f"layers.{weight.stage_layer}.", "layers.", 1)
    return ShardedTensor.from_rank_offsets(key, data, (0, weight.stage_layer, num_layers), prepend_axis_num=1)
