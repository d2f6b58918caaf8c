"""The policy's weights as a Hugging Face directory, which transformers and vLLM load; written as they come."""

import json
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
INDEX = "model.safetensors.index.json"
FILE_BYTES = 5 * 10**9
"""Of one safetensors file, as transformers splits them; rank 0 holds one file's tensors at a time."""


def write_hf_directory(
    out: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], *, like: Path, parallel: Parallel
) -> None:
    """Write `out` on rank 0 as `write_directory` does. Collective over all ranks."""
    if parallel.rank == 0:
        write_directory(out, named_tensors, like=like)
    else:
        for _ in named_tensors:  # gathering them takes all ranks
            pass
    parallel.barrier()


def write_directory(
    out: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], *, like: Path, file_bytes: int = FILE_BYTES
) -> None:
    """Write `out`, complete or not at all, with config and tokenizer of `like`."""
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_tensors(partial, named_tensors, file_bytes=file_bytes)
    for pattern in COPIED:
        for path in like.glob(pattern):
            shutil.copy(path, partial / path.name)
    partial.rename(out)


def write_tensors(folder: Path, named_tensors: Iterable[tuple[str, torch.Tensor]], *, file_bytes: int) -> None:
    """Write model.safetensors, or several files of at most `file_bytes` (or one tensor) and their index."""
    files: list[list[str]] = []  # names of the tensors in each
    total = 0
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(pending, str(part(folder, len(files))), metadata={"format": "pt"})
        files.append(list(pending))
        pending.clear()

    for name, tensor in named_tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and sum(each.numel() * each.element_size() for each in pending.values()) + size > file_bytes:
            flush()
        pending[name] = tensor.detach().to("cpu", copy=True)
        total += size
    flush()
    if len(files) == 1:
        part(folder, 0).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for index, names in enumerate(files):
        file = f"model-{index + 1:05}-of-{len(files):05}.safetensors"
        part(folder, index).rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    (folder / INDEX).write_text(text + "\n")


def part(folder: Path, index: int) -> Path:
    """A file whose name waits for the number of files."""
    return folder / f"part{index}"
