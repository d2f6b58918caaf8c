"""Refuses engine settings under which a response would not have the policy's distribution."""

from collections.abc import Mapping

REFUSED = {
    "rejection_sample_method": "vLLM's `synthetic` and `fly` accept drafts that the policy would not have drawn; "
    "verification is this project's own (tlt/spec/verification.py)",
    "synthetic_acceptance_rates": "acceptance would be invented",
    "synthetic_acceptance_length": "acceptance would be invented",
    "typical_acceptance": "typical acceptance keeps drafts by a threshold, not by their probability",
    "posterior_threshold": "typical acceptance keeps drafts by a threshold, not by their probability",
    "posterior_alpha": "typical acceptance keeps drafts by a threshold, not by their probability",
    "min_p": "the trainer has no such distribution, and vLLM does not verify drafts under it",
    "logit_bias": "the trainer has no such distribution, and vLLM does not verify drafts under it",
    "presence_penalty": "the distribution would depend on the text so far in a way that the trainer does not know",
    "frequency_penalty": "the distribution would depend on the text so far in a way that the trainer does not know",
    "repetition_penalty": "the distribution would depend on the text so far in a way that the trainer does not know",
    "bad_words": "the trainer has no such distribution",
    "logits_processors": "the trainer has no such distribution",
    "speculative_config": "drafters are configured by --spec-* and are verified by this project's own sampler",
    "async_scheduling": "the strategy of an engine step is decided between steps",
    "data_parallel_size": "vLLM switches adaptive speculation off; replicas are engines of their own",
}
"""Setting of vLLM -> why it is refused."""


def refuse_lossy(settings: Mapping[str, object], flag: str) -> None:
    """Raises ValueError naming the flag, the setting and the reason."""
    for name in settings:
        if name in REFUSED:
            raise ValueError(f"{flag} must not set {name} (got {settings[name]!r}): {REFUSED[name]}")
