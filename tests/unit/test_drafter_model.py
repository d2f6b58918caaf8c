"""The EAGLE head: against a Llama layer of transformers, from config to file and back, bad directories by name."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention

from tlt.drafter.aux_layers import parse_aux_layers
from tlt.drafter.model import EagleHead, HeadShape, initialize, load_head, save_head
from tlt.types import AUX, LAST

CONFIG = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "vocab_size": 100, "model_type": "llama",
    "num_hidden_layers": 8,
}  # fmt: skip
ROPES = {
    "default": {"rope_theta": 5000.0},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}  # fmt: skip


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def make_head(config: dict, **kwargs) -> EagleHead:
    head = EagleHead(HeadShape.of_target(config), **kwargs)
    initialize(head, seed=3)
    with torch.no_grad():
        head.layers[0].post_attention_layernorm.weight.add_(0.1 * torch.randn(64))
    return head


@pytest.mark.parametrize("rope", sorted(ROPES))
def test_the_layer_is_a_llama_layer_without_input_norm(rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = CONFIG | ROPES[rope]
    head = make_head(config)
    llama = LlamaConfig(**{**config, "rope_parameters": head.shape.rope_parameters, "_attn_implementation": "eager"})
    layer = LlamaDecoderLayer(llama, 0)
    missing, unexpected = layer.load_state_dict(head.layers[0].state_dict(), strict=False)
    assert missing == ["input_layernorm.weight"]
    assert not unexpected
    layer.input_layernorm = torch.nn.Identity()
    embeddings, hidden = torch.randn(20, 64), torch.randn(20, 64)
    x = head.fc(torch.cat([embeddings, hidden], -1))[None]
    positions = torch.arange(20)[None]
    mask = torch.full((20, 20), float("-inf")).triu(1)[None, None]
    expected = layer(
        x, attention_mask=mask, position_embeddings=LlamaRotaryEmbedding(llama)(x, positions), position_ids=positions
    )
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(
        head(embeddings, hidden, positions[0], causal), expected.view(20, 64), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("aux_layers", [(), (0, 4, 8)])
@pytest.mark.parametrize("ids", [None, torch.tensor([3, 7, 99])])
def test_a_head_is_written_and_read_back(tmp_path, ids, aux_layers):
    head = make_head(CONFIG, draft_token_ids=ids, aux_layers=aux_layers)
    save_head(head, tmp_path, target_config=CONFIG)
    # A head of the last layer alone is written as it was before there were others: stock vLLM reads it.
    assert ("aux_hidden_state_layers" in json.loads((tmp_path / "config.json").read_text())) == bool(aux_layers)
    assert ("fuse.weight" in load_file(tmp_path / "model.safetensors")) == bool(aux_layers)
    found = load_head(tmp_path, flag="--spec-drafter", target_config=CONFIG, dtype=torch.float32)
    assert found.shape == head.shape
    assert (found.aux_layers, found.reads) == (aux_layers, AUX if aux_layers else LAST)
    for (name, a), (other, b) in zip(head.named_parameters(), found.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
        assert not b.requires_grad
    assert (found.draft_token_ids is None) if ids is None else torch.equal(found.draft_token_ids, ids)


def test_a_directory_that_is_no_head_of_this_target_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="--spec-drafter must be a directory with config.json"):
        load_head(tmp_path, flag="--spec-drafter", target_config=CONFIG, dtype=torch.float32)
    save_head(make_head(CONFIG), tmp_path, target_config=CONFIG)
    with pytest.raises(ValueError, match="its hidden size 64 is not the target's"):
        load_head(tmp_path, flag="--spec-drafter", target_config=CONFIG | {"hidden_size": 32}, dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    for bad in ({"intermediate_size": 48}, {"num_key_value_heads": 4}):
        (tmp_path / "config.json").write_text(json.dumps(config | bad))
        with pytest.raises((ValueError, RuntimeError), match="size mismatch|weights missing"):
            load_head(tmp_path, flag="--spec-drafter", target_config=CONFIG, dtype=torch.float32)


def test_three_layers_count_alike_whatever_the_size_of_their_states():
    head = make_head(CONFIG, aux_layers=(2, 4, 5))
    states = torch.randn(20, 3, 64)
    fused = head.fuse(states.flatten(1))
    assert fused.shape == (20, 64)
    assert 0.7 < float(fused.std()) < 1.4
    larger = states * torch.tensor([0.1, 10.0, 300.0])[:, None]
    torch.testing.assert_close(head.fuse(larger.flatten(1)), fused, rtol=1e-2, atol=1e-2)  # but for the norm's epsilon
    plain = make_head(CONFIG)
    assert torch.equal(plain.fuse(states[:, 0]), states[:, 0])


@pytest.mark.parametrize(
    "layers", [[2, 4], [1, 2, 3, 4], [4, 2, 5], [2, 2, 5], [-1, 2, 5], [2, 4, 9], [1.0, 2, 3], [True, 2, 3], 3, []]
)  # fmt: skip
def test_layers_that_the_target_has_not_are_refused_by_file(tmp_path, layers):
    save_head(make_head(CONFIG, aux_layers=(2, 4, 5)), tmp_path, target_config=CONFIG)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"aux_hidden_state_layers": layers}))
    with pytest.raises(ValueError, match="must be 3 rising numbers from 0 to 8") as caught:
        load_head(tmp_path, flag="--spec-drafter", target_config=CONFIG, dtype=torch.float32)
    assert str(caught.value).startswith(f"--spec-drafter {path}: aux_hidden_state_layers")


def test_a_head_whose_config_and_weights_disagree_on_layers_is_refused(tmp_path):
    save_head(make_head(CONFIG, aux_layers=(2, 4, 5)), tmp_path, target_config=CONFIG)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["aux_hidden_state_layers"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="not of an EAGLE head .'fuse.weight'."):
        load_head(tmp_path, flag="--spec-drafter", target_config=CONFIG, dtype=torch.float32)
    save_head(make_head(CONFIG), tmp_path, target_config=CONFIG)
    path.write_text(json.dumps(config | {"aux_hidden_state_layers": [2, 4, 5]}))
    with pytest.raises(ValueError, match="weights missing .'fuse.weight'."):
        load_head(tmp_path, flag="--spec-drafter", target_config=CONFIG, dtype=torch.float32)


def test_the_flag_of_layers():
    assert parse_aux_layers(None, "--aux-layers", num_layers=30) == ()
    assert parse_aux_layers("default", "--aux-layers", num_layers=30) == (2, 15, 27)
    assert parse_aux_layers("0,15,30", "--aux-layers", num_layers=30) == (0, 15, 30)
    for text in ("", "1,2", "2,1,3", "1,2,31", "a,b,c", "-1,2,3", "1 2 3"):
        with pytest.raises(ValueError, match=r"--aux-layers must be 3 rising numbers from 0 to 30"):
            parse_aux_layers(text, "--aux-layers", num_layers=30)
    with pytest.raises(ValueError, match="--aux-layers default needs a deeper target"):
        parse_aux_layers("default", "--aux-layers", num_layers=6)
