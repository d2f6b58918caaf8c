"""Every kind of bad input gives one line that names the flag or file, what it got and what is allowed."""

import json

import pytest

from pretrain_rl import main
from tests.e2e.runs import flags
from tlt.manifest import digests, write_manifest

pytestmark = [pytest.mark.engine, pytest.mark.megatron]


@pytest.fixture
def refused(tiny_models, tmp_path, capsys, monkeypatch):
    """Runs main() with overridden flags as one of `world_size` ranks; returns the error line."""
    monkeypatch.setenv("RANK", "0")

    def run(world_size: int = 2, kind: str = "llama", **overrides) -> str:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        arguments = flags(tiny_models[kind], tmp_path / "run", **{"dry_run": True, **overrides})
        assert main([a for a in arguments if a != "--no-dry-run"]) == 2
        (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("pretrain_rl.py: error:")]
        return line

    return run


def test_the_valid_configuration_passes(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(flags(tiny_models["llama"], tmp_path / "run", dry_run=True)) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"hf_model": "nowhere"}, ["--hf-model", "nowhere", "existing directory"]),
        ({"tensor_model_parallel_size": 3, "world_size": 3}, ["--tensor-model-parallel-size", "4 attention heads"]),
        ({"tensor_model_parallel_size": 4, "world_size": 4}, ["--tensor-model-parallel-size", "2 key-value heads"]),
        ({"pipeline_model_parallel_size": 3, "world_size": 3}, ["--pipeline-model-parallel-size", "4 layers"]),
        ({"tensor_model_parallel_size": 2, "world_size": 3}, ["divisor of the world size (3 ranks)", "got 2"]),
        ({"rollout_tensor_parallel_size": 4}, ["--rollout-tensor-parallel-size", "got 4", "(2 ranks)"]),
        ({"rollout_max_response_tokens": 600}, ["--rollout-max-response-tokens", "600", "context length of 512"]),
        ({"rollout_max_model_len": 136}, ["prompt reasoning-gym:chain_sum/", "tokens", "at most 16"]),
        ({"rollout_temperature": 0}, ["--rollout-temperature", "above 0"]),
        ({"data_train": "gsm8k"}, ["--data-train", "gsm8k", "jsonl:<file>"]),
        ({"data_train": 'reasoning-gym:chain_sum:{"terms": 2}'}, ["--data-train", "terms"]),
        ({"data_train": "reasoning-gym:chain_sum:{2"}, ["--data-train", "not JSON", "{2"]),
        ({"data_train": "jsonl:missing.jsonl"}, ["--data-train", "missing.jsonl", "not a file"]),
        ({"train_iter": 3}, ["--train-iter"]),
        ({"spec_strategy": "eagle:4"}, ["--spec-strategy eagle:4", "--spec-drafter"]),
        ({"spec_strategy": "fly:4"}, ["--spec-strategy", "eagle, prompt_lookup", "fly:4"]),
        ({"spec_drafter": "nowhere"}, ["--spec-drafter", "nowhere", "config.json"]),
        ({"rollout_engine_args": '{"speculative_config": {}}'}, ["--rollout-engine-args", "speculative_config"]),
        ({"rollout_engine_args": "{"}, ["--rollout-engine-args", "JSON object"]),
        ({"rollout_engine_args": '{"dtype": "auto"}'}, ["--rollout-engine-args", "dtype", "other flags"]),
        ({"lr": "fast"}, ["--lr", "fast"]),
        ({"fault": "sigkill@lunch/1"}, ["--fault", "sigkill@lunch/1", "weight_sync"]),
        ({"dry_run": False}, ["torchrun"]),
    ],
)
def test_bad_flags_are_named(refused, overrides, parts, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    line = refused(**overrides)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        (['{"prompt": "1+1", "answer": 2}', '{"prompt": "2+2", "answer"'], ["line 2", "not JSON"]),
        (['{"prompt": "1+1"}'], ["line 1", "answer"]),
        (['{"question": " ", "answer": 1}'], ["line 1", "prompt"]),
        (['["1+1", 2]'], ["line 1", "object", "list"]),
        ([""], ["holds no problem"]),
        ([json.dumps({"prompt": "x" * 600, "answer": 1})], ["/1 has", "tokens"]),
    ],
)
def test_a_bad_line_of_a_file_is_named(refused, tmp_path, lines, parts):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(lines) + "\n")
    line = refused(data_train=f"jsonl:{path}", eval_num_prompts=0)
    assert "problems.jsonl" in line
    for part in parts:
        assert part in line


def test_a_folder_with_a_run_is_not_overwritten(refused, tmp_path):
    checkpoint = tmp_path / "run" / "iter_0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run_state.json").write_text(json.dumps({"format": 2, "iteration": 3}))
    write_manifest(checkpoint, digests(checkpoint))
    assert "--save" in refused(load=None)
    assert "--seed was None, is 1234" in refused()
