"""Conversion both ways: HF -> mcore -> HF is bit-exact whatever the layouts, and refuses to overwrite."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.runs import run_forked
from tests.tiny_models import EXPERTS, write_tiny_model
from tlt.config import read_hf_config
from tlt.weight_sync.gather import HfDirectory
from tlt.weight_sync.hf_directory import write_directory
from tlt.weight_sync.stored import StoredWeights

pytestmark = pytest.mark.megatron
TOOLS = Path(__file__).parents[2] / "tools"


def run(tool: str, *arguments: object, num_ranks: int = 1) -> subprocess.CompletedProcess:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"] if num_ranks > 1 else []
    )
    return subprocess.run(
        [sys.executable, *launcher, str(TOOLS / tool), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "there"),
    [
        ("llama", torch.bfloat16, (1, 2)),
        ("qwen2", torch.float32, (2, 1)),
        ("qwen3", torch.float32, (1, 1)),
        (EXPERTS, torch.bfloat16, (1, 2)),
    ],
)
def test_there_and_back_is_bit_exact(tmp_path, kind, dtype, there):
    (tmp_path / "hf").mkdir()
    source = write_tiny_model(kind, tmp_path / "hf", dtype=dtype)

    def layout(sizes):
        return ["--tensor-model-parallel-size", sizes[0], "--pipeline-model-parallel-size", sizes[1]]

    def num_ranks(sizes):
        return sizes[0] * sizes[1]

    first = run(
        "convert_hf_to_mcore.py", "--hf-model", source, "--save", tmp_path / "run", *layout(there),
        num_ranks=num_ranks(there),
    )  # fmt: skip
    assert first.returncode == 0, first.stderr[-2000:]
    arguments = ["--load", tmp_path / "run", "--hf-model", source, "--out", tmp_path / "out"]
    run_forked("tools.convert_mcore_to_hf", arguments, 1)

    original, result = HfDirectory(source).owner, HfDirectory(tmp_path / "out").owner
    assert sorted(result) == sorted(original)
    for name in original:
        sent, got = original[name].get_tensor(name), result[name].get_tensor(name)
        assert got.dtype == sent.dtype
        assert torch.equal(got, sent), name

    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.arange(3, 40)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, tmp_path / "out")]
    assert torch.equal(*logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_large_model_is_written_in_files_that_transformers_loads(tiny_models, tmp_path):
    source = tiny_models["qwen2"]
    original = HfDirectory(source).owner
    tensors = ((name, file.get_tensor(name)) for name, file in original.items())
    write_directory(tmp_path / "out", tensors, like=source, file_bytes=300_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(path.stat().st_size < 310_000 for path in files)  # 300,000 and a header; no tensor is larger
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = (file.get_tensor(name).numel() * 4 for name, file in original.items())
    assert index["metadata"]["total_size"] == sum(sizes)

    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, tmp_path / "out")]
    assert torch.equal(*logits)
    files[1].unlink()
    with pytest.raises(ValueError, match=f"names {files[1].name}, which it does not hold"):
        HfDirectory(tmp_path / "out")


def test_a_checkpoint_of_another_model_is_refused(tiny_models, tmp_path):
    small = write_tiny_model("llama", tmp_path, num_hidden_layers=2)
    assert run("convert_hf_to_mcore.py", "--hf-model", small, "--save", tmp_path / "run").returncode == 0
    stored = StoredWeights(
        tmp_path / "run/iter_0000000", read_hf_config(str(tiny_models["llama"])), dtype=torch.float32
    )
    with pytest.raises(
        ValueError, match=r"should be an array of \(4, 128\) for this model, there is one of \(2, 128\)"
    ):
        dict(stored.hf_tensors())


def test_bad_arguments_are_refused(tiny_models, tmp_path):
    (tmp_path / "run" / "iter_0000000").mkdir(parents=True)
    again = run("convert_hf_to_mcore.py", "--hf-model", tiny_models["llama"], "--save", tmp_path / "run")
    assert again.returncode == 2
    assert "--save" in again.stderr
    nothing = run(
        "convert_mcore_to_hf.py", "--load", tmp_path, "--hf-model", tiny_models["llama"], "--out", tmp_path / "out"
    )
    assert nothing.returncode == 2
    assert "--load" in nothing.stderr
