"""tools/train_sft.py as a user starts it: what it writes, how it resumes, what it refuses."""

import json
import subprocess

import pytest
import torch

from tests.e2e import runs
from tlt.arguments import parse
from tlt.sft.config import SftRunConfig
from tlt.weight_sync.gather import HfDirectory
from tools.train_sft import build, main

pytestmark = pytest.mark.megatron


def write_examples(path, num: int) -> str:
    rows = [{"prompt": f"{a} + {a + 1} =", "response": f"The answer is {2 * a + 1}."} for a in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def flags(model, folder, **overrides) -> list[str]:
    values = {
        "hf_model": model,
        "save": folder / "run",
        "load": folder / "run",
        "train_iters": 6,
        "save_interval": 1,
        "bf16": False,
        "lr": 1e-3,
        "lr_decay_style": "linear",
        "data_train": write_examples(folder / "train.jsonl", 40),
        "data_chat_template": False,
        "sft_held_out": write_examples(folder / "held_out.jsonl", 4),
        "sft_tokens_per_step": 200,
        "sft_eval_interval": 3,
        **overrides,
    }
    return runs.as_flags(values)


def start(arguments: list[str]) -> subprocess.Popen:
    return runs.start(arguments, program="tools/train_sft.py")


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: file.get_tensor(name) for name, file in HfDirectory(folder).owner.items()}


def test_a_run_learns_writes_a_model_and_resumes_without_a_trace(tiny_models, tmp_path):
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    process = start(flags(tiny_models["llama"], folders[0]))
    output = runs.finish(process)
    assert process.returncode == 0, output[-3000:]
    records = runs.records(folders[0] / "run")
    assert [record["iteration"] for record in records] == list(range(7))
    held_out = [record["sft/held_out_nll"] for record in records if "sft/held_out_nll" in record]
    assert len(held_out) == 3  # before, after 3, after 6
    assert held_out[-1] < held_out[0] - 0.5
    assert records[1]["sft/tokens"] <= 200

    process = runs.ForkedRun("tools.train_sft", flags(tiny_models["llama"], folders[1]))
    runs.wait_until(lambda: (folders[1] / "run" / "iter_0000002").exists(), process)
    runs.kill(process)
    process.wait()
    assert not (folders[1] / "run" / "hf").exists()
    output = runs.run_forked("tools.train_sft", flags(tiny_models["llama"], folders[1]))
    assert "resumed from" in output
    assert runs.records(folders[1] / "run") == records
    whole, resumed = (tensors(folder / "run" / "hf") for folder in folders)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    original = tensors(tiny_models["llama"])
    assert any(not torch.equal(whole[name], original[name]) for name in whole)
    assert (folders[0] / "run" / "hf" / "tokenizer.json").is_file()


def test_a_folder_that_nodes_do_not_share_is_refused(tiny_models, tmp_path, monkeypatch):
    def shared_folder(folder, parallel):
        raise RuntimeError(f"{folder} of {parallel} is not shared")

    monkeypatch.setattr("megatron_patches.apply_patches", lambda: [])
    monkeypatch.setattr("tlt.interrupt.Interrupt.install", lambda interrupt: None)
    monkeypatch.setattr("tlt.parallel.initialize", lambda model, timeout: "two nodes")
    monkeypatch.setattr("tlt.run_state.shared_folder", shared_folder)
    config = parse(flags(tiny_models["llama"], tmp_path), "", SftRunConfig)
    with pytest.raises(RuntimeError, match=f"{tmp_path}/run of two nodes is not shared"):
        build(config, None)


def test_the_help_of_a_dry_run_promises_what_it_does(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "memory is not estimated" in text
    assert "config.json is enough" not in text
    assert "Iterations to train in all" in text, "fields of the base class keep theirs"


@pytest.mark.parametrize(
    ("rows", "overrides", "parts"),
    [
        (['{"prompt": "1"}'], {}, ["train.jsonl, line 1", "response"]),
        (['{"prompt": "1", "response": "2"}', "{"], {}, ["line 2", "not JSON"]),
        (['{"prompt": "1", "response": "' + "7 " * 600 + '"}'], {}, ["line 1", "context is 512"]),
        ([""], {}, ["holds no example"]),
        (None, {"data_train": "jsonl:nowhere"}, ["--data-train", "nowhere"]),
        (None, {"sft_held_out": "gsm8k"}, ["--sft-held-out", "gsm8k", "jsonl:<file>"]),
        (None, {"sft_tokens_per_step": 0}, ["--sft-tokens-per-step", "at least 1"]),
        (None, {"data_weights": 1.0}, ["--data-weights"]),
        (None, {"data_exclude": "asked.jsonl"}, ["--data-exclude must be left out", "asked.jsonl"]),
        (None, {"data_max_rejected": 3}, ["--data-max-rejected must be 0", "got 3"]),
        (None, {"dry_run_gpu_gib": 80.0}, ["--dry-run-gpu-gib must be left out", "got 80.0"]),
        (None, {"tensor_model_parallel_size": 3}, ["--tensor-model-parallel-size", "2 ranks"]),
        (None, {"data_chat_template": True}, []),
    ],
)
def test_bad_input_is_named(tiny_models, tmp_path, capsys, monkeypatch, rows, overrides, parts):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [*flags(tiny_models["llama"], tmp_path, **overrides), "--dry-run"]
    if rows is not None:
        (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    status = main(arguments)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_sft.py: error:")]
    if not parts:  # the valid configuration passes
        assert (status, errors) == (0, [])
        return
    assert status == 2
    for part in parts:
        assert part in errors[0]
