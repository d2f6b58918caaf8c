"""The conversion of SmolLM2 from the package's GGUF, and its tokenizer against known ids."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.prepare_smollm2 import KNOWN_TOKENS, check_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "prepare_smollm2.py"


def test_a_tokenizer_with_other_ids_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="12"):
        check_tokenizer(tmp_path)
    assert KNOWN_TOKENS["12+34"] == [33, 34, 27, 35, 36], "one token a digit"


def test_the_model_is_made_whole_and_only_once(tmp_path):
    out = tmp_path / "smollm2"
    first = subprocess.run([sys.executable, str(TOOL), "--out", str(out)], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert "4-bit-rounded" in first.stdout
    record = json.loads((out / "provenance.json").read_text())
    assert record["model_bytes"] == (out / "model.safetensors").stat().st_size == 269060552
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    check_tokenizer(out)
    second = subprocess.run(
        [sys.executable, str(TOOL), "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert "is complete" in second.stdout
