"""What may be chosen for an engine step: `<method>:<draft tokens>` or `off`."""

from tlt.types import OFF, SpecStrategy

ADAPTIVE = "adaptive"
"""Each request gets the drafter and the length that pay for it (tlt/drafter/router.py), at most so many tokens."""
METHODS = ("eagle", "prompt_lookup", "suffix", ADAPTIVE)
MAX_DRAFT_TOKENS = 32


def parse_strategy(text: str, flag: str, *, methods: tuple[str, ...] = METHODS) -> SpecStrategy:
    """Raises ValueError naming the flag."""
    if text == "off":
        return OFF
    method, _, count = text.partition(":")
    if method not in methods or not count.isdigit() or not 1 <= int(count) <= MAX_DRAFT_TOKENS:
        raise ValueError(
            f"{flag} must be `off` or `<method>:<draft tokens>` with a method of {', '.join(methods)} and 1 to "
            f"{MAX_DRAFT_TOKENS} tokens, got {text!r}"
        )
    return SpecStrategy(method=method, num_draft_tokens=int(count))


class FixedStrategy:
    """One strategy while at most `max_running_requests` run, off above; a pure function of what all ranks know."""

    def __init__(self, strategy: SpecStrategy, *, max_running_requests: int | None = None):
        self.strategy = strategy
        self.max_running_requests = max_running_requests

    @property
    def max_draft_tokens(self) -> int:
        """No step drafts more; 0 means that speculation is never on."""
        return self.strategy.num_draft_tokens

    def choose(self, num_running: int) -> SpecStrategy:
        """For an engine step with so many running requests."""
        if self.max_running_requests is not None and num_running > self.max_running_requests:
            return OFF
        return self.strategy
