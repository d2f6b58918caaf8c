"""The suffix tree against a search of all places of all texts.

A place is one appended token and all that stands before it; a string's count is the number of places it ends at. Texts
here are short enough for MAX_COUNTED, so counts are exact but where a test says otherwise. Not covered: speed.
"""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numba.core import caching

from tlt.drafter.suffix_automaton import MAX_COUNT, MAX_COUNTED, SINGLE_ESCAPE, WIDE
from tlt.drafter.suffix_tree import Draft, SuffixTree
from tlt.spec.compiled import compiled

ROOT = Path(__file__).parents[2]


class BruteForce:
    """The same interface; every answer is searched for in the list of places."""

    def __init__(self):
        self.places: list[tuple[int, ...]] = []  # in the order of appending
        self.texts: dict[object, tuple[int, ...]] = {}

    def begin(self, sequence_id, token_ids=(), *, after=None) -> None:
        self.texts[sequence_id] = () if after is None else self.texts[after]
        self.append(sequence_id, token_ids)

    def append(self, sequence_id, token_ids) -> None:
        for token in token_ids:
            self.texts[sequence_id] += (token,)
            self.places.append(self.texts[sequence_id])

    def count(self, string) -> int:
        return sum(place[len(place) - len(string) :] == tuple(string) for place in self.places if string)

    def continuations(self, context: tuple[int, ...]) -> list[int]:
        """Tokens behind the places of a context, in the order of their appending."""
        size = len(context) + 1
        return [
            place[-1] for place in self.places if len(place) >= size and place[len(place) - size : -1] == context
        ]  # fmt: skip

    def longest_context(self, text: tuple[int, ...]) -> tuple[int, ...]:
        return next((text[k:] for k in range(len(text)) if self.continuations(text[k:])), ())

    def draft(self, sequence_id, max_tokens, *, min_match=1, tokens_per_match=2.0, min_prob=0.2) -> dict:
        context = self.longest_context(self.texts[sequence_id])
        draft = {"token_ids": [], "probs": [], "match_length": len(context)}
        product = 1.0
        for _ in range(min(max_tokens, int(tokens_per_match * len(context)))):
            context = self.longest_context(context)
            if not context or len(context) < min_match:
                break
            followed = self.continuations(context)
            counts = Counter(followed)
            token = max(counts, key=lambda token: (counts[token], followed.index(token)))  # newest on a tie
            escape = SINGLE_ESCAPE / len(context) if len(counts) == 1 else len(counts)
            prob = counts[token] / (len(followed) + escape)
            product *= prob
            if product < min_prob:
                break
            draft["token_ids"].append(token)
            draft["probs"].append(prob)
            context += (token,)
        return draft


def as_dict(draft: Draft) -> dict:
    return {"token_ids": draft.token_ids.tolist(), "probs": draft.probs.tolist(), "match_length": draft.match_length}


def about(draft: dict) -> dict:
    """To compare with; the order of floating-point operations does not matter."""
    return draft | {"probs": pytest.approx(draft["probs"])}


chunks = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 3), min_size=1, max_size=6)), min_size=1, max_size=14
)  # fmt: skip
options = st.fixed_dictionaries(
    {
        "min_match": st.integers(1, 4),
        "tokens_per_match": st.sampled_from([0.5, 1.0, 3.0]),
        "min_prob": st.sampled_from([0.0, 0.1, 0.4]),
    }
)


def grown(tree, chunks, *, prompt=(), num_sequences=4):
    """`tree` with texts that grow by turns, each after the prompt."""
    tree.begin("prompt", prompt)
    for sequence_id in range(num_sequences):
        tree.begin(sequence_id, after="prompt")
    for sequence_id, tokens in chunks:
        tree.append(sequence_id, tokens)
    return tree


@settings(max_examples=200, deadline=None)
@given(chunks=chunks, prompt=st.lists(st.integers(0, 3), max_size=6), options=options)
def test_drafts_follow_the_longest_suffix_that_was_followed_by_something(chunks, prompt, options):
    tree, brute_force = grown(SuffixTree(), chunks, prompt=prompt), grown(BruteForce(), chunks, prompt=prompt)
    for sequence_id in range(4):
        expected = brute_force.draft(sequence_id, 8, **options)
        assert as_dict(tree.draft(sequence_id, 8, **options)) == about(expected)


