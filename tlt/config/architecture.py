"""What several components read off a model's config.json in the same way."""


def head_dim(hf_config: dict) -> int:
    """Size of one attention head."""
    return hf_config.get("head_dim") or hf_config["hidden_size"] // hf_config["num_attention_heads"]


def rope_parameters(hf_config: dict) -> dict:
    """Rotary embedding settings: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` before it."""
    rope = dict(hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", hf_config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.pop("type", "default"))
    return rope


def supported_rope(hf_config: dict) -> dict:
    """Rotary embedding settings that the policy's model has; ValueError for others."""
    rope = rope_parameters(hf_config)
    if rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(
            f"--hf-model: rope_type {rope['rope_type']!r} is not supported; allowed are default and llama3"
        )
    return rope
