"""Suffix automaton of several texts that grow at the same time: flat arrays, compiled kernels, one thread.

A state stands for all strings that end at the same places of the texts (Blumer et al., Theor. Comput. Sci. 40, 1985).
They are suffixes of one another: the longest has `LENGTH` tokens, `LINK` is the state of the next shorter one, and
`counts` says how many places those are. A transition by a token leads to the state of string + token, so what followed
a string, and how often, can be read off its state; links are the suffix tree of the reversed texts. Texts need not be
complete, nor be added one after another: all that is kept of one that grows is the state of the whole of it.

Most states have one transition, held in `NEXT`. Those with more have a list of edges, newest first, and where it is
longer than WIDE a hash table of them too, so that a step costs the same behind a comma as behind a rare word.

Shapes: N states, M edges, R slots of the hash table, K draft tokens. Entry 0 of states and edges stands for none.
"""

from typing import NamedTuple

import numpy as np

from tlt.spec.compiled import compiled

TOKEN, LENGTH, LINK, NEXT = range(4)
"""Columns of `states` [N, 4]. TOKEN: last token of the state's strings. NEXT: 0 without transition, the target of the
only one, or minus the first edge."""
TARGET, FOLLOWING = range(2)
"""Columns of `edges` [M, 2]. FOLLOWING: next edge of the same state, 0 behind the last."""
STATE, EDGE = range(2)
"""Columns of `table` [R, 2]: an edge of a state that has more than WIDE; EDGE is 0 in a free slot."""
NUM_STATES, NUM_EDGES, NUM_ENTERED = range(3)
"""Entries of `sizes` [3]: how much of the arrays is used."""
ROOT = 0
"""State of the empty string; no transition leads to it."""
NO_STATE = -1
"""LINK of the root."""

WIDE = 16
"""Edges that are looked through one by one."""
MAX_COUNT = 65535
"""Counts are uint16 and stop here."""
MAX_COUNTED = 64
"""A token counts for its so many longest contexts that differ in where they end. Ordinary text has 3 to 10 of them; a
loop has one more with each round, and counting for all of them would make it quadratic."""
SINGLE_ESCAPE = 2.5
"""Weight, in occurrences, of a new token behind a context that was always followed by the same one, times the
context's length. Fits AIME chains of thought of 11 checkpoints: a continuation seen once is right in 0.47, 0.61, 0.72,
0.86 of cases behind 2, 4, 8, 19 tokens, one seen twice in 0.65, 0.73, 0.82, 0.92."""


class Arrays(NamedTuple):
    """An automaton; kernels take its fields one by one."""

    states: np.ndarray  # [N, 4] int32
    counts: np.ndarray  # [N] uint16: places where a state's strings end
    edges: np.ndarray  # [M, 2] int32
    table: np.ndarray  # [R, 2] int32
    sizes: np.ndarray  # [3] int64


def new_arrays() -> Arrays:
    """An automaton of no texts."""
    states = np.zeros((64, 4), dtype=np.int32)
    states[ROOT, LINK] = NO_STATE
    return Arrays(
        states=states, counts=np.zeros(64, dtype=np.uint16), edges=np.zeros((16, 2), dtype=np.int32),
        table=np.zeros((32, 2), dtype=np.int32), sizes=np.array([1, 1, 0], dtype=np.int64),
    )  # fmt: skip


# Copies are written as loops below: slices take numba ten times as long to compile. What an array has room for grows
# by a sixteenth, because what stays unused is memory lost.