@settings(max_examples=100, deadline=None)
@given(chunks=chunks, strings=st.lists(st.lists(st.integers(0, 4), max_size=5), max_size=10))
def test_counts_are_numbers_of_occurrences(chunks, strings):
    tree, brute_force = grown(SuffixTree(), chunks), grown(BruteForce(), chunks)
    for string in [*strings, *(tokens for _, tokens in chunks)]:
        assert tree.count(string) == brute_force.count(string), string


@settings(max_examples=60, deadline=None)
@given(chunks=chunks)
def test_tokens_one_by_one_make_the_same_tree_as_all_at_once(chunks):
    tokens = [(sequence_id, [token]) for sequence_id, tokens in chunks for token in tokens]
    batch, online = grown(SuffixTree(), chunks), grown(SuffixTree(), tokens)
    assert batch.num_tokens == online.num_tokens == len(tokens)
    for sequence_id in range(4):
        assert as_dict(batch.draft(sequence_id, 8, min_match=1)) == as_dict(online.draft(sequence_id, 8, min_match=1))
    num_states = batch._arrays.sizes[0]
    assert (batch._arrays.states[:num_states] == online._arrays.states[:num_states]).all()


def test_wide_contexts_are_found_by_their_hash_table():
    """Text of 60 tokens, skewed: contexts with more continuations than are looked through, arrays that grow."""
    rng = np.random.default_rng(0)
    chunks = [(int(rng.integers(3)), (rng.zipf(1.3, 12) % 60).tolist()) for _ in range(60)]
    tree, brute_force = grown(SuffixTree(), chunks), grown(BruteForce(), chunks)
    widest = max(len(set(brute_force.continuations((token,)))) for token in range(60))
    assert widest > 2 * WIDE
    for first in range(60):
        assert tree.count([first]) == brute_force.count([first])
        for second in range(60):
            assert tree.count([first, second]) == brute_force.count([first, second])
    for sequence_id in range(3):
        for min_match in (1, 2):
            expected = brute_force.draft(sequence_id, 8, min_match=min_match, tokens_per_match=4.0, min_prob=0.0)
            draft = tree.draft(sequence_id, 8, min_match=min_match, tokens_per_match=4.0, min_prob=0.0)
            assert as_dict(draft) == about(expected)


def test_a_context_copied_with_many_continuations_keeps_them():
    """`8 9` and `9` are one state until `9` occurs without `8`; by then 40 tokens have followed."""
    tree, brute_force = SuffixTree(), BruteForce()
    for each in (tree, brute_force):
        each.begin("a")
        for token in range(100, 140):
            each.append("a", [8, 9, token])
        each.append("a", [7, 9, 120, 7, 9, 200, 9])
    for token in range(100, 201):
        for context in ([9], [8, 9], [7, 9]):
            assert tree.count([*context, token]) == brute_force.count([*context, token])
    assert as_dict(tree.draft("a", 2, min_match=1)) == about(brute_force.draft("a", 2, min_match=1))


def test_a_response_drafts_from_own_text_siblings_finished_ones_and_history():
    tree = SuffixTree()
    tree.begin("prompt", [1, 2, 3])
    tree.begin("past", [10, 11, 12, 13, 14], after="prompt")
    tree.end("past")
    tree.begin("finished", [20, 21, 22, 23], after="prompt")
    tree.end("finished")
    tree.begin("sibling", [30, 31, 32, 33], after="prompt")
    tree.begin("own", [40, 41, 42, 43, 40, 41], after="prompt")
    for tokens, drafted in (([], [42, 43]), ([10, 11, 12], [13, 14]), ([21, 22], [23]), ([30, 31], [32, 33])):
        tree.append("own", tokens)
        assert tree.draft("own", 2, min_prob=0).token_ids.tolist() == drafted, tokens
    assert tree.draft("sibling", 2).match_length == 0


def test_a_new_request_drafts_the_beginning_of_its_siblings():
    tree = SuffixTree()
    tree.begin("prompt", [1, 2, 3])
    for sibling, tokens in enumerate(([5, 6], [5, 7], [5, 6])):
        tree.begin(sibling, tokens, after="prompt")
    tree.begin("new", after="prompt")
    draft = tree.draft("new", 4, tokens_per_match=1.0)
    assert (draft.token_ids.tolist(), draft.match_length) == ([5, 6], 3)
    assert draft.probs.tolist() == pytest.approx([3 / (3 + SINGLE_ESCAPE / 3), 2 / (3 + 2)])
    assert tree.count([1, 2, 3]) == 1, "a shared prompt counts once"


