"""Each model's script at the size it is written for, by a dry run: no GPU, and of the model its config.json alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model_facts import FACTS, write_config
from tlt.drafter.model import EagleHead, HeadShape, save_head

EXAMPLES = Path(__file__).parents[2] / "examples"
RANKS = {
    "smollm2_135m": 1,
    "qwen2.5_7b": 8,
    "ds_r1_distill_qwen_7b": 8,
    "qwen2.5_32b": 64,
    "llama3.3_70b": 64,
    "qwen3_30b_a3b": 16,
}


def run(model: str, folder: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    """The script with what it asks for; `variables` go to its environment."""
    given = {
        "MODEL_DIR": str(write_config(model, folder / "model")), "RUN_DIR": str(folder / "run"),
        "DATA": "reasoning-gym:chain_sum", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        ["bash", str(EXAMPLES / model / "run.sh"), *flags], env={**os.environ, **given, **variables},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("model", FACTS)
def test_an_example_is_valid_and_fits_its_gpus(tmp_path, model):
    process = run(model, tmp_path, "--dry-run")
    assert process.returncode == 0, process.stderr[-2000:]
    assert f"dry run: the configuration is valid for {RANKS[model]} ranks" in process.stderr
    assert "| total |" in process.stderr
    assert not (tmp_path / "run").exists()


def test_a_head_is_trained_on_idle_ranks_where_its_trainer_fits(tmp_path):
    target = FACTS["smollm2_135m"]
    save_head(EagleHead(HeadShape.of_target(target)), tmp_path / "head", target_config=target)
    process = run("smollm2_135m", tmp_path, "--dry-run", DRAFTER_DIR=str(tmp_path / "head"))
    assert process.returncode == 0, process.stderr[-2000:]
    assert "| drafter's trainer |" in process.stderr
    assert "| drafter's step in a tail | 0.0 |" in process.stderr


def test_every_model_has_an_example():
    scripts = [path for path in EXAMPLES.glob("*/run.sh") if "paper_settings" in path.read_text()]
    assert {path.parent.name for path in scripts} == set(FACTS)


@pytest.mark.parametrize(
    ("model", "flags", "variables", "parts"),
    [
        ("qwen2.5_32b", ["--dry-run"], {"GPU_GIB": "39.5"}, ["--dry-run-gpu-gib (39.5)", "phase"]),
        ("llama3.3_70b", ["--dry-run"], {"PET_NNODES": "3"}, ["divisor of the world size (24 ranks)", "got 16"]),
        ("qwen2.5_7b", ["--dry-run"], {"DRAFTER_DIR": "absent"}, ["--spec-drafter", "absent"]),
        ("qwen2.5_7b", ["--dry-run"], {"MODEL_DIR": ""}, ["set MODEL_DIR"]),
        ("qwen2.5_32b", [], {}, ["8 nodes need a rendezvous", "examples/slurm/train.sbatch"]),
    ],
)
def test_what_an_example_cannot_do_is_said(tmp_path, model, flags, variables, parts):
    process = run(model, tmp_path, *flags, **variables)
    assert process.returncode != 0
    for part in parts:
        assert part in process.stderr
