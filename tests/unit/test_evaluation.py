"""Held-out evaluation: what it asks for; whole runs with it are in tests/e2e."""

from contextlib import nullcontext
from types import SimpleNamespace

from tlt.evaluation import Evaluation
from tlt.trace import NoTrace
from tlt.types import Prompt, Rollout, RolloutGroup, SamplingConfig


class Collector:
    """Remembers how it was told to sample."""

    trace, interrupt = NoTrace(), SimpleNamespace(held=nullcontext)

    def __init__(self) -> None:
        self.samplings: list[SamplingConfig] = []

    def collect(self, prompts, sampling, *, group_size, seed):
        self.samplings.append(sampling)
        rollout = Rollout(
            token_ids=(1,), logprobs=(0.0,), entropies=(0.0,), text="", finish_reason="stop", policy_version=0
        )  # fmt: skip
        size = {"rollouts": (rollout,) * group_size, "rewards": (1.0,) * group_size}
        return [RolloutGroup(prompt=prompt, **size) for prompt in prompts], {}


def test_no_drafter_learns_from_held_out_prompts():
    sampling, collector = SamplingConfig(temperature=0.7, top_k=5, max_response_tokens=4), Collector()
    prompt = Prompt(prompt_id="held-out 0", source="s", token_ids=(1,), text="", answer={})
    evaluation = Evaluation(
        [prompt], collector, sampling=sampling, num_samples=2, interval=1, train_iters=3,
        rollout_log=SimpleNamespace(write=lambda iteration, groups, *, name: None),
    )  # fmt: skip
    assert evaluation.metrics_if_due(0)["eval/sampled_accuracy"] == 1
    greedy, sampled = collector.samplings
    assert greedy.temperature == 0
    assert (sampled.temperature, sampled.top_k) == (0.7, 5)
    assert sampling.is_learned_from
    assert not sampled.is_learned_from
