"""A model for the road: int8 rows (int6 of the embedding), compressed well; and back, grown in depth if asked.

pack_model.py pack HF OUT.safetensors
pack_model.py unpack OUT.safetensors HF_WITHOUT_WEIGHTS MODEL [TIMES]

With TIMES > 1 each layer is followed by TIMES - 1 copies whose outputs are multiplied by zero: the same function at
the cost of a deeper model (block expansion, Wu et al., LLaMA Pro, arXiv 2401.02415), which training may then use.
"""

import argparse
import json
import shutil
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    to_pack = verbs.add_parser("pack", help="write a model's packed weights")
    to_pack.add_argument("model", type=Path, metavar="HF", help="Hugging Face directory")
    to_pack.add_argument("packed", type=Path, metavar="OUT.safetensors", help="file to write")
    to_unpack = verbs.add_parser("unpack", help="make a model of packed weights")
    to_unpack.add_argument("packed", type=Path, metavar="OUT.safetensors", help="what pack wrote")
    to_unpack.add_argument("files", type=Path, metavar="HF_WITHOUT_WEIGHTS", help="its other files")
    to_unpack.add_argument("out", type=Path, metavar="MODEL", help="directory to write")
    to_unpack.add_argument("times", type=int, nargs="?", default=1, metavar="TIMES", help="layers of one (default: 1)")
    args = parser.parse_args()
    if args.verb == "unpack" and args.times < 1:
        parser.error(f"TIMES must be at least 1, got {args.times}")
    return args


def main() -> None:
    args = arguments()
    if args.verb == "pack":
        pack(args.model, args.packed)
    else:
        unpack(args.packed, args.files, args.out, args.times)


if __name__ == "__main__":
    main()
