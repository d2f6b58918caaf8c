"""What several components read off a model's config.json in the same way."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Feed-forward layers of a mixture of experts: a router sends each token through a few of them."""

    num: int
    per_token: int
    width: int
    """Feed-forward width of one expert."""
    renormalizes: bool
    """Whether the chosen experts' probabilities are made to add up to 1."""


def experts_of(hf_config: dict) -> Experts | None:
    """Of a Qwen3-MoE model, all of whose layers have them (`read_hf_config` refuses others); None for a dense one."""
    if hf_config["model_type"] != "qwen3_moe":
        return None
    return Experts(
        num=hf_config.get("num_experts") or hf_config["num_local_experts"],  # transformers 5 writes the latter
        per_token=hf_config["num_experts_per_tok"],
        width=hf_config["moe_intermediate_size"],
        renormalizes=bool(hf_config.get("norm_topk_prob", False)),
    )


def has_qk_norms(hf_config: dict) -> bool:
    """Whether queries and keys are normalised head by head."""
    return hf_config["model_type"] in ("qwen3", "qwen3_moe")


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
