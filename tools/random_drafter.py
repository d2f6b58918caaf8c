"""A head of random weights for a model, and its trainer: for what only takes time, whatever the weights."""


def make_trainer(model: str, **config):
    """DrafterTrainer of a head that drafts 512 tokens; `config` are fields of DrafterConfig."""
    import torch

    from tlt.config import DrafterConfig, read_hf_config
    from tlt.drafter.model import EagleHead, HeadShape, initialize
    from tlt.drafter.trainer import DrafterTrainer, Target

    hf_config = read_hf_config(model)
    head = EagleHead(HeadShape.of_target(hf_config), draft_token_ids=torch.arange(512))
    initialize(head, seed=1)
    embedding = torch.randn(hf_config["vocab_size"], hf_config["hidden_size"])
    target = Target(embedding=embedding, output_weight=embedding[:512], temperature=1.0)
    return DrafterTrainer(head, DrafterConfig(**config), target=target, seed=1)


def make_sample(num_prompt_tokens: int, num_tokens: int, hidden_size: int):
    """HiddenStateSample of random tokens and states."""
    import torch

    from tlt.types import HiddenStateSample

    return HiddenStateSample(
        request_id="", token_ids=torch.randint(512, (num_tokens,), dtype=torch.int32), policy_version=0,
        num_prompt_tokens=num_prompt_tokens, last_hidden_states=torch.randn(num_tokens - 1, hidden_size),
    )  # fmt: skip
