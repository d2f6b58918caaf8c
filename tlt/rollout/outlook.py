"""How long a replica will still decode: what its unfinished responses still need, by past lengths, over how fast they
grow at present."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tlt.drafter.history import SuffixHistory
from tlt.types import Prompt, prompt_id_of

TELL_STEPS = 8
"""Engine steps between two estimates, and over which the present rate is taken."""


class NoOutlook:
    """No one asks how long it takes."""

    def begin(self, prompts: Sequence[Prompt], *, max_response_tokens: int) -> None:
        """Nothing to look up."""

    def after_step(self, lengths: Callable[[], Mapping[str, int]], now_s: float) -> None:
        """Nothing to tell."""


class Outlook:
    """Of one replica; `tell` is given the seconds that its longest response is still expected to take."""

    def __init__(self, history: SuffixHistory, tell: Callable[[float], None]):
        self.history = history
        self.tell = tell
        self.begin([], max_response_tokens=1)

    def begin(self, prompts: Sequence[Prompt], *, max_response_tokens: int) -> None:
        """A rollout of these prompts begins."""
        self.limit = max_response_tokens
        self.past = self.history.lengths()
        self.scales = {prompt.prompt_id: 1.0 for prompt in prompts}
        if len(self.past):
            typical = float(np.exp(np.log(np.maximum(self.past, 1)).mean()))
            for prompt in prompts:
                self.scales[prompt.prompt_id] = self.history.expected_length(prompt.problem_key) / typical
        self._num_steps = 0
        self._before: tuple[Mapping[str, int], float] = {}, 0.0

    def after_step(self, lengths: Callable[[], Mapping[str, int]], now_s: float) -> None:
        """An engine step ended; `lengths()` are the response tokens of each unfinished rollout, by name."""
        self._num_steps += 1
        if self._num_steps % TELL_STEPS or not len(self.past):
            return
        present = lengths()
        (before, before_s), self._before = self._before, (present, now_s)
        rate = growth_rate(before, present, now_s - before_s)
        if rate > 0:
            self.tell(max(self.expected_more(name, count) for name, count in present.items()) / rate)

    def expected_more(self, name: str, num_tokens: int) -> float:
        """Further tokens of a rollout that has `num_tokens`; a prompt's responses are as its past ones are to all."""
        return expected_more(self.past, num_tokens, scale=self.scales[prompt_id_of(name)], limit=self.limit)


def growth_rate(before: Mapping[str, int], present: Mapping[str, int], seconds: float) -> float:
    """Tokens a second of one response: the mean of those that were there before and have grown since, 0 of none."""
    grown = [count - before[name] for name, count in present.items() if count > before.get(name, count)]
    return sum(grown) / len(grown) / seconds if grown and seconds > 0 else 0.0


def expected_more(past: np.ndarray, num_tokens: int, *, scale: float, limit: int) -> float:
    """Mean residual life: of [Q] past lengths (ascending, times `scale`, cut at `limit`), those above `num_tokens`.

    What has outlived all known is expected to go on for as long again, as under any power law.
    """
    longer = past[np.searchsorted(past, num_tokens / scale, side="right") :]
    if not len(longer):
        return float(min(num_tokens, limit - num_tokens))
    return max(float(np.minimum(longer * scale, limit).mean()) - num_tokens, 0.0)