def test_a_loop_is_drafted_on_and_the_draft_is_cut_by_length_and_confidence():
    tree = SuffixTree()
    tree.begin("a", [1, 2, 3] * 3)
    assert tree.draft("a", 8, tokens_per_match=2.0, min_prob=0).token_ids.tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    assert len(tree.draft("a", 8, tokens_per_match=0.5).token_ids) == 3  # 6 tokens match
    cut = tree.draft("a", 8, min_prob=0.5)
    one_more = tree.draft("a", len(cut.token_ids) + 1, min_prob=0)
    assert 0 < len(cut.token_ids) < 8
    assert np.prod(cut.probs) >= 0.5 > np.prod(one_more.probs)
    assert len(tree.draft("a", 8, min_match=7).token_ids) == 0


def test_long_loops_stop_counting_for_their_short_contexts():
    tree = SuffixTree()
    tree.begin("a", [7] * 3000)
    assert tree.count([7] * 2990) == 11
    assert tree.count([7]) == MAX_COUNTED
    assert tree.draft("a", 16).token_ids.tolist() == [7] * 16


def test_counts_stop_where_their_type_does():
    tree = SuffixTree()
    tree.begin("a", [1, 2] * (MAX_COUNT // 2))
    for number in range(100, 110):  # breaks the loop, so that `1 2` counts again
        tree.append("a", [number, 1, 2])
    tree._arrays.counts[:] = MAX_COUNT
    tree.append("a", [3, 1, 2])
    assert tree.count([1, 2]) == MAX_COUNT


def test_drafting_changes_nothing_and_ids_do_not_matter():
    rng = np.random.default_rng(3)
    chunks = [(int(rng.integers(4)), rng.integers(0, 5, 7).tolist()) for _ in range(40)]
    quiet, asked = SuffixTree(), SuffixTree()
    for name in "dbca":
        quiet.begin(name)
    for number in range(4):
        asked.begin(number)
    for number, tokens in chunks:
        quiet.append("dbca"[number], tokens)
        asked.append(number, tokens)
        first, second = asked.draft(number, 8), asked.draft(number, 8)
        assert as_dict(first) == as_dict(second)
    for number in range(4):
        assert as_dict(quiet.draft("dbca"[number], 8)) == as_dict(asked.draft(number, 8))


PROGRAM = """
from tlt.drafter.suffix_tree import SuffixTree
tree = SuffixTree()
names = sorted({"one", "two", "three", "four", "five"})
for name in names:
    tree.begin(name)
for step in range(300):
    tree.append(names[step % 5], [step * step % 7, step % 3])
print([(tree.draft(name, 8).token_ids.tolist(), tree.draft(name, 8).probs.tolist()) for name in names])
"""


def test_drafts_do_not_depend_on_the_hash_seed():
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(outputs) == 1
    assert "[]" not in outputs.pop()


def test_memory_is_at_most_40_bytes_a_token():
    rng = np.random.default_rng(0)
    tree = SuffixTree()
    tree.begin("skewed", rng.zipf(1.2, 20_000).clip(max=49_151))
    assert tree.num_bytes <= 40 * tree.num_tokens
    assert tree.num_bytes == sum(array.nbytes for array in tree._arrays)


def test_kernels_compile_where_nothing_can_be_written(monkeypatch):
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        njit(cache=True)(lambda number: number + 1)
    assert compiled(lambda number: number + 1)(1) == 2


def test_misuse_is_refused():
    tree = SuffixTree()
    tree.begin("a", [1, 2])
    with pytest.raises(ValueError, match="has begun"):
        tree.begin("a")
    with pytest.raises(ValueError, match="at least 0, got -1"):
        tree.append("a", [3, -1])
    assert tree.num_tokens == 2
    with pytest.raises(KeyError):
        tree.append("b", [1])
    tree.end("a")
    with pytest.raises(KeyError):
        tree.draft("a", 4)
    tree.begin("a", [1])  # an id may be used again
    assert tree.draft("a", 4, min_match=1).token_ids.tolist() == [2]
