"""benchmarks/gpu_suite.sh as far as a CPU can tell: that its stages run, are kept apart and are not repeated."""

import json
import os
import subprocess
import sys

import pytest

from tests.e2e.runs import ROOT, SUMS

pytestmark = [pytest.mark.engine, pytest.mark.megatron]


def run(out, model, *stages: str, cwd=ROOT, **variables: str) -> subprocess.CompletedProcess:
    """From the folder `cwd`, which names the script as one does there."""
    given = {
        "OUT": str(out), "MODEL_DIR": str(model), "SOURCES": SUMS, "PYTHON": sys.executable, "REDUCED": "1",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        ["bash", os.path.relpath(ROOT / "benchmarks/gpu_suite.sh", cwd), *stages],
        env={**os.environ, **given, **variables}, cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip


def test_a_stage_leaves_files_and_is_not_repeated(tiny_models, tmp_path):
    process = run(tmp_path, tiny_models["llama"], "environment", "graphs", "sleep_wake", DRAFTER_DIR="")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "needs a GPU and DRAFTER_DIR" in (tmp_path / "sleep_wake.log").read_text()
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["megatron-core"] == "0.16.1"
    plans = json.loads((tmp_path / "graphs.json").read_text())
    tokens = {name: plan["captured_tokens"] for name, plan in plans.items()}
    # Large drafts for small batches alone cost less than one strategy for all of them, and far less than each for all.
    assert tokens["bucketed"] < 1.4 * tokens["single"] < tokens["naive"]
    assert "graphs: done before" in run(tmp_path, tiny_models["llama"], "graphs").stdout


@pytest.mark.slow
def test_engines_with_the_graphs_of_each_plan_are_built(tiny_models, tmp_path):
    process = run(tmp_path, tiny_models["llama"], "graph_memory", DRAFTER_DIR="")
    assert process.returncode == 0, process.stdout + (tmp_path / "graph_memory.log").read_text()[-3000:]
    names = ["eager", "single", "naive", "bucketed"]
    found = json.loads((tmp_path / "graph_memory.json").read_text())
    assert found["graph_bytes"] == dict.fromkeys(names, 0), "a CPU has none"
    rows = [json.loads((tmp_path / f"graph_memory_{name}.json").read_text()) for name in names]
    assert [row["strategy"].count("suffix") for row in rows] == [1, 1, 4, 7]


def test_a_stage_that_takes_too_long_stops_no_other(tiny_models, tmp_path):
    process = run(tmp_path, tiny_models["llama"], "environment", "graphs", LIMIT_S="0.01")
    assert process.returncode == 1
    assert "failed: environment graphs" in process.stderr
    assert (tmp_path / "environment.status").read_text().startswith("124 ")


def test_folders_are_relative_to_where_it_is_called(tiny_models, tmp_path):
    process = run("out", os.path.relpath(tiny_models["llama"], tmp_path), "graphs", cwd=tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    assert (tmp_path / "out" / "graphs.json").exists()
    assert f" {tiny_models['llama'].resolve()} " in (tmp_path / "out" / "graphs.status").read_text()


def test_an_unknown_stage_is_refused(tiny_models, tmp_path):
    process = run(tmp_path, tiny_models["llama"], "speed")
    assert process.returncode == 2
    assert "no stage speed; allowed are environment" in process.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_stages_run(tiny_models, tmp_path):
    stages = ["parity", "lossless", "step_cost", "rollout", "sync", "e2e"]
    process = run(tmp_path, tiny_models["llama"], *stages)
    logs = "\n".join(path.read_text()[-1000:] for path in tmp_path.glob("*.log"))
    assert process.returncode == 0, process.stdout + process.stderr + logs
    rows = json.loads((tmp_path / "rollout.json").read_text())["rows"]
    assert {row["strategy"] for row in rows} == {"plain", "off", "suffix:4", "adaptive:8"}
    assert (tmp_path / "step_cost_replay.md").exists()
    sync = json.loads((tmp_path / "sync.json").read_text())
    assert len(sync["weight_sync/push_s"]) == 2
    in_fp32 = (tiny_models["llama"] / "model.safetensors").stat().st_size
    assert sync["policy_bytes"] == pytest.approx(in_fp32 / 2, rel=0.02)
    found = json.loads(next(tmp_path.glob("e2e_*.json")).read_text())
    assert {row["mode"] for row in found["rows"]} == {"plain", "suffix:8"}
