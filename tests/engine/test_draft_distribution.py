"""The joint distribution of a response's first tokens is plain sampling's, whatever kind of drafts is verified.

Two-sample chi-square tests on the real engine (cells pooled to an expected count of at least 5, limit at p = 0.001),
of fixed seeds; a lossy acceptance and vLLM's own sampler on CPU, whose temperatures are uninitialised memory for draft
rows (vllm-project/vllm 55005), must both fail them. One-hot and coupled drafts are tested far more strictly, token by
token, in test_speculation.py.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.engine.engines import generate, make_engine, make_prompts
from tests.engine.test_speculation import write_head
from tests.tiny_models import write_tiny_model
from tests.unit.test_verification import chi_square_limit
from tlt.config import SpecConfig
from tlt.rollout.vllm import sampling as engine_sampling
from tlt.rollout.vllm.ledger import Proposal
from tlt.rollout.vllm.routing import OneForAll
from tlt.spec.cost_model import Prices
from tlt.spec.strategy import FixedStrategy, parse_strategy
from tlt.types import OFF, SamplingConfig

pytestmark = pytest.mark.engine

NUM_TOKENS = 3  # of the joint; drafts follow the first
SAMPLINGS = {
    "T=1.0": SamplingConfig(temperature=1.0, max_response_tokens=NUM_TOKENS + 1, ignore_eos=True),
    "T=0.7": SamplingConfig(temperature=0.7, max_response_tokens=NUM_TOKENS + 1, ignore_eos=True),
    "top-p": SamplingConfig(temperature=1.0, top_p=0.8, max_response_tokens=NUM_TOKENS + 1, ignore_eos=True),
    "top-k": SamplingConfig(temperature=1.0, top_k=5, max_response_tokens=NUM_TOKENS + 1, ignore_eos=True),
}
PROMPT = make_prompts(1)[0]


class Guess:
    """One-hot drafts that are right now and then: the most frequent token at each position of a sample."""

    def __init__(self, sample: Counter):
        positions = [Counter() for _ in range(NUM_TOKENS)]
        for tokens, count in sample.items():
            for position, token in zip(positions, tokens, strict=True):
                position[token] += count
        self.token_ids = [position.most_common(1)[0][0] for position in positions]

    def draft(self, requests):
        num_prompt_tokens = len(PROMPT.token_ids)
        return {
            request.request_id: Proposal(
                drafter="guess", request_name=request.name,
                token_ids=self.token_ids[request.num_tokens - num_prompt_tokens :][: request.num_draft_tokens],
            )
            for request in requests
        }  # fmt: skip

    def forget(self, request_ids) -> None:
        """Has no state."""


class Alternating(OneForAll):
    """Every second request is drafted for by the head, the others by the guess."""

    def plan(self, requests, strategy):
        odd = [request for request in requests if int(request.name[-1]) % 2]
        even = [request for request in requests if not int(request.name[-1]) % 2]
        return OneForAll().plan(odd, strategy) | OneForAll().plan(even, replace(strategy, method="guess"))


class Guessing(OneForAll):
    def plan(self, requests, strategy):
        return OneForAll().plan(requests, replace(strategy, method="guess"))


def joint(engine, sampling: SamplingConfig, num: int, *, seed: int) -> Counter:
    """Counts of the first tokens over `num` responses to one prompt."""
    (group,) = generate(engine, [PROMPT], sampling, group_size=num, seed=seed)
    return Counter(rollout.token_ids[:NUM_TOKENS] for rollout in group.rollouts)


def two_sample_chi_square(first: Counter, second: Counter) -> tuple[float, int]:
    """(statistic, degrees of freedom) of two samples of one size; rare cells are pooled, in an order that no sample
    chose."""
    assert first.total() == second.total()
    cells: list[list[int]] = []
    open_cell = [0, 0]
    for name in sorted(set(first) | set(second)):
        open_cell = [open_cell[0] + first[name], open_cell[1] + second[name]]
        if sum(open_cell) >= 10:  # expected count of each sample: half of it
            cells.append(open_cell)
            open_cell = [0, 0]
    if cells:
        cells[-1] = [a + b for a, b in zip(cells[-1], open_cell, strict=True)]
    return sum((a - b) ** 2 / (a + b) for a, b in cells), len(cells) - 1


def is_rejected(first: Counter, second: Counter) -> bool:
    statistic, df = two_sample_chi_square(first, second)
    assert df > 20, "too few cells: the test shows nothing"
    return statistic > chi_square_limit(df)


def _distributions(rank: int, world_size: int, folder: Path, head: Path, num: int, seeds: list[int]) -> None:
    engine = make_engine(
        folder, spec=SpecConfig(strategy="eagle:3", drafter=(str(head),), drafts="sampled"), max_num_seqs=128
    )  # fmt: skip
    speculation = engine.speculation
    eagle = FixedStrategy(parse_strategy("eagle:3", "test"))
    own = speculation.drafting.router
    kinds = {
        "sampled": (eagle, own, {"eagle"}), "one-hot": (eagle, Guessing(), {"guess"}),
        "both": (eagle, Alternating(), {"eagle", "guess"}),
        "adaptive": (FixedStrategy(parse_strategy("adaptive:3", "test")), own, {"eagle", "suffix"}),
    }  # fmt: skip
    # Drafts are free, so that the router always drafts, and those that will hardly stand are cut: what it chooses must
    # not matter.
    speculation.controller.costs.prices = lambda num_running, _, max_draft_tokens: Prices(
        step_s=1.0, token_s=0.0, pass_s={}, row_s={},
        verify_s=tuple(1 + 0.1 / num_running * token for token in range(max_draft_tokens + 1)),
    )  # fmt: skip
    for name, sampling in SAMPLINGS.items():
        for seed in seeds:
            speculation.policy = FixedStrategy(OFF)
            plain = joint(engine, sampling, num, seed=1000 + seed)
            assert not is_rejected(plain, joint(engine, sampling, num, seed=2000 + seed)), f"plain {name}"
            speculation.drafting.drafters["guess"] = Guess(plain)
            for kind, (policy, router, drafters) in kinds.items():
                speculation.policy, speculation.drafting.router = policy, router
                drafted = joint(engine, sampling, num, seed=3000 + seed)
                assert not is_rejected(plain, drafted), (kind, name, seed)
                stats = engine.stats().acceptance
                used = {drafter for drafter in stats if stats[drafter].num_drafts}
                assert used == drafters, (kind, name, used)
                accepted = [sum(stats[drafter].accepted) for drafter in used]
                # The router may leave one of its drafters little to do.
                assert (sum(accepted) if kind == "adaptive" else min(accepted)) >= num // 100, (kind, name)
            speculation.drafting.router = own

    # A test that cannot fail shows nothing.
    sampling, seed = SAMPLINGS["T=1.0"], seeds[0]
    speculation.policy = FixedStrategy(OFF)
    plain = joint(engine, sampling, num, seed=1000 + seed)
    speculation.policy = eagle
    honest = engine_sampling.reject
    engine_sampling.reject = lambda probs, draft_probs, drafts, *, accept, residual: honest(
        probs, draft_probs, drafts, accept=0 * accept, residual=residual
    )
    assert is_rejected(plain, joint(engine, sampling, num, seed=3000 + seed)), "a lossy acceptance was not noticed"
    engine_sampling.reject = honest
    speculation.policy = FixedStrategy(OFF)
    plain = stock_joint(engine, SAMPLINGS["T=0.7"], num, seed=1)
    speculation.policy, speculation.drafting.router = eagle, Guessing()
    assert is_rejected(plain, stock_joint(engine, SAMPLINGS["T=0.7"], num, seed=2)), "vLLM's sampler is lossless now"
    engine.close()


def stock_joint(engine, sampling: SamplingConfig, num: int, *, seed: int) -> Counter:
    """With vLLM's own sampler and rejection sampler in the place of ours."""
    from vllm import SamplingParams

    ours = engine.runner.__dict__.pop("_sample")
    engine.speculation.drafting.strategy = engine.speculation.policy.choose(1)
    params = SamplingParams(
        temperature=sampling.temperature, max_tokens=sampling.max_response_tokens, ignore_eos=True, detokenize=False
    )  # fmt: skip
    torch.manual_seed(seed)
    outputs = engine.llm.generate([{"prompt_token_ids": list(PROMPT.token_ids)}] * num, params, use_tqdm=False)
    engine.runner._sample = ours
    return Counter(tuple(output.outputs[0].token_ids[:NUM_TOKENS]) for output in outputs)


def run(tmp_path: Path, num: int, seeds: list[int]) -> None:
    folder = write_tiny_model("llama", tmp_path, initializer_range=0.2, vocab_size=272)
    run_ranks(_distributions, 1, folder, write_head(tmp_path / "head", folder), num, seeds)


def test_joint_distribution_of_first_tokens(tmp_path):
    run(tmp_path, 2000, [1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_joint_distribution_of_first_tokens_at_20000_samples(tmp_path, seed):
    run(tmp_path, 20_000, [seed])
