"""Which CUDA graphs an engine needs for the strategies that it may choose, and what they cost in memory.

A graph is captured for one shape. Capturing every strategy at every batch size (naive) multiplies the memory of one
strategy by their number; here a batch size has the graphs of the strategies that may be chosen there: none of large
drafts for large batches, one for strategies that verify equally many tokens, and a drafter's passes, which are alike
whatever the depth, once for all its strategies (arXiv 2511.16665). Pure functions of a policy.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tlt.spec.strategy import HEADS, StrategyPolicy
from tlt.types import SpecStrategy

FINE, COARSE, COARSE_FROM = 8, 16, 256
"""Distances of captured sizes up to and above 256: vLLM's own grid."""
LARGEST_TOKENS = 512
"""No graph of more: vLLM's own limit. Such a step is bound by arithmetic, not by launching kernels."""

Arms = Callable[[int], Sequence[SpecStrategy]]
"""What may be chosen for so many running requests."""


@dataclass(frozen=True, order=True)
class TargetGraph:
    """The policy's step over so many requests with so many draft tokens each."""

    num_requests: int
    num_draft_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.num_requests * (self.num_draft_tokens + 1)


@dataclass(frozen=True, order=True)
class DrafterGraph:
    """One pass of a learned drafter over so many requests."""

    drafter: str
    num_requests: int


@dataclass(frozen=True, kw_only=True)
class GraphMemory:
    """Bytes of a graph."""

    target: int
    """Of the policy, whatever its tokens: its kernels' nodes and parameters."""
    target_token: int
    """For each token."""
    drafter: int
    drafter_row: int


@dataclass(frozen=True, kw_only=True)
class GraphPlan:
    """What is captured."""

    target: frozenset[TargetGraph]
    drafter: frozenset[DrafterGraph]

    def num_bytes(self, memory: GraphMemory) -> int:
        """Of all graphs, each with buffers of its own: what they share of a pool is not subtracted."""
        return sum(memory.target + graph.num_tokens * memory.target_token for graph in self.target) + sum(
            memory.drafter + graph.num_requests * memory.drafter_row for graph in self.drafter
        )


def captured_sizes(largest: int) -> list[int]:
    """Sizes that others are padded to, `largest` the last: 1, 2, 4, then even steps."""
    fine = range(FINE, min(largest, COARSE_FROM), FINE)
    return sorted(
        {size for size in (1, 2, 4, *fine, *range(COARSE_FROM, largest, COARSE)) if size < largest} | {largest}
    )


def plan_graphs(arms: Arms, batches: Sequence[int]) -> GraphPlan:
    """For captured batch sizes, rising; each stands for those above the one before it."""
    target, drafter = set(), set()
    first = 1
    for batch in batches:
        strategies = {strategy for size in range(first, batch + 1) for strategy in arms(size)}
        target |= {TargetGraph(batch, strategy.num_draft_tokens) for strategy in strategies}
        drafter |= {DrafterGraph(strategy.method, batch) for strategy in strategies if strategy.method in HEADS}
        first = batch + 1
    return GraphPlan(target=frozenset(target), drafter=frozenset(drafter))


def capture_sizes(policy: StrategyPolicy, *, max_num_seqs: int) -> list[int]:
    """Tokens of the steps to capture, for vLLM's `cudagraph_capture_sizes`; [] leaves the choice to vLLM, where
    nothing is ever drafted.

    A step without drafts can occur under every policy, at every batch size. Drafters that look up, and `adaptive`,
    give each request a draft of its own length, so their steps have any number of tokens up to the longest. All are
    whole drafts of the longest length: vLLM's V1 runner rounds full graphs up to that, and drops those that it rounds
    beyond the largest.
    """
    if policy.max_draft_tokens == 0:
        return []
    batches = captured_sizes(max_num_seqs)
    plan = plan_graphs(lambda size: [arm for arm in policy.arms(size) if is_even(arm)], batches)
    longest = max(longest_uneven(policy, range(1, max_num_seqs + 1)), max_num_seqs)
    sizes = {graph.num_tokens for graph in plan.target} | set(captured_sizes(longest))
    width = policy.max_draft_tokens + 1
    whole = {-(-size // width) * width for size in sizes}
    return sorted(size for size in whole if size <= max(LARGEST_TOKENS, width))


def is_even(strategy: SpecStrategy) -> bool:
    """Drafts equally many tokens for all requests."""
    return strategy.num_draft_tokens == 0 or strategy.method in HEADS


def most_tokens(policy: StrategyPolicy, batches: Iterable[int]) -> int:
    """Most tokens that a step verifies, drafts and one of each request."""
    return max(size * (arm.num_draft_tokens + 1) for size in batches for arm in policy.arms(size))


def longest_uneven(policy: StrategyPolicy, batches: Iterable[int]) -> int:
    """Most tokens of a step whose requests may have drafts of different lengths; 0 without any."""
    tokens = (size * (arm.num_draft_tokens + 1) for size in batches for arm in policy.arms(size) if not is_even(arm))
    return max(tokens, default=0)
