"""A model for the road: int8 rows (int6 of the embedding), compressed well; and back, grown in depth if asked.

pack_model.py pack HF OUT.safetensors
pack_model.py unpack OUT.safetensors HF_WITHOUT_WEIGHTS MODEL [TIMES]

With TIMES > 1 each layer is followed by TIMES - 1 copies whose outputs are multiplied by zero: the same function at
the cost of a deeper model (block expansion, Wu et al., LLaMA Pro, arXiv 2401.02415), which training may then use.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CODES, SCALES = "|codes", "|scales"
OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


def pack(model: Path, out: Path) -> None:
    packed = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if weight.ndim != 2:
            packed[name] = weight
            continue
        largest = 31 if "embed" in name else 127
        scale = (weight.float().abs().amax(1, keepdim=True) / largest).clamp_min(1e-8)
        packed[name + CODES] = (weight.float() / scale).round().to(torch.int8)
        packed[name + SCALES] = scale
    save_file(packed, out)


def unpack(packed: Path, files: Path, out: Path, times: int) -> None:
    found = load_file(packed)
    weights = {name: tensor.bfloat16() for name, tensor in found.items() if "|" not in name}
    for name in (name.removesuffix(CODES) for name in found if name.endswith(CODES)):
        weights[name] = (found[name + CODES].float() * found[name + SCALES]).bfloat16()
    config = json.loads((files / "config.json").read_text())
    grown = {}
    for name, weight in weights.items():
        stem, _, rest = name.partition(".layers.")
        if not rest:
            grown[name] = weight
            continue
        layer, _, leaf = rest.partition(".")
        for copy in range(times):
            is_silent = copy > 0 and leaf in OUTPUTS
            grown[f"{stem}.layers.{int(layer) * times + copy}.{leaf}"] = (
                torch.zeros_like(weight) if is_silent else weight.clone()
            )
    config["num_hidden_layers"] *= times
    shutil.copytree(files, out, dirs_exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(grown, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    verb, source, *rest = sys.argv[1:]
    if verb == "pack":
        pack(Path(source), Path(rest[0]))
    else:
        unpack(Path(source), Path(rest[0]), Path(rest[1]), int(rest[2]) if rest[2:] else 1)
