"""pretrain_rl.py as a user runs it: what it writes, how it resumes, how it dies, how it refuses."""

import json
import os
import signal
import time

import pytest

from tests.e2e import runs
from tests.tiny_models import EXPERTS
from tools import profile_workload

pytestmark = [pytest.mark.engine, pytest.mark.megatron]


@pytest.fixture(scope="module")
def undisturbed(tiny_models, tmp_path_factory):
    """Folder of a run of 4 iterations that nothing disturbed."""
    save = tmp_path_factory.mktemp("undisturbed") / "run"
    process = runs.start(runs.flags(tiny_models["llama"], save))
    output = runs.finish(process)
    assert process.returncode == 0, output[-3000:]
    return save


def test_a_run_leaves_metrics_trace_record_and_checkpoint(undisturbed):
    records = runs.records(undisturbed)
    assert [record["iteration"] for record in records] == [0, 1, 2, 3, 4]
    assert "eval/greedy_accuracy" in records[0]
    assert "eval/greedy_accuracy" in records[4]
    # fp32 trainer and engine: logprobs of the same policy
    assert all(record["policy/logprob_diff_max"] < 2e-3 for record in records[1:])
    assert all(0 < record["rollout/entropy"] < 7 and 0 < record["rollout/max_prob"] < 1 for record in records[1:])
    assert all(0 <= record["rollout/running_le_4_frac_of_time"] <= 1 for record in raw_records(undisturbed)[1:])
    assert {"eval/sampled_accuracy", "eval/mixed_groups_frac", "eval/sampled_entropy"} <= set(records[4])
    run = json.loads((undisturbed / "run.json").read_text())["starts"][0]
    assert run["packages"]["megatron-core"] == "0.16.1"
    assert "cpu_rng_fork" in run["patches"]
    for rank in (0, 1):
        for name in ("rollout", "reward", "rollout_exchange", "update", "weight_sync"):
            assert runs.spans(undisturbed, name, rank) >= 4, name
    assert sorted(path.name for path in undisturbed.glob("iter_*")) == ["iter_0000003", "iter_0000004"]
    assert (undisturbed / "latest_checkpointed_iteration.txt").read_text().strip() == "4"
    assert list((undisturbed / "tensorboard").iterdir())


def raw_records(save) -> list[dict]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_responses_for_the_profile(undisturbed, tmp_path, monkeypatch, capsys):
    names = sorted(path.name for path in (undisturbed / "rollouts").iterdir())
    assert names == ["eval_0000000.jsonl", "eval_0000004.jsonl", "train_0000002.jsonl", "train_0000004.jsonl"]
    rows = [json.loads(line) for line in (undisturbed / "rollouts" / "train_0000002.jsonl").read_text().splitlines()]
    assert len(rows) == 6 * 8
    assert {row["replica"] for row in rows} == {0, 1}
    for row in rows:
        assert len(row["token_ids"]) == len(row["logprobs"]) == len(row["entropies"]) == len(row["max_probs"])
    mean = sum(sum(row["entropies"]) for row in rows) / sum(len(row["entropies"]) for row in rows)
    assert mean == pytest.approx(runs.records(undisturbed)[2]["rollout/entropy"], abs=1e-4)  # 5 digits are written
    monkeypatch.setattr("sys.argv", ["x", str(undisturbed), "--out", str(tmp_path / "profile")])
    assert profile_workload.main() == 0
    result = json.loads((tmp_path / "profile.json").read_text())
    assert (result["responses"], result["history_responses"]) == (8, 8)  # 4 problems, 2 samples; the first evaluation
    assert "eval_0000004" in capsys.readouterr().out


