"""tools/train_drafter.py as a user starts it, tiny model: alone and on two ranks, from prompts and from sources."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e.runs import ROOT, SUMS, run_forked
from tests.tiny_models import write_tiny_model
from tlt.config import read_hf_config
from tlt.drafter.model import load_head
from tools import train_drafter

pytestmark = pytest.mark.engine

SMALL = ("--dtype", "float32", "--max-tokens", "30", "--max-model-len", "160", "--max-num-seqs", "8")


def run(*arguments: object, ranks: int = 1) -> subprocess.CompletedProcess:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable] if ranks == 1 else torchrun
    return subprocess.run(
        [*command, str(ROOT / "tools/train_drafter.py"), *map(str, arguments)], capture_output=True, text=True,
        check=False, timeout=280, env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("model"))


def check(folder: Path, model: Path, *, vocabulary: int, held_out: int) -> dict:
    head = load_head(folder, flag="test", target_config=read_hf_config(str(model)), dtype=torch.float32)
    assert len(head.draft_token_ids) == vocabulary
    report = json.loads((folder / "training.json").read_text())
    assert report["held_out"] == held_out
    assert 0.9 < report["coverage"] <= 1
    assert {len(one["rates"]) for one in report["acceptance"].values()} == {3}
    assert all(1 <= one["length"] <= 4 for one in report["acceptance"].values())
    return report


def test_two_ranks_train_one_head_from_sources(model, tmp_path):
    result = run(
        "--model", model, "--sources", SUMS, "--out", tmp_path, *SMALL, "--generate-tokens", 1000, "--train-tokens",
        4000, "--held-out-prompts", 6, "--draft-vocabulary", 500, "--num-draft-tokens", 3,
        "--drafter-starts-per-step", 128, "--drafter-lr", "4e-3", ranks=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    report = check(tmp_path, model, vocabulary=500, held_out=6)
    assert report["starts"] >= 4000
    assert report["tokens"] >= 1000
    assert report["acceptance"]["sampled"]["overlap"][0] > 0.3, "a random head is at a tenth of this"


def test_one_process_goes_on_from_a_head_with_prompts_and_a_time(model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(20)))
    first = [
        "--model", model, "--prompts", prompts, "--out", tmp_path / "a", *SMALL, "--generate-tokens", 300,
        "--train-tokens", 500, "--held-out-prompts", 4, "--draft-vocabulary", 512, "--num-draft-tokens", 3,
        "--aux-layers", "0,2,3",
    ]  # fmt: skip
    run_forked("tools.train_drafter", first, 1)
    check(tmp_path / "a", model, vocabulary=512, held_out=4)
    second = [
        "--model", model, "--prompts", prompts, "--out", tmp_path / "b", *SMALL, "--minutes", 1.0, "--generate-frac",
        0.1, "--held-out-prompts", 4, "--num-draft-tokens", 3, "--init", tmp_path / "a",
    ]  # fmt: skip
    run_forked("tools.train_drafter", second, 1)
    report = check(tmp_path / "b", model, vocabulary=512, held_out=4)
    for folder in ("a", "b"):  # the second head reads what the first one did
        assert json.loads((tmp_path / folder / "config.json").read_text())["aux_hidden_state_layers"] == [0, 2, 3]
    # What is left of the minute after the engine's start, on a machine of any speed.
    assert report["train_s"] < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sources", SUMS], "--minutes must be this or --train-tokens"),
        (["--sources", SUMS, "--train-tokens", "10"], "--generate-tokens must be a number"),
        (["--sources", SUMS, "--minutes", "0"], "--minutes must be above 0 and finite, got 0.0"),
        (["--sources", SUMS, "--minutes", "nan"], "--minutes must be above 0 and finite, got nan"),
        (["--sources", SUMS, "--train-tokens", "0", "--generate-tokens", "9"], "--train-tokens must be above 0"),
        (["--sources", SUMS, "--train-tokens", "9", "--generate-tokens", "-1"], "--generate-tokens must be above 0"),
        (["--sources", SUMS, "--minutes", "1", "--generate-frac", "1"], "--generate-frac must be in (0, 1)"),
        (["--sources", SUMS, "--minutes", "1", "--model", "nowhere"], " --model must be an existing directory"),
        (["--sources", "gsm8k", "--minutes", "1"], " --sources must be `reasoning-gym:<task>"),
        (["--sources", SUMS, "--minutes", "1", "--max-num-seqs", "0"], " --max-num-seqs must be at least 1, got 0"),
        (["--sources", SUMS, "--minutes", "1", "--drafter-lr", "0"], "--drafter-lr must be above 0"),
        (["--sources", SUMS, "--minutes", "1", "--aux-layers", "1,2,5"], "--aux-layers must be 3 rising numbers"),
    ],
)
def test_bad_input_is_refused_in_one_line(model, tmp_path, monkeypatch, capsys, arguments, message):
    flags = ["--model", str(model), "--out", str(tmp_path / "out"), *SMALL, *arguments]
    monkeypatch.setattr("sys.argv", ["train_drafter.py", *flags])
    check_refusal(train_drafter.main(), capsys.readouterr().err, tmp_path, message)


def test_a_missing_file_is_refused_in_one_line_by_the_program(model, tmp_path):
    result = run("--model", model, "--out", tmp_path / "out", *SMALL, "--prompts", "nowhere.jsonl", "--minutes", "1")
    check_refusal(result.returncode, result.stderr, tmp_path, "--prompts must be a JSONL file")


def check_refusal(status: int, errors: str, folder: Path, message: str) -> None:
    assert status == 2
    (line,) = [row for row in errors.splitlines() if row.startswith("train_drafter.py: error:")]
    assert message in line
    assert not (folder / "out").exists()
