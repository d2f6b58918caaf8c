"""What a head is read out with, from its target's directory."""

from pathlib import Path


def read_rows(model: str, hf_config: dict) -> tuple:
    """(embedding [V, H], output rows [V, H]); one tensor where they are tied."""
    from tlt.rollout.vllm.target_weights import EMBEDDING, output_of, read_weight

    embedding = read_weight(Path(model), EMBEDDING)
    output = output_of(is_tied=hf_config.get("tie_word_embeddings", False))
    return embedding, embedding if output == EMBEDDING else read_weight(Path(model), output)


def make_target(embedding, output, draft_token_ids, *, temperature: float):
    """Target of a head that drafts these tokens; None drafts all."""
    from tlt.drafter.trainer import Target

    rows = output if draft_token_ids is None else output[draft_token_ids]
    return Target(embedding=embedding, output_weight=rows.float(), temperature=temperature)
