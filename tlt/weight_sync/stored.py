"""Weights of a Megatron checkpoint (torch_dist) as Hugging Face tensors, layer by layer, without a model in memory.

A checkpoint has each parameter whole, under Transformer Engine's names whatever layers wrote it; those of all layers
are one array with a first axis of layers, and those of all experts have a second axis of experts.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from tlt.config.architecture import experts_of
from tlt.weight_sync.names import Weight, query_groups, unshard, weight_table


class Slabs(DefaultLoadPlanner):
    """Puts what is read into `tensors`, by the array it is a part of."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.tensors = tensors

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self.tensors[read_item.dest_index.fqn]
        for dim, (begin, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, begin, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It was read in place."""


class StoredWeights:
    """A checkpoint opened for reading; its list of arrays is read once."""

    def __init__(self, checkpoint: Path, hf_config: dict, *, dtype: torch.dtype):
        self.checkpoint = checkpoint
        self.hf_config = hf_config
        self.dtype = dtype
        self.reader = FileSystemReader(checkpoint)
        metadata = self.reader.read_metadata()
        self.reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.arrays = metadata.state_dict_metadata

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor) of the whole model; the parameters of one layer exist at a time.

        Raises ValueError where the checkpoint is not one of this model.
        """
        groups = query_groups(self.hf_config)
        table = weight_table(self.hf_config, transformer_engine=True)
        for _, weights in groupby(table, key=lambda weight: weight.stage_layer):
            own = list(weights)
            for weight, tensor in zip(own, self._read(own), strict=True):
                yield from zip(weight.hf_names, unshard(weight, [tensor], groups=groups), strict=True)

    def _read(self, weights: list[Weight]) -> list[torch.Tensor]:
        """Parameters of one layer, or those outside of all layers."""
        tensors, items = {}, []
        keys = [self._key(weight) for weight in weights]
        for weight, key in zip(weights, keys, strict=True):
            if key in tensors:  # of another expert
                continue
            slab = self._slab(weight, key)
            tensors[key] = torch.empty(slab.sizes, dtype=self.dtype)
            items += create_read_items_for_chunk_list(key, self.arrays[key], [slab])
        self.reader.read_data(LoadPlan(items), Slabs(tensors)).wait()
        return [_part(weight, tensors[key]) for weight, key in zip(weights, keys, strict=True)]

    def _key(self, weight: Weight) -> str:
        """Name of the array that the parameter is a part of."""
        key = weight.name.replace(f"layers.{weight.stage_layer}.", "layers.", 1)
        if weight.expert is None:
            return key
        return key.replace("mlp.experts.", "mlp.experts.experts.", 1).removesuffix(str(weight.expert))

    def _slab(self, weight: Weight, key: str) -> ChunkStorageMetadata:
        """What of the array is of its layer, all experts' parts where there are any."""
        own = (sum(shape[0] for shape in weight.hf_shapes), *weight.hf_shapes[0][1:])
        layer, num_layers = weight.stage_layer, self.hf_config["num_hidden_layers"]
        is_in_layer = 0 <= layer < num_layers
        if weight.expert is not None:
            own = (experts_of(self.hf_config).num, *own)
        whole = (num_layers, *own) if is_in_layer else own
        found = self.arrays.get(key)
        if found is None or tuple(found.size) != whole:
            has = "no such array" if found is None else f"one of {tuple(found.size)}"
            raise ValueError(f"{self.checkpoint}: {key} should be an array of {whole} for this model, there is {has}")
        offset, sizes = ((layer,), (1, *own)) if is_in_layer else ((), own)
        return ChunkStorageMetadata(offsets=torch.Size((*offset, *(0 for _ in own))), sizes=torch.Size(sizes))


def _part(weight: Weight, slab: torch.Tensor) -> torch.Tensor:
    """The parameter in what was read of its layer."""
    if weight.expert is not None:
        return slab[0, weight.expert]
    return slab.flatten(0, slab.ndim - len(weight.hf_shapes[0]))
