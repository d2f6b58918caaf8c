"""The policy's weights as a Hugging Face directory, which transformers and vLLM load."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from tlt.parallel import Parallel

COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
)
"""What does not change in training."""


def write_hf_directory(
    out: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], *, like: Path, parallel: Parallel
) -> None:
    """Write `out`, complete or not at all, with config and tokenizer of `like`. Collective over all ranks."""
    tensors = {}
    for name, tensor in named_tensors:
        if parallel.rank == 0:
            tensors[name] = tensor.detach().cpu().clone()
    if parallel.rank == 0:
        partial = out.with_name(out.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, str(partial / "model.safetensors"), metadata={"format": "pt"})
        for pattern in COPIED:
            for path in like.glob(pattern):
                shutil.copy(path, partial / path.name)
        partial.rename(out)
    parallel.barrier()
