"""vLLM's own speculation as a baseline: its drafter, its scheduler, its number of drafts; our sampler verifies.

Our sampler takes the place of vLLM's because that one draws from wrong distributions on a CPU above temperature 0
(vllm-project/vllm 55005). `stock-eagle:4` drafts with the first --drafter, `stock-ngram:4` by prompt lookup.
"""

from collections.abc import Sequence

PREFIX = "stock-"
METHODS = ("eagle", "ngram")
MIN_MATCH, MAX_MATCH = 2, 5
"""Tokens that ngram matches."""


def stock_config(strategy: str, heads: Sequence[str] | None, flag: str) -> dict:
    """vLLM's `speculative_config` of `stock-<method>:<draft tokens>`. Raises ValueError naming the flag."""
    method, _, count = strategy.removeprefix(PREFIX).partition(":")
    if method not in METHODS or not count.isdigit() or int(count) < 1:
        raise ValueError(f"{flag}: {PREFIX}<method>:<draft tokens> with a method of {METHODS}, got {strategy!r}")
    config: dict = {"method": method, "num_speculative_tokens": int(count)}
    if method == "ngram":
        return config | {"prompt_lookup_min": MIN_MATCH, "prompt_lookup_max": MAX_MATCH}
    if not heads:
        raise ValueError(f"{flag}: {strategy} needs --drafter")
    return config | {"model": heads[0]}


def make_stock_engine(strategy: str, config: dict, make):
    """The engine that `make` builds without speculation, with vLLM's instead, counted under the strategy's name."""
    import tlt.rollout.vllm.engine as ours
    from tlt.rollout.vllm.drafting import request_name
    from tlt.rollout.vllm.ledger import DraftLedger, Proposal
    from tlt.rollout.vllm.speculation import NoSpeculation

    class Proposals(dict):
        """Whatever is verified was drafted by vLLM."""

        def __missing__(self, request_id: str) -> Proposal:
            name = request_name(engine.runner, request_id)
            return Proposal(drafter=strategy, request_name=name, token_ids=[])

    class StockLedger(DraftLedger):
        def begin(self) -> None:
            super().begin()
            self.proposals = Proposals()

    class StockSpeculation(NoSpeculation):
        def __init__(self) -> None:
            self.ledger = StockLedger()

        def begin(self, prompts) -> None:
            self.ledger.begin()

        def report(self, stats) -> None:
            stats.acceptance = dict(self.ledger.stats)

    original = ours.speculative_config
    ours.speculative_config = lambda max_draft_tokens: config
    try:
        engine = make()
    finally:
        ours.speculative_config = original
    engine.speculation = StockSpeculation()
    engine.sampler.ledger = engine.requests.ledger = engine.speculation.ledger
    return engine
