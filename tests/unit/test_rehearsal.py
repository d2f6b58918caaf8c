"""--dry-run with a config.json alone: what is said, and what is refused."""

import json
import logging

import pytest

from tests.model_facts import FACTS, write_config
from tlt.arguments import parse
from tlt.config import RunConfig
from tlt.rehearsal import rehearse


def config_of(folder, *flags: str) -> RunConfig:
    required = ["--hf-model", str(folder), "--save", "s", "--data-train", "reasoning-gym:chain_sum"]
    sizes = ["--rollout-max-model-len", "4096", "--dry-run-gpu-gib", "79", "--tensor-model-parallel-size", "4"]
    return parse([*required, *sizes, "--use-distributed-optimizer", *flags], "")


def test_the_table_and_what_was_not_checked_are_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = rehearse(config_of(write_config("qwen2.5_7b", tmp_path)), world_size=16, ranks_per_node=8)
    assert "16 ranks on 2 nodes: 16 rollout replicas, 64 responses an iteration, 4.0 a replica" in caplog.text
    assert str(found).splitlines()[0] in caplog.text
    assert "not checked: prompts" in caplog.text


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--data-train", "jsonl:absent.jsonl"], ["--data-train", "absent.jsonl"]),
        (["--eval-sources", "gsm8k"], ["--eval-sources", "gsm8k"]),
        (["--data-exclude", "absent.jsonl"], ["--data-exclude", "absent.jsonl"]),
        (["--rollout-engine-args", "{bad"], ["--rollout-engine-args", "JSON object", "{bad"]),
        (["--rollout-engine-args", '{"quantization": "fp8"}'], ["--rollout-engine-args", "quantization"]),
        (["--fault", "bogus"], ["--fault", "bogus"]),
        (["--fault", "slow@update/1/8"], ["--fault", "no rank 8"]),
        (["--spec-strategy", "fly:4"], ["--spec-strategy", "fly:4"]),
        (["--spec-drafter", "absent"], ["--spec-drafter", "absent"]),
        (["--tensor-model-parallel-size", "8"], ["28 attention heads", "got 8"]),
        (["--rollout-tensor-parallel-size", "2"], ["ranks of a node (1)", "got 2"]),
        (["--dry-run-gpu-gib", "32", "--rollout-gpu-memory-utilization", "0.9"], ["--dry-run-gpu-gib (32.0)"]),
    ],
)
def test_what_would_not_do_is_named(tmp_path, flags, parts):
    config = config_of(write_config("qwen2.5_7b", tmp_path), *flags)
    with pytest.raises(ValueError, match=".") as caught:
        rehearse(config, world_size=8, ranks_per_node=1)
    for part in parts:
        assert part in str(caught.value)


def test_a_rotary_embedding_that_the_policy_lacks_is_refused(tmp_path):
    folder = write_config("qwen2.5_7b", tmp_path)
    facts = FACTS["qwen2.5_7b"] | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="rope_type 'yarn' is not supported"):
        rehearse(config_of(folder), world_size=8, ranks_per_node=8)
