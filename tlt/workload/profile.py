"""What a policy's text looks like to speculation: entropy, lengths, tail, repetition. Pure functions of responses.

Speed figures of speculative decoding mean nothing without these: a draft of one token is accepted with the policy's
probability of that token, so E[max p] is the ceiling of any such drafter at this temperature.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MAX_MATCH = 16
"""Longest suffix that is looked up."""
MIN_MATCH = 2
"""Shortest suffix whose continuation counts as a prediction."""
LOW_ENTROPY = 0.01
TAIL_SIZES = (1, 2, 4)


@dataclass(frozen=True, kw_only=True)
class Response:
    """One response of a group."""

    question: str
    sample: int
    token_ids: tuple[int, ...]
    entropies: tuple[float, ...]
    max_probs: tuple[float, ...]
    is_truncated: bool
    iteration: int = 0
    replica: int = 0
    reward: float | None = None
    prompt_token_ids: tuple[int, ...] = field(default=())


def percentile(values: Sequence[float], share: float) -> float:
    """Smallest value that at least `share` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * len(ordered) * 1_000_000) // 1_000_000) - 1)]


def entropy_profile(responses: Sequence[Response]) -> dict[str, float]:
    """Over all tokens: mean entropy (nats), share below 0.01 nats, 80th percentile, and E[max p]."""
    entropies = [value for response in responses for value in response.entropies]
    max_probs = [value for response in responses for value in response.max_probs]
    return {
        "entropy_mean": sum(entropies) / len(entropies),
        "entropy_below_0.01": sum(value < LOW_ENTROPY for value in entropies) / len(entropies),
        "entropy_p80": percentile(entropies, 0.8),
        "max_prob_mean": sum(max_probs) / len(max_probs),
    }