def test_kills_in_rollout_update_and_save_lose_at_most_the_current_iteration(tiny_models, undisturbed, tmp_path):
    """One run, killed three times by SIGKILL of all its processes, must end with the undisturbed run's metrics."""
    save = tmp_path / "run"
    arguments = runs.flags(tiny_models["llama"], save)

    # Evaluation, then iteration 1; killed while iteration 2 rolls out.
    process = runs.ForkedRun("pretrain_rl", arguments)
    runs.wait_until(lambda: (save / "iter_0000001").exists(), process)
    time.sleep(0.1)
    runs.kill(process)
    process.wait()
    assert not (save / "iter_0000002").exists()

    process = runs.ForkedRun("pretrain_rl", arguments)
    updates = runs.spans(save, "old_logprobs")
    runs.wait_until(lambda: runs.spans(save, "old_logprobs") > updates, process)
    runs.kill(process)  # iteration 2 has its old logprobs, its optimizer steps begin
    process.wait()
    assert not (save / "iter_0000002").exists()

    process = runs.ForkedRun("pretrain_rl", arguments)
    runs.wait_until(lambda: (save / "iter_0000003.tmp").exists(), process)
    runs.kill(process)  # iteration 3 is being saved
    process.wait()

    process = runs.ForkedRun("pretrain_rl", arguments)
    output = runs.finish(process)
    assert process.returncode == 0, output[-3000:]
    assert runs.records(save) == runs.records(undisturbed), "resume = no resume, to the last bit"
    assert not list(save.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_last_complete_iteration_and_ends(tiny_models, tmp_path, number):
    save = tmp_path / "run"
    process = runs.start(runs.flags(tiny_models["llama"], save, save_interval=0, train_iters=1000, eval_num_prompts=0))
    runs.wait_until(lambda: len(runs.records(save)) >= 3, process)
    os.kill(process.pid, number)
    runs.finish(process, timeout_s=60)
    (checkpoint,) = [path for path in save.glob("iter_*") if path.suffix != ".tmp"]
    last = runs.records(save)[-1]["iteration"]
    assert int(checkpoint.name.removeprefix("iter_")) == last
    assert json.loads((checkpoint / "run_state.json").read_text())["iteration"] == last


@pytest.mark.parametrize(
    ("layout", "num_ranks"),
    [
        ({"tensor_model_parallel_size": 2, "rollout_tensor_parallel_size": 1}, 2),
        ({"pipeline_model_parallel_size": 2, "rollout_tensor_parallel_size": 2}, 2),
    ],
)
def test_layouts_of_policy_and_rollout_are_independent(tiny_models, undisturbed, tmp_path, layout, num_ranks):
    save = tmp_path / "run"
    runs.run_forked("pretrain_rl", runs.flags(tiny_models["llama"], save, train_iters=1, **layout), num_ranks)
    got, expected = runs.records(save)[1], runs.records(undisturbed)[1]
    # The same rollouts (fp32, the same seeds), the same update: sums in another order
    for name in ("rl/reward", "policy/entropy", "policy/grad_norm", "rollout/response_tokens_mean"):
        assert got[name] == pytest.approx(expected[name], rel=1e-3), name


def test_experts_spread_over_ranks_are_trained_and_go_on_from_a_checkpoint(tiny_models, tmp_path):
    layout = {"expert_model_parallel_size": 2, "use_distributed_optimizer": True, "spec_strategy": "suffix:4"}
    for last in (2, 3):
        small = {"train_iters": last, "rollout_max_response_tokens": 30, "eval_num_prompts": 2}
        runs.run_forked("pretrain_rl", runs.flags(tiny_models[EXPERTS], tmp_path / "run", **layout, **small))
    records = runs.records(tmp_path / "run")
    assert [record["iteration"] for record in records] == [0, 1, 2, 3]
    assert all(record["policy/logprob_diff_max"] < 2e-3 for record in records[1:])
    assert any(record["policy/grad_norm"] > 0 for record in records[1:])  # a random model's rewards may all be equal


def test_bad_input_ends_both_ranks_within_seconds_with_one_line(tiny_models, tmp_path):
    begin_s = time.monotonic()
    process = runs.start(runs.flags(tiny_models["llama"], tmp_path / "run", data_train="reasoning-gym:chain_summ"))
    output = runs.finish(process, timeout_s=60)
    assert process.returncode != 0
    errors = [line for line in output.splitlines() if line.startswith("pretrain_rl.py: error:")]
    assert errors == [
        "pretrain_rl.py: error: --data-train: reasoning-gym has no task 'chain_summ'; close to it: "
        + errors[0].rpartition(": ")[2]
    ]
    assert "chain_sum" in errors[0]
    assert time.monotonic() - begin_s < 40  # imports and torchrun, on two cores that may be shared
    assert not (tmp_path / "run").exists()
