"""tools/bench_e2e.py on real runs of a tiny model."""

import json

import pytest

from tests.e2e.runs import SUMS, run_forked
from tests.engine.test_speculation import PEAKED, write_head
from tests.tiny_models import write_tiny_model
from tlt.timeline.breakdown import PHASES
from tools import bench_e2e

pytestmark = [pytest.mark.engine, pytest.mark.megatron]


def test_modes_walk_the_same_path_and_finished_runs_are_not_repeated(tmp_path, capsys):
    model = write_tiny_model("llama", tmp_path / "model", **PEAKED)
    head = write_head(tmp_path / "head", model)
    launched = []

    def launch(flags, ranks, log):
        launched.append(flags)
        log.write_text(run_forked("pretrain_rl", flags, ranks))

    arguments = [
        "--hf-model", model, "--drafter", head, "--out", tmp_path / "out" / "e2e", "--json", tmp_path / "rows.json",
        "--modes", "plain,full", "--requests-per-rank", "8", "--group-size", "4", "--seeds", "3", "--iterations", "2",
        "--", "--data-train", SUMS, "--no-bf16", "--lr", "1e-3", "--rollout-max-response-tokens", "60",
        "--rollout-max-num-seqs", "32", "--eval-num-prompts", "4", "--drafter-starts-per-step", "32",
    ]  # fmt: skip
    assert bench_e2e.main([str(each) for each in arguments], launch) == 0
    found = json.loads((tmp_path / "rows.json").read_text())
    table = {(row["mode"], row["phase"]): row for row in found["rows"]}
    assert set(table) == {(mode, phase) for mode in ("plain", "full") for phase in PHASES}
    for (mode, phase), row in table.items():
        assert row["requests_per_rank"] == 8
        assert row["median_s"] > 0 or phase in ("publish", "logprobs", "tail", "other", "reward"), (mode, phase)
    whole = table["full", "iteration"]
    assert whole["acceptance_length"] > 1
    assert whole["same_text_frac"] == 1, "fp32: the same responses and rewards"
    assert whole["tokens_vs_plain"] == 1
    assert 0 < whole["one_hot_ceiling"] < 1
    assert whole["ratio_vs_plain"] == pytest.approx(table["plain", "iteration"]["median_s"] / whole["median_s"])
    plain, full = found["curves"]
    for name in ("reward", "greedy_accuracy"):
        assert plain[name] == full[name], name
    assert [iteration for iteration, _ in plain["greedy_accuracy"]] == [0, 2]
    assert found["about"]["counted"] == [2]
    assert "| full | 1 |" in (tmp_path / "out" / "e2e.md").read_text()
    assert (tmp_path / "out" / "e2e.png").stat().st_size > 10_000
    assert len(launched) == 2
    assert bench_e2e.main([str(each) for each in arguments], launch) == 0
    assert len(launched) == 2
    assert "| full | 1 |" in capsys.readouterr().out
