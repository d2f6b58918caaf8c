"""Weights of the policy's tensor and pipeline shards as full Hugging Face tensors, streamed; and the way back in."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from tlt.parallel import Parallel
from tlt.weight_sync.hf_directory import INDEX
from tlt.weight_sync.names import Weight, layout_of, query_groups, shard, unshard, weight_table


class PolicyWeights:
    """The weights of one policy model under both naming schemes; `stage` is this rank's unwrapped GPTModel."""

    def __init__(self, stage: torch.nn.Module, hf_config: dict, parallel: Parallel, *, transformer_engine: bool):
        self.hf_config = hf_config
        self.parallel = parallel
        self.groups = query_groups(hf_config)
        self.layout = layout_of(hf_config, pp_size=parallel.pp_size, ep_size=parallel.ep_size)
        self.table = weight_table(hf_config, transformer_engine=transformer_engine)
        self.parameters = dict(stage.named_parameters())
        self._check_complete()

    def is_mine(self, weight: Weight) -> bool:
        has_expert = self.layout.ep_rank(weight) in (None, self.parallel.ep_rank)
        return has_expert and self.layout.stage(weight) == self.parallel.pp_rank

    def _tied_copy(self) -> torch.nn.Parameter | None:
        """The last stage's own copy of tied embeddings, which the table does not list."""
        return None if self._has_output_layer() else self.parameters.get("output_layer.weight")

    def _has_output_layer(self) -> bool:
        return self.table[-1].name == "output_layer.weight"

    def _check_complete(self) -> None:
        """Every parameter of this stage is in the table exactly once; RuntimeError otherwise."""
        expected = {self.layout.local_name(weight) for weight in self.table if self.is_mine(weight)}
        if self._tied_copy() is not None:
            expected.add("output_layer.weight")
        if expected != set(self.parameters):
            raise RuntimeError(
                f"stage {self.parallel.pp_rank}: parameters without a Hugging Face name: "
                f"{sorted(set(self.parameters) - expected)}; names without a parameter: "
                f"{sorted(expected - set(self.parameters))}"
            )

    def hf_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor) of the whole model, the same order on all ranks, one parameter at a time.

        A tensor is valid until the next one is taken; it may be the policy's own memory and is not to be written to.
        Collective over all ranks: tensor-parallel all-gather, then a broadcast to expert-parallel ranks and one to
        pipeline stages; all must consume it.
        """
        for weight in self.table:
            if self.is_mine(weight):
                own = self.parameters[self.layout.local_name(weight)].data
                tensors = unshard(weight, self._all_shards(weight, own), groups=self.groups)
            else:
                like = next(iter(self.parameters.values()))
                tensors = [torch.empty(shape, dtype=like.dtype, device=like.device) for shape in weight.hf_shapes]
            for name, tensor in zip(weight.hf_names, tensors, strict=True):
                self._spread(weight, tensor)
                yield name, tensor

    def _spread(self, weight: Weight, tensor: torch.Tensor) -> None:
        """From the ranks that own the parameter to all others."""
        stage, ep_rank = self.layout.stage(weight), self.layout.ep_rank(weight)
        if ep_rank is not None and self.parallel.ep_size > 1 and stage == self.parallel.pp_rank:
            group = parallel_state.get_expert_model_parallel_group()
            dist.broadcast(tensor, src=dist.get_global_rank(group, ep_rank), group=group)
        if self.parallel.pp_size > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            dist.broadcast(tensor, src=dist.get_global_rank(group, stage), group=group)

    def _all_shards(self, weight: Weight, own: torch.Tensor) -> list[torch.Tensor]:
        if weight.kind == "replicated" or weight.expert is not None or self.parallel.tp_size == 1:
            return [own]
        shards = [torch.empty_like(own) for _ in range(self.parallel.tp_size)]
        dist.all_gather(shards, own.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        return shards

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Fill this rank's parameters from a Hugging Face directory, reading only what this stage needs.

        Raises ValueError naming a tensor that is missing or of another shape than config.json says.
        """
        files = HfDirectory(folder)
        for weight in self.table:
            copies = []
            if self.is_mine(weight):
                copies.append(self.parameters[self.layout.local_name(weight)])
            if weight.name == "embedding.word_embeddings.weight" and self._tied_copy() is not None:
                copies.append(self._tied_copy())
            if not copies:
                continue
            tensors = [files.tensor(n, s) for n, s in zip(weight.hf_names, weight.hf_shapes, strict=True)]
            own = shard(
                weight, tensors, groups=self.groups, tp_rank=self.parallel.tp_rank, tp_size=self.parallel.tp_size
            )
            for parameter in copies:
                parameter.copy_(own)


class HfDirectory:
    """The safetensors of a Hugging Face directory, read tensor by tensor."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self.folder = folder
        self.owner = {}
        for path in weight_files(folder):
            file = safe_open(str(path), framework="pt")
            self.owner |= dict.fromkeys(file.keys(), file)
        if not self.owner:
            raise ValueError(f"--hf-model {folder}: no *.safetensors file in it")

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in self.owner:
            raise ValueError(f"--hf-model {self.folder}: tensor {name} is missing")
        tensor = self.owner[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"--hf-model {self.folder}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}"
            )
        return tensor


def weight_files(folder: Path) -> list[Path]:
    """Those that the directory's index names, or all; ValueError where one of them did not come along."""
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"--hf-model {folder}: {INDEX} names {', '.join(missing)}, which it does not hold")
    return [folder / name for name in names]
