"""Whether steps that replay CUDA graphs compute what the same steps compute without, asked before anything is trained.

A graph replays kernels as they were captured, for a step of another shape; what a step tells them must be laid out as
at the capture. On an H200 it was not: FlashAttention 3 (vLLM 0.32) lays out the schedule of a step of single tokens
otherwise than that of longer queries, so full graphs gave noise wherever nothing was drafted, and text where something
was (docs/results/gpu_2026-11-27.md).
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tlt.rollout.vllm.cost_profile import FILLER, InTurn, apart, filler_prompts
from tlt.types import OFF, Rollout, SamplingConfig, SpecStrategy, rollout_name

logger = logging.getLogger(__name__)

NUM_PROMPTS, NUM_TOKENS = 8, 8
STRATEGIES = {"without drafts": OFF, "with drafts": SpecStrategy(method=FILLER, num_draft_tokens=1)}
"""All steps of one kind of strategy."""
LARGEST_DIFFERENCE = 0.2
"""Nats of entropy in the mean: bf16 moved it by 0.01, the fault above by more than 1."""


def keep_one_schedule(runner: Any) -> None:
    """Let attention be scheduled for queries of two tokens at least, where one graph serves steps of any queries.

    The number is an upper bound to the kernels. A bound of 1 makes FlashAttention 3 leave out the causal mask, and
    with it a part of the schedule's layout, which captured kernels go on reading.
    """
    if runner.compilation_config.cudagraph_mode.name != "FULL":
        return
    for groups in runner.attn_groups:
        for group in groups:
            for builder in group.metadata_builders:
                builder.build = at_least_two(builder.build)


def at_least_two(build: Callable) -> Callable:
    """`build` of an attention's metadata, with that bound."""

    def bounded(common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        common_attn_metadata.max_query_len = max(common_attn_metadata.max_query_len, 2)
        return build(common_prefix_len, common_attn_metadata, *args, **kwargs)

    return bounded


@contextmanager
def without_graphs(runner: Any) -> Iterator[None]:
    """Every engine step runs its kernels one by one."""
    from vllm.config import CUDAGraphMode

    dispatcher = runner.cudagraph_dispatcher
    dispatch = dispatcher.dispatch
    dispatcher.dispatch = lambda *args, **kwargs: dispatch(*args, **(kwargs | {"valid_modes": {CUDAGraphMode.NONE}}))
    try:
        yield
    finally:
        dispatcher.dispatch = dispatch


def check_graphs(engine: Any, *, seed: int, is_any: Callable[[bool], bool] = bool) -> None:
    """RuntimeError, on all ranks, where graphs of one compute something else; `is_any` asks whether any rank says so.

    Collective over all ranks; all must call."""
    speculation, begin_s = engine.speculation, time.perf_counter()
    faults: list[str] = []
    with apart(speculation):
        speculation.policy = InTurn([OFF])
        with without_graphs(engine.runner):
            expected = _responses(engine, seed=seed)
        for name, strategy in STRATEGIES.items():
            speculation.policy = InTurn([strategy])
            difference, count = entropy_difference(expected, _responses(engine, seed=seed))
            logger.info("CUDA graphs %s: entropy differs by %.1e nats over %d tokens", name, difference, count)
            if count and not difference <= LARGEST_DIFFERENCE:
                faults.append(f"steps {name}: by {difference:.2f} nats in the mean over {count} tokens")
    speculation.begin([])
    if is_any(bool(faults)):  # agreed, or the others would wait for this rank in their next rollout
        raise RuntimeError(
            "CUDA graphs compute other probabilities than steps without: their entropy differs "
            f"({'; '.join(faults) or 'on another rank'}; at most {LARGEST_DIFFERENCE} nats). Run with "
            "--rollout-enforce-eager, or with --rollout-engine-args "
            '\'{"compilation_config": {"mode": 3, "cudagraph_mode": "PIECEWISE"}}\''
        )
    logger.info("CUDA graphs checked in %.1f s", time.perf_counter() - begin_s)


def _responses(engine: Any, *, seed: int) -> dict[str, Rollout]:
    """Of this replica, by name: prompts of random tokens, drawn with the same numbers each time."""
    prompts = filler_prompts(engine, NUM_PROMPTS, name="graph-check", seed=seed)
    sampling = SamplingConfig(temperature=1.0, max_response_tokens=NUM_TOKENS, ignore_eos=True)
    groups = engine.generate(prompts, sampling, group_size=1, seed=seed, on_finished=lambda *_: None)
    return {rollout_name(group.prompt.prompt_id, 0): group.rollouts[0] for group in groups}


def entropy_difference(expected: dict[str, Rollout], found: dict[str, Rollout]) -> tuple[float, int]:
    """(mean absolute difference of entropies in nats, tokens compared): behind equal tokens both are of one
    distribution. The first token is not counted, which is the prompt's step."""
    differences = [
        abs(a - b)
        for name, one in expected.items()
        for a, b in list(zip(one.entropies, found[name].entropies, strict=True))[
            1 : num_equal(one.token_ids, found[name].token_ids) + 1
        ]
    ]
    return (sum(differences) / len(differences) if differences else float("nan")), len(differences)


def num_equal(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two responses have in common before they part."""
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