@compiled
def _more_rows(rows, num_rows):
    """A copy of the first rows [num_rows, C] with room for more, which are 0."""
    grown = np.zeros((num_rows + 2 + num_rows // 16, rows.shape[1]), dtype=np.int32)
    for row in range(num_rows):
        for column in range(rows.shape[1]):
            grown[row, column] = rows[row, column]
    return grown


@compiled
def _more_counts(counts, num_states):
    """A copy of the first counts [num_states] with room for as many as `_more_rows` makes."""
    grown = np.zeros(num_states + 2 + num_states // 16, dtype=np.uint16)
    for state in range(num_states):
        grown[state] = counts[state]
    return grown


@compiled
def _slot(states, edges, table, state, token):
    """Slot of an edge in the hash table, or the free one where it belongs."""
    hashed = (state * 2654435769 + token * 2246822507) & 0xFFFFFFFF
    slot = (hashed * len(table)) >> 32
    while table[slot, EDGE] != 0:
        if table[slot, STATE] == state and states[edges[table[slot, EDGE], TARGET], TOKEN] == token:
            break
        slot = slot + 1 if slot + 1 < len(table) else 0
    return slot


@compiled
def _enter_edge(states, edges, table, sizes, state, edge):
    """The hash table, at most three quarters full, with one more edge."""
    if 4 * (sizes[NUM_ENTERED] + 1) > 3 * len(table):
        old_table = table
        table = np.zeros((len(old_table) + len(old_table) // 4, 2), dtype=np.int32)
        for old_slot in range(len(old_table)):
            old_state, old_edge = np.int64(old_table[old_slot, STATE]), np.int64(old_table[old_slot, EDGE])
            if old_edge != 0:
                slot = _slot(states, edges, table, old_state, np.int64(states[edges[old_edge, TARGET], TOKEN]))
                table[slot, STATE] = old_state
                table[slot, EDGE] = old_edge
    slot = _slot(states, edges, table, state, np.int64(states[edges[edge, TARGET], TOKEN]))
    table[slot, STATE] = state
    table[slot, EDGE] = edge
    sizes[NUM_ENTERED] += 1
    return table


@compiled
def _find_edge(states, edges, table, state, token):
    """Edge of a state that has a list of them, 0 if there is none by this token."""
    edge = -np.int64(states[state, NEXT])
    for _ in range(WIDE):
        if edge == 0 or states[edges[edge, TARGET], TOKEN] == token:
            return edge
        edge = np.int64(edges[edge, FOLLOWING])
    return edge if edge == 0 else np.int64(table[_slot(states, edges, table, state, token), EDGE])


@compiled
def find(states, edges, table, state, token):
    """Target of a transition, 0 if there is none."""
    following = np.int64(states[state, NEXT])
    if following >= 0:
        return following if following > 0 and states[following, TOKEN] == token else 0
    return np.int64(edges[_find_edge(states, edges, table, state, token), TARGET])


@compiled
def _redirect(states, edges, table, state, old, new):
    """Let the transition from `state` to `old`, if there is one, lead to `new`; whether there was."""
    following = np.int64(states[state, NEXT])
    if following >= 0:
        if following == old:
            states[state, NEXT] = new
        return following == old
    edge = _find_edge(states, edges, table, state, np.int64(states[new, TOKEN]))
    if edges[edge, TARGET] != old:
        return False
    edges[edge, TARGET] = new
    return True


@compiled
def _new_edge(edges, sizes):
    """(edges, number of an unused one)."""
    edge = sizes[NUM_EDGES]
    if edge == len(edges):
        edges = _more_rows(edges, edge)
    sizes[NUM_EDGES] = edge + 1
    return edges, edge


@compiled
def _num_edges(states, edges, state):
    """Number of edges in a state's list, up to WIDE + 2."""
    edge, num_edges = -np.int64(states[state, NEXT]), 0
    while edge != 0 and num_edges < WIDE + 2:
        edge = np.int64(edges[edge, FOLLOWING])
        num_edges += 1
    return num_edges


@compiled
def _add_transition(states, edges, table, sizes, state, target):
    """A transition by a token that `state` has none by; (edges, table)."""
    following = np.int64(states[state, NEXT])
    if following == 0:
        states[state, NEXT] = target
        return edges, table
    if following > 0:
        edges, first = _new_edge(edges, sizes)
        edges[first, TARGET] = following
        following = -first
    edges, newest = _new_edge(edges, sizes)
    edges[newest, TARGET] = target
    edges[newest, FOLLOWING] = -following
    states[state, NEXT] = -newest
    num_edges = _num_edges(states, edges, state)
    edge = newest
    while edge != 0 and num_edges > WIDE:
        table = _enter_edge(states, edges, table, sizes, state, edge)
        edge = np.int64(edges[edge, FOLLOWING]) if num_edges == WIDE + 1 else 0  # others are there already
    return edges, table


@compiled
def _split(states, counts, edges, table, sizes, before, state):
    """Take the strings that are one token longer than `before`'s, and shorter ones, out of `state`; (edges, table).

    They end in more places than the rest of `state`, one of which is being added. The new state is the newest.
    """
    new = sizes[NUM_STATES]
    sizes[NUM_STATES] = new + 1
    for column in range(states.shape[1]):
        states[new, column] = states[state, column]
    counts[new] = counts[state]
    states[new, LENGTH] = states[before, LENGTH] + 1
    states[state, LINK] = new
    if states[state, NEXT] < 0:
        is_wide = _num_edges(states, edges, state) > WIDE
        edge, previous = -np.int64(states[state, NEXT]), 0
        while edge != 0:
            edges, copy = _new_edge(edges, sizes)
            edges[copy, TARGET] = edges[edge, TARGET]
            edges[copy, FOLLOWING] = 0
            if previous == 0:
                states[new, NEXT] = -copy
            else:
                edges[previous, FOLLOWING] = copy
            if is_wide:
                table = _enter_edge(states, edges, table, sizes, new, copy)
            edge, previous = np.int64(edges[edge, FOLLOWING]), copy
    while before != NO_STATE and _redirect(states, edges, table, before, state, new):
        before = np.int64(states[before, LINK])
    return edges, table


@compiled
def _count(states, counts, state):
    """One more place where the strings of `state` end, and their suffixes."""
    num_counted = 0
    while state != ROOT and num_counted < MAX_COUNTED:
        if counts[state] < MAX_COUNT:
            counts[state] += 1
        state = np.int64(states[state, LINK])
        num_counted += 1


@compiled
def extend(states, counts, edges, table, sizes, whole, token_ids):
    """Append int32 tokens to the text whose state is `whole`; (states, counts, edges, table, whole) as they are then.

    Amortised constant time a token: states, transitions and steps along links each are, counting takes MAX_COUNTED.
    """
    for position in range(len(token_ids)):
        token = np.int64(token_ids[position])
        if sizes[NUM_STATES] + 2 > len(states):
            counts = _more_counts(counts, sizes[NUM_STATES])
            states = _more_rows(states, sizes[NUM_STATES])
        before, new = whole, find(states, edges, table, whole, token)
        if new == 0:
            new = sizes[NUM_STATES]
            sizes[NUM_STATES] = new + 1
            states[new, TOKEN] = token
            states[new, LENGTH] = states[whole, LENGTH] + 1
            shorter = 0
            while before != NO_STATE and shorter == 0:
                shorter = find(states, edges, table, before, token)
                if shorter == 0:
                    edges, table = _add_transition(states, edges, table, sizes, before, new)
                    before = np.int64(states[before, LINK])
            if shorter != 0 and states[shorter, LENGTH] != states[before, LENGTH] + 1:
                edges, table = _split(states, counts, edges, table, sizes, before, shorter)
                shorter = sizes[NUM_STATES] - 1
            states[new, LINK] = shorter
        elif states[new, LENGTH] != states[whole, LENGTH] + 1:
            edges, table = _split(states, counts, edges, table, sizes, whole, new)
            new = sizes[NUM_STATES] - 1
        _count(states, counts, new)
        whole = new
    return states, counts, edges, table, whole


@compiled
def locate(states, edges, table, token_ids):
    """State of a string, 0 if it does not occur."""
    state = 0
    for position in range(len(token_ids)):
        state = find(states, edges, table, state, np.int64(token_ids[position]))
        if state == ROOT:
            break
    return state


@compiled
def longest_context(states, state):
    """State of the longest suffix of a state's strings that was followed by something somewhere."""
    while state != ROOT and states[state, NEXT] == 0:
        state = np.int64(states[state, LINK])
    return state


@compiled
def _most_frequent(states, counts, edges, state):
    """(target, its count, sum of the counts of all targets, their number) of a state with transitions.

    Of equally frequent tokens the one that followed for the first time last.
    """
    following = np.int64(states[state, NEXT])
    if following > 0:
        count = np.int64(counts[following])
        return following, count, count, 1
    best, best_count, total, num_distinct = 0, 0, 0, 0
    edge = -following
    while edge != 0:
        target = np.int64(edges[edge, TARGET])
        count = np.int64(counts[target])
        if count > best_count:
            best, best_count = target, count
        total += count
        num_distinct += 1
        edge = np.int64(edges[edge, FOLLOWING])
    return best, best_count, total, num_distinct


@compiled
def follow(states, counts, edges, whole, token_ids, probs, min_match, tokens_per_match, min_prob):
    """Write a draft for the text whose state is `whole` into `token_ids` [K] int32 and `probs` [K] float64.

    Returns (number of tokens, match length).
    """
    state = longest_context(states, whole)
    match_length, num_drafted = np.int64(states[state, LENGTH]), 0
    length, draft_prob = match_length, 1.0
    max_tokens = min(len(token_ids), int(tokens_per_match * match_length))
    while num_drafted < max_tokens:
        if states[state, NEXT] == 0:  # a text ends here: go on from the longest suffix that goes on
            state = longest_context(states, state)
            length = np.int64(states[state, LENGTH])
        if state == ROOT or length < min_match:
            break
        target, count, total, num_distinct = _most_frequent(states, counts, edges, state)
        # A token that never followed yet has the weight of one occurrence for each distinct token that did, as in
        # PPM's method C (Moffat, 1990); where that was always the same one, the context's length says more.
        prob = count / (total + (num_distinct if num_distinct > 1 else SINGLE_ESCAPE / length))
        draft_prob *= prob
        if draft_prob < min_prob:
            break
        token_ids[num_drafted] = states[target, TOKEN]
        probs[num_drafted] = prob
        num_drafted += 1
        state = target
        length += 1
    return num_drafted, match_length
