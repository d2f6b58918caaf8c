"""Trees of drafts against an enumeration of all trees."""

from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.drafter_cases import make_target, make_trainer
from tests.unit.test_drafter_evaluation import speak
from tlt.drafter.evaluation import SampledText, _Drafts
from tlt.spec.tree_value import best_tree, chain, mean_standing
from tools.replay_trees import paths_of, rows, until_unnamed

PATHS = st.lists(st.lists(st.integers(1, 2), max_size=3).map(tuple), min_size=1, max_size=8)


def all_trees(num_nodes: int):
    nodes = [(a, *rest) for a in (1, 2) for rest in ((), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2))]
    for chosen in combinations(nodes, num_nodes):
        if all(node[:-1] in chosen for node in chosen if len(node) > 1):
            yield set(chosen)


@given(paths=PATHS, num_nodes=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_no_tree_of_as_many_nodes_stands_longer(paths, num_nodes):
    found = best_tree(paths, num_nodes)
    assert len(found) <= num_nodes
    assert all(node[:-1] in found for node in found if len(node) > 1)
    best = max(mean_standing(paths, tree) for tree in all_trees(num_nodes))
    assert abs(mean_standing(paths, found) - best) < 1e-9


def test_by_hand():
    paths = [(1, 1, 1), (1, 2), (2,), ()]
    assert mean_standing(paths, chain(3)) == (3 + 1 + 0 + 0) / 4
    assert mean_standing(paths, {(1,), (2,), (1, 2)}) == (1 + 2 + 1 + 0) / 4
    assert best_tree(paths, 1) == {(1,)}
    assert mean_standing([], chain(2)) == 0


def test_first_choices_are_the_drafts_of_offline_acceptance():
    torch.manual_seed(0)
    head, target = make_trainer().head, make_target()
    with torch.no_grad():
        samples = [speak(head, target, length=34, num_prompt_tokens=4, seed=seed) for seed in (1, 2, 3)]
        for sample in samples:
            seed = int(sample.request_id)
            paths = paths_of(head, sample, seed, target=target, depth=4)
            drafts = _Drafts(head, SampledText(sample=sample, seed=seed), target=target, num_draft_tokens=4)
            for kind, stands in (("coupled", drafts.coupled), ("one-hot", drafts.one_hot)):
                expected = stands.long().cumprod(1).sum(1).tolist()[: len(paths[kind])]
                found = [mean_standing([path], chain(4)) for path in paths[kind]]
                assert found == expected
                assert any(rank > 1 for path in paths[kind] for rank in path), "second choices are seen"
    table = rows("coupled", [paths["coupled"], paths["coupled"]], depth=4)
    assert [row["verified"] for row in table] == [1, 2, 3, 4]
    assert all(row["tree"] >= row["chain"] for row in table), "chosen on what it is measured on"


def test_a_path_ends_where_the_head_names_nothing():
    assert until_unnamed([1, 2, 0, 1]) == (1, 2)
    assert until_unnamed([0, 1]) == ()
    assert until_unnamed([3, 1]) == (3, 1)
