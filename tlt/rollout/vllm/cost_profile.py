"""What engine steps and drafters' passes cost on this machine, measured before the first rollout.

A few short responses to a meaningless prompt, in batches of several sizes, with drafts of several lengths that cost
nothing to make and do not stand: so steps of many numbers of verified tokens are timed in seconds, and a policy that
weighs prices has them from its first step on. What drafts are worth is not learned: such text says nothing about it.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

from tlt.drafter.buffer import HiddenStateBuffer
from tlt.rollout.vllm.learned_drafter import DraftRequest
from tlt.rollout.vllm.ledger import Proposal
from tlt.spec.cost_policy import CostModelPolicy
from tlt.spec.strategy import ADAPTIVE, DecodeStep, LearnsNothing, StrategyPolicy
from tlt.spec.watchdog import Watchdog
from tlt.types import OFF, Prompt, SamplingConfig, SpecStrategy

logger = logging.getLogger(__name__)

FILLER = "filler"
PROMPT_TOKENS = 32
LENGTHS = (0, 1, 3)
"""Draft tokens of a request; the longest that the engine verifies besides."""
PASS_LENGTH = 2
"""Draft tokens of a head: its second pass is one over a row for each request."""
TIMES = 3
"""Steps of each batch and length: the median of three survives one outlier."""
MAX_VERIFIED = 2
"""Tokens of a step at most, for each request that may run."""


class FillerDrafter:
    """Drafts a request's last token again and again."""

    def __init__(self, runner: Any):
        self.runner = runner

    def draft(self, requests: Sequence[DraftRequest]) -> dict[str, Proposal]:
        return {
            request.request_id: Proposal(
                drafter=FILLER, request_name=request.name, temperature=request.temperature,
                token_ids=[int(self.runner.input_batch.token_ids_cpu[request.row, request.num_tokens - 1])]
                * request.num_draft_tokens,
            )
            for request in requests
        }  # fmt: skip

    def forget(self, request_ids: Sequence[str]) -> None:
        """Nothing is kept."""


class InTurn(LearnsNothing):
    """Strategies one after the other, whatever runs."""

    def __init__(self, strategies: Sequence[SpecStrategy]):
        self.strategies = strategies
        self.max_draft_tokens = max(strategy.num_draft_tokens for strategy in strategies)
        self._num_steps = -1

    def choose(self, num_running: int) -> SpecStrategy:
        self._num_steps += 1
        return self.strategies[self._num_steps % len(self.strategies)]


def batches(max_num_seqs: int) -> list[int]:
    """Sizes that are tried: powers of 4, and the largest."""
    return sorted({4**power for power in range(8) if 4**power < max_num_seqs} | {max_num_seqs})


def strategies(batch: int, *, max_num_seqs: int, max_draft_tokens: int, heads: Sequence[str]) -> list[SpecStrategy]:
    """That are tried with so many requests."""
    lengths = sorted({*LENGTHS, max_draft_tokens})
    tried = [
        SpecStrategy(method=FILLER, num_draft_tokens=length) if length else OFF
        for length in lengths
        if length <= max_draft_tokens and (length == 0 or batch * (1 + length) <= MAX_VERIFIED * max_num_seqs)
    ]
    return tried + [SpecStrategy(method=head, num_draft_tokens=min(PASS_LENGTH, max_draft_tokens)) for head in heads]


def asks_prices(policy: StrategyPolicy) -> bool:
    """Whether anything that decides weighs what steps cost."""
    return isinstance(policy, CostModelPolicy) or ADAPTIVE in {arm.method for arm in policy.arms(1)}


@contextmanager
def apart(speculation: Any) -> Iterator[None]:
    """Times are learned as ever; nothing else is: no acceptance, no hidden states, no verdict on a head."""
    kept_ledger = speculation.ledger.on_verified, speculation.ledger.on_compared
    kept = {name: getattr(speculation, name) for name in ("policy", "buffer", "watchdog", "on_step")}
    speculation.ledger.on_verified = lambda proposal, num_accepted: None
    speculation.ledger.on_compared = lambda proposal, rates, count: None
    speculation.buffer = HiddenStateBuffer(0)
    speculation.watchdog = Watchdog(collapse_frac=0.0)
    speculation.drafting.drafters[FILLER] = FillerDrafter(speculation.runner)
    try:
        yield
    finally:
        del speculation.drafting.drafters[FILLER]
        speculation.ledger.on_verified, speculation.ledger.on_compared = kept_ledger
        for name, value in kept.items():
            setattr(speculation, name, value)


def filler_prompts(engine: Any, count: int, *, name: str, seed: int) -> list[Prompt]:
    """So many prompts of random tokens for each replica, a function of the seed; `name`, a source and perhaps more
    behind a slash, begins their ids."""
    random, vocabulary = Random(seed), engine.runner.get_model().config.vocab_size
    return [
        Prompt(
            prompt_id=f"{name}/{index}", source=name.partition("/")[0], text="", answer={},
            token_ids=tuple(random.randrange(vocabulary) for _ in range(PROMPT_TOKENS)),
        )
        for index in range(count * engine.num_replicas)
    ]  # fmt: skip


def measure_costs(engine: Any, *, temperature: float, seed: int) -> None:
    """Time steps of `engine`, on all replicas. Collective over all ranks; all must call."""
    speculation, config = engine.speculation, engine.config
    policy = speculation.policy
    begin_s = time.perf_counter()

    def learn(step: DecodeStep) -> None:
        if step.strategy.method not in speculation.heads:  # an arm's own record is of the policy's text alone
            policy.observe(step)

    with apart(speculation):
        speculation.on_step = learn
        for batch in batches(config.max_num_seqs):
            tried = strategies(
                batch, max_num_seqs=config.max_num_seqs, max_draft_tokens=speculation.router.max_draft_tokens,
                heads=list(speculation.heads),
            )  # fmt: skip
            speculation.policy = InTurn(tried)
            prompts = filler_prompts(engine, 1, name=f"cost-profile/{batch}", seed=seed * 1000 + batch)
            sampling = SamplingConfig(
                temperature=temperature, max_response_tokens=TIMES * len(tried) + 1, ignore_eos=True
            )
            engine.generate(prompts, sampling, group_size=batch, seed=seed, on_finished=lambda *_: None)
    speculation.begin([])
    logger.info("costs of engine steps measured in %.1f s", time.perf_counter() - begin_s)
