"""tools/rollout.py and tools/bench_rollout.py as a user starts them, tiny model; RL with and without speculation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.e2e.runs import ROOT, SUMS, flags, records, run_forked
from tests.engine.test_speculation import PEAKED, write_head
from tests.tiny_models import write_tiny_model
from tlt.run_state import read_tail_state
from tlt.spec.recording import read_recording
from tlt.spec.step_model import fit_model
from tools import bench_rollout, rollout
from tools.replay_text import Replay

pytestmark = [pytest.mark.engine, pytest.mark.megatron]


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *arguments], capture_output=True, text=True, check=False,
        timeout=300, env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("model"), **PEAKED)


@pytest.fixture(scope="module")
def head(model, tmp_path_factory) -> Path:
    return write_head(tmp_path_factory.mktemp("head"), model)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rollout_gives_the_same_responses_with_and_without_speculation(model, head, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    records_in = [
        {"prompt": "What is 2 + 2?"}, {"messages": [{"role": "user", "content": "Hello"}]},
        {"prompt_token_ids": [3, 5, 7, 3, 5]},
    ]  # fmt: skip
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records_in))
    common = ["--model", str(model), "--prompts", str(prompts), "--dtype", "float32", "--n", "2", "--max-tokens", "40"]
    plain = run("rollout.py", *common, "--out", str(tmp_path / "plain.jsonl"))
    assert plain.returncode == 0, plain.stderr[-2000:]
    drafting = ["--drafter", str(head), "--spec-strategy", "eagle:3"]
    drafted = run_forked("tools.rollout", [*common, "--out", tmp_path / "drafted.jsonl", *drafting], 1)
    first, second = lines(tmp_path / "plain.jsonl"), lines(tmp_path / "drafted.jsonl")
    assert len(first) == 6
    assert [line["token_ids"] for line in first] == [line["token_ids"] for line in second]
    assert first[4]["prompt_token_ids"] == [3, 5, 7, 3, 5]
    assert all(len(line["logprobs"]) == len(line["token_ids"]) for line in second)
    assert {line["drafter"]["num_drafts"] for line in first} == {0}
    assert min(line["drafter"]["num_draft_tokens"] for line in second) > 0
    assert "eagle/acceptance_length" in drafted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "--model must be an existing directory, got 'nowhere'"),
        (["--spec-strategy", "eagle:4"], "needs --drafter"),
        (["--spec-strategy", "eagle:4", "--drafter", "nowhere"], " --drafter "),
        (["--max-num-seqs", "0"], " --max-num-seqs must be at least 1, got 0"),
        (["--top-p", "2"], " --top-p must be in (0, 1], got 2.0"),
        (["--max-tokens", "5000"], "--max-tokens must be below the context of 512 tokens"),
        (["--n", "0"], "--n must be at least 1"),
    ],
)
def test_rollout_refuses_bad_input_in_one_line(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("sys.argv", ["rollout.py", *small_rollout(model, tmp_path), *arguments])
    check_refusal(rollout.main(), capsys.readouterr().err, tmp_path, message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('["prompt_token_ids"]', "must be a JSON object, got list"),
        ('{"prompt_token_ids": [3', "not JSON"),
        ('{"prompt_token_ids": 5}', '"prompt_token_ids" must be a list of token ids from 0 to 511, got 5'),
        ('{"prompt_token_ids": [3, "a"]}', "from 0 to 511, got 'a'"),
        ('{"prompt_token_ids": [true]}', "from 0 to 511, got True"),
        ('{"prompt_token_ids": [-7]}', "from 0 to 511, got -7"),
        ('{"prompt_token_ids": [512]}', "from 0 to 511, got 512"),
        ('{"prompt_token_ids": []}', "0 tokens"),
    ],
)
def test_rollout_names_file_and_line_of_a_bad_prompt(model, tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.setattr("sys.argv", ["rollout.py", *small_rollout(model, tmp_path)])
    (tmp_path / "p.jsonl").write_text('{"prompt_token_ids": [0, 511]}\n' + line + "\n")
    status, errors = rollout.main(), capsys.readouterr().err
    for part in (f"{tmp_path}/p.jsonl, line 2: ", message):
        check_refusal(status, errors, tmp_path, part)


def test_rollout_refuses_what_only_the_engine_knows_in_one_line(model, tmp_path):
    result = run("rollout.py", *small_rollout(model, tmp_path), "--engine-args", '{"min_p": 0.1}')
    check_refusal(result.returncode, result.stderr, tmp_path, "must not set min_p")


def small_rollout(model: Path, folder: Path) -> list[str]:
    (folder / "p.jsonl").write_text('{"prompt": "x"}\n')
    return ["--model", str(model), "--prompts", str(folder / "p.jsonl"), "--out", str(folder / "o.jsonl")]


def check_refusal(status: int, errors: str, folder: Path, message: str) -> None:
    assert status == 2
    (line,) = [row for row in errors.splitlines() if row.startswith("rollout.py: error:")]
    assert message in line
    assert not (folder / "o.jsonl").exists()


def test_the_rollout_benchmark_refuses_a_missing_model_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_rollout.py", "--model", str(tmp_path / "none"), "--sources", SUMS])
    assert bench_rollout.main() == 2
    expected = f"bench_rollout.py: error: --model must be an existing directory, got '{tmp_path}/none'"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_the_rollout_benchmark_pairs_strategies(model, head, tmp_path):
    strategies = [
        "plain", "off", "eagle:2", "suffix:3", "adaptive:4", "beg-mab@1=eagle:2|suffix:3",
        "cost-model@eagle:2|suffix:3", "stock-ngram:2", "stock-eagle:2",
    ]  # fmt: skip
    result = run(
        "bench_rollout.py", "--model", str(model), "--drafter", str(head), "--sources", SUMS, "--strategies",
        ",".join(strategies), "--requests-per-rank", "4", "--group-size", "2", "--dtype", "float32",
        "--max-model-len", "256", "--max-tokens", "60", "--quick", "--json", str(tmp_path / "rows.json"),
        "--record", str(tmp_path / "recording.jsonl"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    rows = {row["strategy"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert set(rows) == set(strategies)
    assert rows["plain"]["ratio_vs_plain"] == 1
    assert len({row["num_tokens"] for row in rows.values()}) == 1, "the same responses"
    assert rows["off"]["acceptance_length"] == 1
    assert rows["eagle:2"]["drafted_per_verification"] > 1
    assert rows["stock-eagle:2"]["drafted_per_verification"] == 2
    assert 0 < rows["plain"]["one_hot_ceiling"] < 1
    assert all(row["forced_frac"] == 0 for row in rows.values()), "what is forced in fp32 is drawn anyway"

    recording = read_recording(tmp_path / "recording.jsonl", "--recording")
    assert sorted(rollout.policy for rollout in recording) == sorted(
        2 * [own for own in strategies if own != "plain" and not own.startswith("stock")]
    )
    for one in recording:
        drafted = sum(sum(step.drafted) for step in one.steps)
        assert one.policy not in ("off", "eagle:2") or (drafted > 0) == (one.policy == "eagle:2")
        # A step gives each of its requests a token; the first ones came of steps that read prompts.
        assert 0 < sum(step.num_running for step in one.steps) < sum(one.response_tokens)
    assert set(fit_model(recording).drafters) == {"eagle", "suffix"}


def test_a_replay_forces_the_tokens_of_its_texts_and_counts_other_draws():
    drawn = torch.tensor([7, 7, 7, 9, 7])
    batch = SimpleNamespace(req_ids=["a-1", "b-1", "c-1"], num_prompt_tokens=[4, 6, 5])
    requests = {
        f"{name}-1": SimpleNamespace(sampling_params=SimpleNamespace(extra_args={"name": name})) for name in "abc"
    }
    engine = SimpleNamespace(
        runner=SimpleNamespace(input_batch=batch, requests=requests),
        sampler=SimpleNamespace(draw=lambda *_: drawn.clone()),
    )
    replay = Replay(engine)
    rows, positions = np.array([0, 0, 0, 1, 2]), np.array([5, 6, 7, 6, 5])
    assert engine.sampler.draw(None, None, rows, None, positions).tolist() == drawn.tolist()
    replay.texts = {"a": (1, 2, 3), "b": (9,)}
    assert engine.sampler.draw(None, None, rows, None, positions).tolist() == [2, 3, 7, 9, 7]
    assert replay.take_counts() == {"num_drawn": 2, "num_forced": 1}


def test_rl_is_the_same_run_with_and_without_speculation(model, head, tmp_path):
    common = {"train_iters": 2, "eval_num_samples": 0, "rollout_max_response_tokens": 60, "rl_optimizer_steps": 1}
    drafting = {"spec_drafter": head, "spec_strategy": "adaptive:4"}
    outputs = [
        run_forked("pretrain_rl", flags(model, tmp_path / name, **common, **extra))
        for name, extra in (("plain", {}), ("spec", drafting))
    ]
    plain, spec = records(tmp_path / "plain"), records(tmp_path / "spec")
    assert len(plain) == 3, outputs[0][-3000:]
    for first, second in zip(plain, spec, strict=True):
        # Whatever speculation adds are metrics of its own; rounding of other batch shapes is far below these digits.
        assert {name: pytest.approx(value, rel=1e-3, abs=1e-4) for name, value in first.items()} == {
            name: second[name] for name in first
        }
    assert spec[1]["spec/eagle/num_drafts"] > 0
    assert spec[1]["spec/acceptance_length"] >= 1
    assert "spec/acceptance_length" not in plain[1]


def test_rl_is_the_same_run_where_responses_move_between_replicas(model, tmp_path):
    # One prompt for two replicas: one of them has nothing to do but what it takes over.
    common = {
        "train_iters": 2, "eval_num_prompts": 0, "rl_prompts_per_iteration": 1, "rl_optimizer_steps": 1,
        "rollout_max_response_tokens": 150,
    }  # fmt: skip
    runs = []
    for program, name in (("pretrain_rl", "off"), ("tests.e2e.generous", "on")):
        run_forked(program, flags(model, tmp_path / name, **common, rollout_consolidate_tail=name))
        runs.append(records(tmp_path / name))
    off, on = runs
    assert [len(run) for run in runs] == [3, 3]
    for first, second in zip(off, on, strict=True):
        for name in first:
            if name.startswith(("rl/", "policy/", "reward/")) and not name.endswith("_s"):
                assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-4), name
    assert all(record["rollout/moved_responses"] >= 1 for record in on[1:])
    assert not any("rollout/moved_responses" in record for record in off)


def test_idle_ranks_train_the_drafter_and_the_run_is_the_same(model, head, tmp_path):
    common = {
        "train_iters": 3, "eval_num_samples": 0, "rollout_max_response_tokens": 60, "rl_optimizer_steps": 1,
        "spec_drafter": head, "spec_strategy": "eagle:3", "spec_hidden_states_mib": 16,
        # Groups of unequal length leave a rank a tail now and then.
        "rl_prompts_per_iteration": 4, "drafter_starts_per_step": 32,
    }  # fmt: skip
    outputs = [
        run_forked("pretrain_rl", flags(model, tmp_path / name, **common, spot_training=name), timeout_s=280)
        for name in ("off", "on")
    ]
    off, on = records(tmp_path / "off"), records(tmp_path / "on")
    assert len(off) == len(on) == 4, outputs[1][-3000:]
    for first, second in zip(off, on, strict=True):
        for name in first:
            if name.startswith(("rl/", "policy/", "eval/")) and not name.endswith("_s"):
                assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-4), name
    assert not any(name.startswith("spot/") for record in off for name in record)
    assert sum(record.get("spot/steps", 0) for record in on) >= 1, outputs[1][-3000:]
    assert all(record["spot/failed_ranks"] == 0 for record in on[1:])

    # Resumed from its second checkpoint, the run drafts with the head that it had then.
    save = tmp_path / "on"
    shutil.rmtree(save / "iter_0000003")
    version = read_tail_state(save / "iter_0000002")["version"]
    output = run_forked("pretrain_rl", flags(model, save, **common, spot_training="on"), timeout_s=280)
    assert f"the drafter goes on as version {version}" in output, output[-3000:]
    assert records(save)[3]["spec/drafter_version"] == version
    assert "speculation goes on with what it learned under --spec-strategy eagle:3" in output, output[-3000:]


def test_tensor_parallel_replicas_train_the_drafter_and_the_run_is_the_same(model, head, tmp_path):
    common = {
        "train_iters": 2, "eval_num_prompts": 0, "rollout_max_response_tokens": 80, "rl_optimizer_steps": 1,
        "spec_drafter": head, "spec_strategy": "eagle:3", "spec_hidden_states_mib": 16, "drafter_starts_per_step": 16,
        "rollout_tensor_parallel_size": 2, "rl_prompts_per_iteration": 3,
    }  # fmt: skip
    outputs = [
        run_forked("pretrain_rl", flags(model, tmp_path / name, **common, spot_training=name), 4, timeout_s=280)
        for name in ("off", "on")
    ]
    off, on = records(tmp_path / "off"), records(tmp_path / "on")
    assert len(off) == len(on) == 3, outputs[1][-3000:]
    for first, second in zip(off, on, strict=True):
        for name in first:
            if name.startswith(("rl/", "policy/")) and not name.endswith("_s"):
                assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-4), name
    assert max(record.get("spot/ranks_trained", 0) for record in on) == 2, "both ranks of the replica that is idle"
    assert all(record["spot/failed_ranks"] == 0 for record in on[1:])


def test_the_spot_benchmark_compares_training_with_none_and_with_a_bystander(model, head, tmp_path):
    setting = flags(
        model, tmp_path / "run", eval_num_prompts=0, rollout_max_response_tokens=100, spec_drafter=head,
        spec_strategy="eagle:3", spec_hidden_states_mib=16, rl_prompts_per_iteration=3, drafter_starts_per_step=32,
        spot_training="on",
    )  # fmt: skip
    run_forked("tools.bench_spot", [*setting, "--repetitions", "3", "--json", tmp_path / "rows.json"], timeout_s=280)
    found = json.loads((tmp_path / "rows.json").read_text())
    rows = {row["mode"]: row for row in found["rows"]}
    assert list(rows) == ["off", "on", "bystander", "turns"]
    assert {row["repetitions"] for row in rows.values()} == {3}
    # On a busy machine the tails of a tiny model may all be judged too short for a step.
    seen = [one.get("spot/steps", 0) + one.get("spot/ranks_too_late", 0) for one in found["records"]["on"]]
    assert sum(seen) >= 1
    assert rows["on"].get("trained", 0) == sum(one.get("spot/steps", 0) > 0 for one in found["records"]["on"])
    assert "trained" not in rows["off"]
    assert "trained" not in rows["bystander"]
    assert 0 < rows["on"].get("idle_used_frac_of_sums", 1) <= 1
    pairs = [
        on["seconds"] / off["seconds"] for on, off in zip(found["records"]["on"], found["records"]["off"], strict=True)
    ]  # fmt: skip
    assert rows["on"]["collect_vs_off"] == sorted(pairs)[1]
    assert all(one["num_forced"] == 0 for records in found["records"].values() for one in records), "the same text"
    assert all(one["spec/drafter_version"] == 0 for records in found["records"].values() for one in records)
