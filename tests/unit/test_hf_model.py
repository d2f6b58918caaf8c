"""What --hf-model names is checked before any process group exists, and named."""

import json

import pytest

from tests.model_facts import FACTS, write_config
from tests.tiny_models import write_tokenizer
from tlt.arguments import parse
from tlt.build import Inputs
from tlt.config import read_hf_config
from tlt.data.tokenizer import read_tokenizer, stop_token_ids

DENSE, EXPERTS = FACTS["smollm2_135m"], FACTS["qwen3_30b_a3b"]


def without(facts: dict, name: str) -> str:
    return json.dumps({key: value for key, value in facts.items() if key != name})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json must be a JSON object: Expecting"),
        ("[1]", "config.json must be a JSON object, got a list"),
        (json.dumps(DENSE | {"model_type": "gpt2"}), "a model of type llama"),
        (json.dumps(DENSE | {"hidden_size": "576"}), "hidden_size in config.json .* got '576'"),
        (json.dumps(DENSE | {"vocab_size": 0}), "vocab_size in config.json must be a whole number of at least 1"),
        (json.dumps(DENSE | {"head_dim": 1.5}), "head_dim in config.json"),
        (json.dumps(DENSE | {"rope_scaling": "llama3"}), "rope_scaling in config.json must be an object"),
        *[
            (without(DENSE, name), f"{name} in config.json must be a.* got None")
            for name in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                "max_position_embeddings", "rms_norm_eps",
            )
        ],
        *[
            (without(EXPERTS, name), f"{name} in config.json must be a.* got None")
            for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        ],
    ],
)  # fmt: skip
def test_a_bad_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"(?s)^--hf-model.*{message}"):
        read_hf_config(str(tmp_path))


@pytest.mark.parametrize("model", FACTS)
def test_published_configs_pass(tmp_path, model):
    assert read_hf_config(str(write_config(model, tmp_path))) == FACTS[model]


def test_experts_may_be_counted_under_the_name_of_transformers_5(tmp_path):
    text = without(EXPERTS, "num_experts").replace("{", '{"num_local_experts": 128, ', 1)
    (tmp_path / "config.json").write_text(text)
    assert read_hf_config(str(tmp_path))["num_local_experts"] == 128


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{}", "must be a directory with a tokenizer"),
        ("tokenizer_config.json", "{}", "its tokenizer cannot be read: Couldn't instantiate"),
        ("tokenizer.json", "{", "its tokenizer cannot be read: Expecting"),
    ],
)
def test_a_directory_without_a_tokenizer_that_can_be_read_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"^--hf-model.*{message}") as caught:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_generation_config_is_named(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    assert stop_token_ids(tmp_path, {}, tokenizer) == [tokenizer.eos_token_id]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2')
    with pytest.raises(ValueError, match="^--hf-model.*generation_config.json must be a JSON object"):
        stop_token_ids(tmp_path, {}, tokenizer)


def test_a_run_needs_weights_and_a_dry_run_does_not(tmp_path):
    folder = write_config("smollm2_135m", tmp_path / "model")
    write_tokenizer(folder)
    flags = [
        "--hf-model", str(folder), "--save", str(tmp_path / "run"), "--data-train", "reasoning-gym:gcd",
        "--eval-num-prompts", "0",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--hf-model must be a directory with \*.safetensors files"):
        Inputs(parse(flags, ""), world_size=1, ranks_per_node=1)
    Inputs(parse([*flags, "--dry-run"], ""), world_size=1, ranks_per_node=1)
