"""The tokenizer of --hf-model, and the tokens that end a response."""

from pathlib import Path
from typing import Any

from tlt.config.requirement import read_object, require

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's directory holds files of one."""
    return any((folder / name).is_file() for name in FILES)


def read_tokenizer(folder: Path) -> Any:
    """Raises ValueError naming the flag where the directory has none that transformers can read."""
    from transformers import AutoTokenizer

    allowed = f"a directory with a tokenizer ({', '.join(FILES)})"
    require(has_tokenizer(folder), "--hf-model", str(folder), allowed)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of any type: whatever its files make transformers stumble over
        reason = " ".join(str(error).split())
        raise ValueError(f"--hf-model {folder}: its tokenizer cannot be read: {reason}") from error


def stop_token_ids(folder: Path, hf_config: dict, tokenizer: Any) -> list[int]:
    """Tokens that end a response: of generation_config.json, else of config.json, else the tokenizer's."""
    path = folder / "generation_config.json"
    generation = read_object(path, "--hf-model") if path.is_file() else {}
    for value in (generation.get("eos_token_id"), hf_config.get("eos_token_id"), tokenizer.eos_token_id):
        if value is not None:
            return list(value) if isinstance(value, list) else [value]
    raise ValueError(f"--hf-model {folder}: neither its configs nor its tokenizer name an end-of-sequence token")
