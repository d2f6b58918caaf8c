"""What heads read of the target's vocabulary: rows that drafts are read out with, and what a head is trained with.

Shapes: V tokens, H hidden.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

EMBEDDING = "model.embed_tokens.weight"


class WeightCopies:
    """Copies on the host of some weights of the target, by Hugging Face name, which follow each weight sync."""

    def __init__(self, folder: Path, names: Iterable[str], *, dtype: torch.dtype):
        self.tensors = {name: read_weight(folder, name).to(dtype) for name in names}

    def renew(self, name: str, tensor: torch.Tensor) -> None:
        """A weight of the target was replaced."""
        if name in self.tensors:
            self.tensors[name].copy_(tensor)


def not_at_hand(output: str, *, tp_size: int, on_cpu: bool, reads_output: bool) -> set[str]:
    """Names of the weights that a head is trained with and that an engine has not whole and as they were sent: a
    tensor-parallel rank has a part of the vocabulary, a CPU lays an output layer out anew.

    `output` names what the target's logits are read out with; `reads_output`: drafts are too, of all tokens.
    """
    is_whole = tp_size == 1
    names = set() if is_whole else {EMBEDDING}
    is_laid_out = output != EMBEDDING and on_cpu
    if reads_output and (is_laid_out or not is_whole):
        names.add(output)
    return names


def output_name(model: Any) -> str:
    """Of an engine's model (`output_of`)."""
    return output_of(is_tied=model.config.tie_word_embeddings)


def output_of(*, is_tied: bool) -> str:
    """Hugging Face name of the weight that a target's logits are read out with."""
    return EMBEDDING if is_tied else "lm_head.weight"


def read_weight(folder: Path, name: str) -> torch.Tensor:
    """One tensor of a Hugging Face directory."""
    index = folder / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.is_file() else "model.safetensors"
    with safe_open(folder / file, framework="pt") as tensors:
        return tensors.get_tensor(name)
