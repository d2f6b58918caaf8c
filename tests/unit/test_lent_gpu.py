"""benchmarks/lent_gpu/ as far as a CPU can tell: a model that is packed and unpacked, and text that sleep changed."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.lent_gpu import look
from tlt.rollout.vllm import graph_check

PACK = Path(__file__).parents[2] / "benchmarks/lent_gpu/pack_model.py"


def pack_model(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(PACK), *map(str, arguments)], capture_output=True, text=True)


def test_a_packed_model_comes_back_and_grows(tiny_models, tmp_path):
    packed = tmp_path / "packed.safetensors"
    assert pack_model("pack", tiny_models["llama"], packed).returncode == 0
    assert pack_model("unpack", packed, tiny_models["llama"], tmp_path / "out", 2).returncode == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_models["llama"], tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 8
    name = "model.layers.{}.mlp.down_proj.weight"
    for layer in range(4):
        torch.testing.assert_close(after[name.format(2 * layer)].float(), before[name.format(layer)].float(),
                                   atol=0.02 * float(before[name.format(layer)].abs().max()), rtol=0)  # fmt: skip
        assert not after[name.format(2 * layer + 1)].any()


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "usage: pack_model.py"),
        ([], 2, "required: verb"),
        (["unpack", "a", "b", "c", "0"], 2, "TIMES must be at least 1, got 0"),
    ],
)
def test_packing_says_how_it_is_used(arguments, status, text):
    process = pack_model(*arguments)
    assert process.returncode == status
    assert text in process.stdout + process.stderr
    assert "Traceback" not in process.stderr


class Awake(look.Look):
    """Whose engine does nothing, and whose text is `texts`, one a run."""

    texts: list

    def __init__(self, args):
        settings = SimpleNamespace(cudagraph_mode="full", cudagraph_capture_sizes=[1])
        self.args = args
        self.engine = SimpleNamespace(
            sleep=lambda: None, wake=lambda: None, load_weights=lambda weights, policy_version: dict(weights),
            runner=SimpleNamespace(compilation_config=settings),
            engine=SimpleNamespace(reset_prefix_cache=lambda: None),
        )  # fmt: skip

    def run(self, strategy, batch, **how):
        return self.texts.pop(0), {"strategy": strategy}


@pytest.mark.parametrize(("after", "status"), [([[1, 2], [3]], 0), ([[1, 2], [4]], 1)])
def test_a_look_fails_where_sleep_changed_the_text(tiny_models, tmp_path, monkeypatch, capsys, after, status):
    before = [[1, 2], [3]]
    monkeypatch.setattr(Awake, "texts", [before, before, before, before, after], raising=False)
    monkeypatch.setattr(look, "Look", Awake)
    monkeypatch.setattr(graph_check, "check_graphs", lambda engine, seed: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    flags = ["--model", tiny_models["llama"], "--drafter", "head", "--json", tmp_path / "look.json", "--sleep"]
    monkeypatch.setattr("sys.argv", ["look.py", *map(str, flags), "--strategies", "off", "--batches", "8"])
    assert look.main() == status
    assert ("look.py: error: 1 of 2 responses differ" in capsys.readouterr().err) == (status == 1)
    found = json.loads((tmp_path / "look.json").read_text())
    assert len(found["rows"]) == 2
    assert (found["sleep"]["same"], found["sleep"]["responses"]) == (2 - status, 2)
    assert len(found["sleep"]["load_s"]) == 3
    assert min(found["sleep"]["sleep_s"], found["sleep"]["wake_s"], *found["sleep"]["load_s"]) >= 0
