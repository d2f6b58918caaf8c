"""What a tree of drafts would add to a chain of as many tokens.

A draft's node is named by ranks: (1, 1, 2) is the drafter's second choice after its first choice after its first
choice. A text's own path from a position is the ranks that the drafter gives to the tokens that follow; the nodes of a
tree that stand are those on this path. So of N nodes those stand most often that are prefixes of most paths, and the
best static tree of N nodes is simply the N commonest prefixes (each at least as common as what goes on from it).
"""

from collections import Counter
from collections.abc import Iterable, Sequence

Path = tuple[int, ...]
"""Ranks from 1; ends where the drafter does not name the token at all."""


def best_tree(paths: Iterable[Path], num_nodes: int) -> set[Path]:
    """Nodes of the tree of so many that most tokens stand in, closed under prefixes."""
    counts = Counter(path[:depth] for path in paths for depth in range(1, len(path) + 1))
    # Ties are broken towards the shorter one, so that a node never comes without its parent.
    ranked = sorted(counts, key=lambda node: (-counts[node], len(node), node))
    return set(ranked[:num_nodes])


def chain(num_nodes: int) -> set[Path]:
    """The tree that is a chain."""
    return {(1,) * depth for depth in range(1, num_nodes + 1)}


def mean_standing(paths: Sequence[Path], tree: set[Path]) -> float:
    """Draft tokens that stand, averaged over paths; 0 of none."""
    total = sum(sum(path[:depth] in tree for depth in range(1, len(path) + 1)) for path in paths)
    return total / len(paths) if paths else 0.0
