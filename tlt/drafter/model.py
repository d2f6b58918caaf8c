"""EAGLE-style drafter: one decoder layer over [token embedding, target hidden state]; one module trains and drafts.

Embedding and LM head are the target's own, frozen and not part of this module (Li et al., EAGLE, arXiv 2401.15077). At
position t the input is the target's last hidden state h_t (after its final norm) and the embedding of token t + 1;
the output takes the place of h_{t+1}, so the LM head on it predicts token t + 2. Weight names and shapes are those of
vLLM's method `eagle` (a Llama layer without input norm), whatever the target's architecture.

A head with `aux_layers` reads three layers of the target instead of the last one, fused to H (Li et al., EAGLE-3,
arXiv 2503.01840); what it reads of its own outputs, and all that follows, is the same. Stock vLLM does not load it.

Shapes: T tokens, H hidden, D head dimension.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import rms_norm, silu

from tlt.config.architecture import head_dim, rope_parameters
from tlt.drafter.aux_layers import NUM_AUX_LAYERS, check_aux_layers
from tlt.types import AUX, LAST

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(q [T, heads, D], k and v [T, key-value heads, D]) -> [T, heads, D]: over packed sequences, or an engine's cache."""

Rows = torch.Tensor
"""[N] int64: rows of T."""

WEIGHTS = "model.safetensors"
DRAFT_TOKEN_IDS = "draft_token_ids"
"""List in config.json: tokens that may be drafted; without it all may. Not a tensor, which stock vLLM would refuse."""
AUX_LAYERS = "aux_hidden_state_layers"
"""List in config.json: numbers of the layers that are read (aux_layers.py); without it the last hidden state is."""


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Sizes of a head, taken from its target's config."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: dict
    max_position_embeddings: int

    @classmethod
    def of_target(cls, hf_config: dict) -> "HeadShape":
        """From a target's config.json (Llama, Qwen2, Qwen3), or from a head's own."""
        heads = hf_config["num_attention_heads"]
        return cls(
            hidden_size=hf_config["hidden_size"],
            intermediate_size=hf_config["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=hf_config.get("num_key_value_heads") or heads,
            head_dim=head_dim(hf_config),
            rms_norm_eps=hf_config["rms_norm_eps"],
            rope_parameters=rope_parameters(hf_config),
            max_position_embeddings=hf_config["max_position_embeddings"],
        )


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)  # autocast leaves it float32


