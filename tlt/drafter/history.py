"""Responses of past iterations by prompt, bounded in bytes: drafts for the next time the prompt comes, and its length.

What it returns is a function of the order of the calls, so ranks that make the same calls hold the same history.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

RESPONSE_BYTES, PROMPT_BYTES = 256, 768
"""Charged for the objects around a response's tokens, and around a prompt's responses and statistics (its key of up
to 100 characters among them)."""

LENGTH_DECAY = 0.8
"""What the past weighs each time a newer policy answers the prompt. On AIME chains of thought of 11 checkpoints the
ranks of predicted and true lengths correlate 0.64 by the newest response alone, 0.71 with this decay or with none."""
LENGTH_PRIOR = 0.75
"""Responses that the mean of all prompts stands for: (1 - ICC) / ICC with the intraclass correlation 0.57 of these
log lengths."""


@dataclass(frozen=True, kw_only=True)
class PastResponse:
    """One response of an earlier iteration. R tokens."""

    token_ids: np.ndarray  # [R] int32, read-only
    policy_version: int

    @property
    def num_bytes(self) -> int:
        """What the response is charged."""
        return self.token_ids.nbytes + RESPONSE_BYTES


@dataclass(slots=True)
class _PromptRecord:
    """What is known of one prompt."""

    responses: list[PastResponse] = field(default_factory=list)  # as they were added
    newest_version: int = -1
    length_weight: float = 0.0
    length_sum: float = 0.0
    """Sum of the natural logarithms of lengths, decayed as the weight is."""


class SuffixHistory:
    """Holds at most `max_bytes`. Responses of the oldest policy leave first, among these the prompt's that was used
    longest ago; then statistics of prompts used longest ago. With `max_age`, responses that many versions older than
    the newest stay and older ones leave."""

    def __init__(self, max_bytes: int, *, max_age: int | None = None):
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.num_bytes = 0
        self.num_dropped = 0
        """Responses that left, or were too large to enter."""
        self._records: OrderedDict[str, _PromptRecord] = OrderedDict()  # used longest ago first
        self._holders: dict[int, OrderedDict[str, None]] = {}  # policy version -> prompts, used longest ago first
        self._length_weight = 0.0
        self._length_sum = 0.0

    def add(self, prompt_key: str, token_ids: Sequence[int] | np.ndarray, *, policy_version: int) -> None:
        """Keep a copy of a response. One that is larger than the whole limit only counts in the statistics."""
        if self.max_bytes < PROMPT_BYTES:
            self.num_dropped += 1
            return
        if prompt_key not in self._records:
            self._make_room(PROMPT_BYTES)
            self.num_bytes += PROMPT_BYTES
            self._records[prompt_key] = _PromptRecord()
        self._use(prompt_key)
        self._count_length(self._records[prompt_key], len(token_ids), policy_version)
        tokens = np.array(token_ids, dtype=np.int32)
        tokens.flags.writeable = False
        response = PastResponse(token_ids=tokens, policy_version=policy_version)
        if response.num_bytes + PROMPT_BYTES > self.max_bytes:
            self.num_dropped += 1
            return
        self._make_room(response.num_bytes)
        self._insert(prompt_key, response)
        if self.max_age is not None:
            self._drop_older_than(max(self._holders) - self.max_age)

    def responses(self, prompt_key: str) -> tuple[PastResponse, ...]:
        """Past responses of a prompt, in the order they were added; counts as a use."""
        if prompt_key not in self._records:
            return ()
        self._use(prompt_key)
        return tuple(self._records[prompt_key].responses)

    def lengths(self) -> np.ndarray:
        """[Q] tokens of each response that is held, ascending."""
        records = self._records.values()
        lengths = [len(response.token_ids) for record in records for response in record.responses]
        return np.sort(np.array(lengths, dtype=np.int64))

    def expected_length(self, prompt_key: str) -> float:
        """Tokens that a response of this prompt is expected to have; 0 if no response of any prompt is known.

        Geometric mean of its past lengths, newer ones weighing more, drawn towards that of all prompts.
        """
        if self._length_weight <= 0:
            return 0.0
        overall = self._length_sum / self._length_weight
        record = self._records.get(prompt_key, _PromptRecord())
        return math.exp((record.length_sum + LENGTH_PRIOR * overall) / (record.length_weight + LENGTH_PRIOR))

    def state_dict(self) -> dict:
        """Everything but the limits; JSON types and numpy arrays. P prompts, Q responses, T tokens."""
        records = list(self._records.values())
        responses = [response for record in records for response in record.responses]
        return {
            "prompt_keys": list(self._records),  # [P]
            "newest_versions": [record.newest_version for record in records],
            "length_weights": [record.length_weight for record in records],
            "length_sums": [record.length_sum for record in records],
            "num_responses": [len(record.responses) for record in records],
            "policy_versions": np.array([response.policy_version for response in responses], dtype=np.int64),  # [Q]
            "lengths": np.array([len(response.token_ids) for response in responses], dtype=np.int64),  # [Q]
            "token_ids": np.concatenate([np.zeros(0, np.int32), *(each.token_ids for each in responses)]),  # [T]
            "length_totals": [self._length_weight, self._length_sum],
            "num_dropped": self.num_dropped,
        }

    def load_state_dict(self, state: dict) -> None:
        """Take the place of what is held; where the limit is lower than it was when saved, responses leave."""
        self.num_bytes, self._records, self._holders = 0, OrderedDict(), {}
        ends = np.cumsum(state["lengths"])
        row = 0
        for index, prompt_key in enumerate(state["prompt_keys"]):
            self.num_bytes += PROMPT_BYTES
            self._records[prompt_key] = _PromptRecord(
                newest_version=state["newest_versions"][index], length_weight=state["length_weights"][index],
                length_sum=state["length_sums"][index],
            )  # fmt: skip
            for _ in range(state["num_responses"][index]):
                tokens = np.array(state["token_ids"][ends[row] - state["lengths"][row] : ends[row]], dtype=np.int32)
                tokens.flags.writeable = False
                version = int(state["policy_versions"][row])
                self._insert(prompt_key, PastResponse(token_ids=tokens, policy_version=version))
                row += 1
        self._length_weight, self._length_sum = state["length_totals"]
        self.num_dropped = state["num_dropped"]
        self._make_room(0)

    def _insert(self, prompt_key: str, response: PastResponse) -> None:
        self._records[prompt_key].responses.append(response)
        self._holders.setdefault(response.policy_version, OrderedDict())[prompt_key] = None
        self.num_bytes += response.num_bytes

    def _use(self, prompt_key: str) -> None:
        self._records.move_to_end(prompt_key)
        for version in {response.policy_version for response in self._records[prompt_key].responses}:
            self._holders[version].move_to_end(prompt_key)

    def _count_length(self, record: _PromptRecord, length: int, policy_version: int) -> None:
        """Update the statistics of a prompt and of all; an empty response counts as one token."""
        decay = LENGTH_DECAY if policy_version > record.newest_version else 1.0
        weight = decay * record.length_weight + 1
        total = decay * record.length_sum + math.log(max(length, 1))
        self._length_weight += weight - record.length_weight
        self._length_sum += total - record.length_sum
        record.length_weight, record.length_sum = weight, total
        record.newest_version = max(record.newest_version, policy_version)

    def _drop_older_than(self, policy_version: int) -> None:
        for version in sorted(version for version in self._holders if version < policy_version):
            while version in self._holders:
                self._drop_oldest(version)

    def _make_room(self, num_bytes: int) -> None:
        """Let things leave until `num_bytes` more are within the limit, which they must be on their own."""
        while self.num_bytes + num_bytes > self.max_bytes:
            if self._holders:
                self._drop_oldest(min(self._holders))
            else:
                _, record = self._records.popitem(last=False)
                self.num_bytes -= PROMPT_BYTES
                # Without records the sums are 0, not what rounding left of them.
                self._length_weight = self._length_weight - record.length_weight if self._records else 0.0
                self._length_sum = self._length_sum - record.length_sum if self._records else 0.0

    def _drop_oldest(self, version: int) -> None:
        """Of this version, the first response of the prompt that was used longest ago."""
        prompt_key = next(iter(self._holders[version]))
        responses = self._records[prompt_key].responses
        index = next(index for index, response in enumerate(responses) if response.policy_version == version)
        self.num_bytes -= responses.pop(index).num_bytes
        self.num_dropped += 1
        if all(response.policy_version != version for response in responses):
            del self._holders[version][prompt_key]
            if not self._holders[version]:
                del self._holders[version]