def length_profile(lengths: Sequence[int]) -> dict[str, float]:
    """Percentiles of response lengths in tokens, and how many times the median the 99th is."""
    names = {"p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    profile = {f"length_{name}": percentile(lengths, share) for name, share in names.items()}
    return {
        "responses": len(lengths),
        "length_mean": sum(lengths) / len(lengths),
        **profile,
        "length_p99_over_p50": profile["length_p99"] / profile["length_p50"],
    }


def tail_profile(responses: Sequence[Response], *, max_num_seqs: int) -> dict[str, float]:
    """Share of rank time with at most 1, 2, 4 running requests, idle time included, if every engine step took as long.

    Each replica decodes its responses of one iteration in order, `max_num_seqs` at a time; an iteration lasts until
    the world's last response ends.
    """
    iterations: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    replicas = {response.replica for response in responses}
    for response in responses:
        iterations[response.iteration][response.replica].append(len(response.token_ids))
    total, small = 0, dict.fromkeys(TAIL_SIZES, 0)
    for by_replica in iterations.values():
        timelines = [running_requests(by_replica[replica], max_num_seqs) for replica in replicas]
        duration = max(sum(steps for steps, _ in timeline) for timeline in timelines)
        for timeline in timelines:
            idle = duration - sum(steps for steps, _ in timeline)
            total += duration
            for size in TAIL_SIZES:
                small[size] += idle + sum(steps for steps, running in timeline if running <= size)
    return {f"running_le_{size}": small[size] / total for size in TAIL_SIZES}


def running_requests(lengths: Iterable[int], max_num_seqs: int) -> list[tuple[int, int]]:
    """[(engine steps, requests running in them)] where each request takes one step a token and waits for a place."""
    waiting = list(lengths)[::-1]
    running: list[int] = []  # step at which each ends
    now, timeline = 0, []
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            heapq.heappush(running, now + waiting.pop())
        end = running[0]
        timeline.append((end - now, len(running)))
        now = end
        while running and running[0] == now:
            heapq.heappop(running)
    return timeline


class SuffixTable:
    """Next token after the last occurrence of every run of MIN_MATCH..MAX_MATCH tokens."""

    def __init__(self):
        self.next: dict[tuple[int, ...], int] = {}

    def add(self, past: Sequence[int], token: int) -> None:
        """`token` followed `past`."""
        for length in range(MIN_MATCH, min(MAX_MATCH, len(past)) + 1):
            self.next[tuple(past[-length:])] = token

    def match(self, past: Sequence[int]) -> tuple[int, int | None]:
        """(length of the longest known suffix of `past`, the token that followed it; 0 and None if there is none)."""
        for length in range(min(MAX_MATCH, len(past)), MIN_MATCH - 1, -1):
            token = self.next.get(tuple(past[-length:]))
            if token is not None:
                return length, token
        return 0, None


def repetition_profile(responses: Sequence[Response], history: Sequence[Response] = ()) -> dict[str, float]:
    """Share of tokens that the longest suffix match predicts: in the own past; own past and siblings; and history too.

    Siblings are the other responses of the group, known up to the same position (all decode in step); history is
    responses to the same question in earlier iterations, known whole. The longest match of all tables predicts, the
    own past first where two are equally long.
    """
    groups: dict[tuple[int, str], list[Response]] = defaultdict(list)
    for response in responses:
        groups[response.iteration, response.question].append(response)
    earlier: dict[str, list[Response]] = defaultdict(list)
    for response in history:
        earlier[response.question].append(response)
    hits = {"own": 0, "siblings": 0, "history": 0}
    total = 0
    for (_, question), group in groups.items():
        past_table = SuffixTable()
        for response in earlier[question]:
            for position, token in enumerate(response.token_ids):
                past_table.add(response.token_ids[:position][-MAX_MATCH:], token)
        count = group_hits(group, past_table)
        total += sum(len(response.token_ids) for response in group)
        for name, value in count.items():
            hits[name] += value
    return {f"predictable_{name}": value / total for name, value in hits.items()}


def group_hits(group: Sequence[Response], history: SuffixTable) -> dict[str, int]:
    """Tokens of one group that are predicted, by what may be looked at."""
    own = [SuffixTable() for _ in group]
    siblings = [SuffixTable() for _ in group]
    hits = {"own": 0, "siblings": 0, "history": 0}
    for position in range(max(len(response.token_ids) for response in group)):
        alive = [index for index, response in enumerate(group) if position < len(response.token_ids)]
        pasts = {index: group[index].token_ids[max(0, position - MAX_MATCH) : position] for index in alive}
        for index in alive:
            token = group[index].token_ids[position]
            best = own[index].match(pasts[index])
            hits["own"] += best[1] == token
            best = max(best, siblings[index].match(pasts[index]), key=lambda found: found[0])
            hits["siblings"] += best[1] == token
            best = max(best, history.match(pasts[index]), key=lambda found: found[0])
            hits["history"] += best[1] == token
        for index in alive:
            token = group[index].token_ids[position]
            own[index].add(pasts[index], token)
            for other in range(len(group)):
                if other != index:
                    siblings[other].add(pasts[index], token)
    return hits


def profile(
    responses: Sequence[Response], *, history: Sequence[Response] = (), max_num_seqs: int = 64
) -> dict[str, float]:
    """All quantities of one workload. Raises ValueError where there is no response or one without entropies."""
    if not responses:
        raise ValueError("there is no response to profile")
    if any(len(response.entropies) != len(response.token_ids) for response in responses):
        raise ValueError("responses without entropies: name the model that wrote them (--hf-model)")
    lengths = [len(response.token_ids) for response in responses]
    result = {
        **entropy_profile(responses),
        **length_profile(lengths),
        "truncated": sum(response.is_truncated for response in responses) / len(responses),
        **tail_profile(responses, max_num_seqs=max_num_seqs),
        **repetition_profile(responses, history),
        "history_responses": len(history),
        "distinct_tokens": len({token for response in responses for token in response.token_ids}),
    }
    if all(response.reward is not None for response in responses):
        groups: dict[tuple[int, str], list[float]] = defaultdict(list)
        for response in responses:
            groups[response.iteration, response.question].append(response.reward)
        result["pass_rate"] = sum(response.reward == 1.0 for response in responses) / len(responses)
        result["mixed_groups"] = sum(min(rewards) < max(rewards) for rewards in groups.values()) / len(groups)
    return result