class Rotary(nn.Module):
    """Rotary embedding, rotated by halves as in Llama; frequencies as transformers computes them for the config."""

    def __init__(self, shape: HeadShape):
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        config = LlamaConfig(
            hidden_size=shape.hidden_size, num_attention_heads=shape.num_attention_heads, head_dim=shape.head_dim,
            rope_parameters=shape.rope_parameters, max_position_embeddings=shape.max_position_embeddings,
        )  # fmt: skip
        embedding = LlamaRotaryEmbedding(config)
        positions = torch.arange(shape.max_position_embeddings, dtype=torch.float32)
        angles = positions[:, None] * embedding.inv_freq.float()
        scale = float(embedding.attention_scaling)
        self.register_buffer("cos", angles.cos() * scale, persistent=False)  # [positions, D / 2]
        self.register_buffer("sin", angles.sin() * scale, persistent=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [T, heads, D]; cos and sin [T, 1, D / 2] float32."""
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: HeadShape):
        super().__init__()
        self.shape = shape
        width, kv_width = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, rotary: Rotary, cos: torch.Tensor, sin: torch.Tensor, attend: Attend, rows: slice | Rows
    ) -> torch.Tensor:
        q, k, v = (
            project(inputs).unflatten(-1, (-1, self.shape.head_dim))
            for project, inputs in ((self.q_proj, x[rows]), (self.k_proj, x), (self.v_proj, x))
        )
        return self.o_proj(attend(rotary(q, cos[rows], sin[rows]), rotary(k, cos, sin), v).flatten(1))


class MLP(nn.Module):
    def __init__(self, shape: HeadShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A Llama layer without input norm: its input is no residual stream."""

    def __init__(self, shape: HeadShape):
        super().__init__()
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(
        self, x: torch.Tensor, rotary: Rotary, cos: torch.Tensor, sin: torch.Tensor, attend: Attend, rows: slice | Rows
    ) -> torch.Tensor:
        x = x[rows] + self.self_attn(x, rotary, cos, sin, attend, rows)
        return x + self.mlp(self.post_attention_layernorm(x))


class Fuse(nn.Linear):
    """[T, 3 H] states of three layers -> [T, H]. Each is scaled to a root mean square of 1 first, as the final norm
    does with the last one: the residual stream grows by orders of magnitude over the layers."""

    def __init__(self, shape: HeadShape):
        super().__init__(NUM_AUX_LAYERS * shape.hidden_size, shape.hidden_size, bias=False)
        self.eps = shape.rms_norm_eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states.unflatten(-1, (NUM_AUX_LAYERS, -1))
        return super().forward(rms_norm(states, states.shape[-1:], eps=self.eps).flatten(-2))


class EagleHead(nn.Module):
    """`fc` and one layer. `draft_token_ids` names the tokens it may draft (None: all).

    `fuse` makes of the target's states that are read ([T, H] of `reads` LAST, [T, 3 H] of AUX) what `forward` takes.
    """

    def __init__(
        self, shape: HeadShape, *, draft_token_ids: torch.Tensor | None = None, aux_layers: tuple[int, ...] = ()
    ):  # fmt: skip
        super().__init__()
        self.shape = shape
        self.fc = nn.Linear(2 * shape.hidden_size, shape.hidden_size, bias=False)
        self.layers = nn.ModuleList([Layer(shape)])
        self.rotary = Rotary(shape)
        self.register_buffer("draft_token_ids", draft_token_ids, persistent=False)  # goes where the head goes
        self.aux_layers = aux_layers
        self.reads = AUX if aux_layers else LAST
        self.fuse = Fuse(shape) if aux_layers else nn.Identity()

    def forward(
        self,
        embeddings: torch.Tensor,  # [T, H] of token t + 1
        hidden_states: torch.Tensor,  # [T, H] fused, of the target at t, or this head's own
        position_ids: torch.Tensor,  # [T]: t
        attend: Attend,
        rows: Rows | None = None,
    ) -> torch.Tensor:
        """[T, H]: what takes the place of the target's hidden state at t + 1; of `rows` [N] only where given, [N, H].

        Other rows then give keys and values alone, a fifth of the work; `attend` gets the queries of `rows`.
        """
        x = self.fc(torch.cat([embeddings, hidden_states], dim=-1))
        cos, sin = self.rotary.cos[position_ids, None], self.rotary.sin[position_ids, None]
        return self.layers[0](x, self.rotary, cos, sin, attend, slice(None) if rows is None else rows)


def initialize(head: EagleHead, *, seed: int, hidden_std: float = 1.0, embedding_std: float = 1.0) -> None:
    """Random weights from which training converges: both halves of `fc` count alike, and the layer starts small.

    Embeddings can be an order smaller than hidden states (SmolLM2: 0.14 against 1.9).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.ndim != 2:
                continue
            std = parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= 0.2
            if name.startswith("fuse."):
                std *= hidden_std  # the head's own outputs, which take this one's place, will be of that size
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
        head.fc.weight[:, : head.shape.hidden_size] *= hidden_std / embedding_std


def save_head(head: EagleHead, folder: Path, *, target_config: dict) -> None:
    """Write a Hugging Face directory. Without `aux_layers` stock vLLM loads it with method `eagle`, and drafts over
    all tokens: those that this head may not draft too."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in head.state_dict().items()}
    config = {
        **asdict(head.shape), "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1,
        "vocab_size": target_config["vocab_size"], "hidden_act": "silu", "tie_word_embeddings": False,
        "rope_theta": head.shape.rope_parameters["rope_theta"],
        "dtype": str(next(head.parameters()).dtype).removeprefix("torch."),
    }  # fmt: skip
    if head.draft_token_ids is not None:
        config[DRAFT_TOKEN_IDS] = head.draft_token_ids.tolist()
    if head.aux_layers:
        config[AUX_LAYERS] = list(head.aux_layers)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    partial = folder / (WEIGHTS + ".tmp")
    save_file(tensors, partial)
    partial.rename(folder / WEIGHTS)


def load_head(folder: Path, *, flag: str, target_config: dict, dtype: torch.dtype) -> EagleHead:
    """The head of a directory. Raises ValueError naming `flag` where it is none, or not one of this target."""
    if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{flag} must be a directory with config.json and {WEIGHTS} of an EAGLE head, got {folder}")
    config = json.loads((folder / "config.json").read_text())
    if config["hidden_size"] != target_config["hidden_size"]:
        raise ValueError(
            f"{flag} {folder}: its hidden size {config['hidden_size']} is not the target's "
            f"({target_config['hidden_size']})"
        )
    ids, layers = config.get(DRAFT_TOKEN_IDS), config.get(AUX_LAYERS, ())
    if AUX_LAYERS in config:
        what = f"{flag} {folder / 'config.json'}: {AUX_LAYERS}"
        layers = check_aux_layers(layers, what, num_layers=target_config["num_hidden_layers"])
    shape = HeadShape.of_target(config)
    # A head from elsewhere may say less than its target's context: it drafts worse there, but must have the angles.
    context = max(shape.max_position_embeddings, target_config["max_position_embeddings"])
    head = EagleHead(
        replace(shape, max_position_embeddings=context),
        draft_token_ids=None if ids is None else torch.tensor(ids),
        aux_layers=layers,
    )
    missing, unexpected = head.load_state_dict(read_tensors(folder), strict=False)
    if missing or unexpected:
        raise ValueError(f"{flag} {folder}: weights missing {missing}, not of an EAGLE head {unexpected}")
    return head.to(dtype).requires_grad_(False)


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a head's directory, but for frozen copies of embedding and LM head, which some tools write."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = file.keys()
        frozen = ("embed_tokens.weight", "lm_head.weight")
        return {name: file.get_tensor(name) for name in names if not name.endswith(frozen)}
