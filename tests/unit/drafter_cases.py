"""A small head of random weights, its target and samples for the tests of drafter training."""

from dataclasses import replace

import torch
from torch.nn.functional import scaled_dot_product_attention

from tlt.config import DrafterConfig
from tlt.drafter.batch import whole
from tlt.drafter.model import EagleHead, HeadShape, initialize
from tlt.drafter.trainer import DrafterTrainer, Target
from tlt.types import HiddenStateSample

HIDDEN, VOCABULARY = 32, 50
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "vocab_size": VOCABULARY, "model_type": "llama",
    "rope_theta": 1e4,
}  # fmt: skip
AUX_LAYERS = (1, 4, 7)


def make_sample(length: int, num_prompt_tokens: int, *, seed: int) -> HiddenStateSample:
    generator = torch.Generator().manual_seed(seed)
    return HiddenStateSample(
        request_id=f"{seed}#0", num_prompt_tokens=num_prompt_tokens, policy_version=0,
        token_ids=torch.randint(VOCABULARY, (length,), generator=generator, dtype=torch.int32),
        last_hidden_states=torch.randn(length - 1, HIDDEN, generator=generator),
    )  # fmt: skip


SAMPLES = [make_sample(n, p, seed=n) for n, p in ((9, 3), (20, 5), (3, 1), (31, 12), (6, 5))]
PIECES = [whole(sample) for sample in SAMPLES]


def with_aux_states(sample: HiddenStateSample) -> HiddenStateSample:
    """States of three layers besides, of very different sizes, as those of a residual stream are."""
    generator = torch.Generator().manual_seed(len(sample.token_ids))
    states = torch.randn(len(sample.token_ids) - 1, 3, HIDDEN, generator=generator)
    return replace(sample, aux_hidden_states=(states * torch.tensor([0.1, 3.0, 40.0])[:, None]).flatten(1))


def make_target() -> Target:
    embedding = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(7))
    return Target(embedding=embedding, output_weight=0.3 * embedding[::2], temperature=0.8)


def make_trainer(
    seed: int = 1, group=None, aux_layers: tuple[int, ...] = (), dtype: torch.dtype = torch.float32, **config
) -> DrafterTrainer:  # fmt: skip
    ids = torch.arange(0, VOCABULARY, 2)
    head = EagleHead(HeadShape.of_target(CONFIG), draft_token_ids=ids, aux_layers=aux_layers)
    initialize(head, seed=3)
    config = {"starts_per_step": 64, "num_depths": 3, "deep_frac": 1.0, "micro_step_ms": 60_000, **config}
    return DrafterTrainer(head, DrafterConfig(**config), target=make_target(), seed=seed, group=group, dtype=dtype)


class EngineCache:
    """Keys and values of one request, attended to as an engine does; `rewind` forgets a draft's."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.keys.append(k)
        self.values.append(v)
        key, value = torch.cat(self.keys), torch.cat(self.values)
        past = torch.arange(len(key)) <= torch.arange(len(key) - len(q), len(key))[:, None]
        q, key, value = (x.transpose(0, 1)[None] for x in (q, key, value))
        return scaled_dot_product_attention(q, key, value, attn_mask=past, enable_gqa=True)[0].transpose(0, 1)


def drafted_one_by_one(
    head: EagleHead, target: Target, sample: HiddenStateSample, *, start: int, tokens: list[int]
) -> torch.Tensor:
    """[len(tokens) + 1, H]: the head's outputs for a draft that begins at `start` and goes on with `tokens`, run as
    `LearnedDrafter` does: one pass over all verified positions, then one token at a time on its own output."""
    cache = EngineCache()
    verified = target.embedding[sample.token_ids[1 : start + 2].long()]
    states = head.fuse(getattr(sample, head.reads)[: start + 1])
    outputs = [head(verified, states, torch.arange(start + 1), cache)[-1:]]
    for step, token in enumerate(tokens, start=1):
        outputs.append(head(target.embedding[[token]], outputs[-1], torch.tensor([start + step]), cache))
    return torch.cat(outputs)
