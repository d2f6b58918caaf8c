"""The loss against a table by hand and against a straightforward implementation: loops over sequences, no packing."""

import math
import random

import pytest
import torch

from tlt.config import RLConfig
from tlt.rl.losses import kl_penalty, policy_loss
from tlt.rl.packing import pack
from tlt.types import PackedMicroBatch, TrainSequence


def one_token(*, advantage: float, old: float, rollout: float | None = None) -> PackedMicroBatch:
    sequence = TrainSequence(
        token_ids=(1, 2),
        num_prompt_tokens=1,
        advantage=advantage,
        rollout_logprobs=(old if rollout is None else rollout,),
        loss_weight=1.0,
    )
    batch = pack([sequence])
    batch.old_logprobs = torch.tensor([old])
    return batch


# ratio = exp(logprob - old); clip range [0.8, 1.28]
@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "expected_loss"),
    [
        (1.0, 2.0, None, -2.0),
        (1.5, 2.0, None, -2.56),  # clipped above: 1.28 x 2
        (0.5, 2.0, None, -1.0),  # A > 0, low ratio: not clipped
        (1.5, -2.0, None, 3.0),  # A < 0, high ratio: not clipped
        (0.5, -2.0, None, 1.6),  # clipped below: 0.8 x 2
        (5.0, -2.0, None, 10.0),
        (5.0, -2.0, 3.0, 6.0),  # dual clip: 3 x 2
        (5.0, 2.0, 3.0, -2.56),  # dual clip leaves positive advantages alone
    ],
)
def test_clipped_loss_is_that_of_the_table(ratio, advantage, dual_clip, expected_loss):
    rl = RLConfig(clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
    batch = one_token(advantage=advantage, old=-1.0)
    result = policy_loss(torch.tensor([-1.0 + math.log(ratio)]), torch.zeros(1), batch, rl)
    assert result.loss.item() == pytest.approx(expected_loss, rel=1e-5)


def test_importance_weight_multiplies_the_policy_term_up_to_its_cap():
    for difference, weight in ((math.log(1.5), 1.5), (math.log(9.0), 2.0), (math.log(0.25), 0.25)):
        batch = one_token(advantage=1.0, old=-1.0, rollout=-1.0 - difference)
        result = policy_loss(torch.tensor([-1.0]), torch.zeros(1), batch, RLConfig(importance_sampling_cap=2.0))
        assert result.loss.item() == pytest.approx(-weight, rel=1e-5)
        off = policy_loss(torch.tensor([-1.0]), torch.zeros(1), batch, RLConfig(importance_sampling_cap=None))
        assert off.loss.item() == pytest.approx(-1.0, rel=1e-5)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)])
def test_kl_estimators_are_those_of_the_table(estimator, expected):
    value = kl_penalty(torch.tensor([-1.0]), torch.tensor([-1.5]), estimator)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_without_old_logprobs_the_ratio_is_one_and_has_a_gradient():
    batch = one_token(advantage=2.0, old=-1.0)
    batch.old_logprobs = None
    logprobs = torch.tensor([-1.0], requires_grad=True)
    result = policy_loss(logprobs, torch.zeros(1), batch, RLConfig(importance_sampling_cap=None))
    result.loss.backward()
    assert result.loss.item() == -2.0
    assert logprobs.grad.item() == -2.0


def reference_loss(sequences, logprobs, old, ref, entropy, rl) -> float:
    """Sum over sequences and tokens, scalar arithmetic."""
    total = 0.0
    for sequence, own, before, reference, spread in zip(sequences, logprobs, old, ref, entropy, strict=True):
        for t in range(sequence.num_response_tokens):
            a = sequence.advantage
            rho = math.exp(own[t] - before[t])
            bounded = min(max(rho, 1 - rl.clip_low), 1 + rl.clip_high)
            gain = min(rho * a, bounded * a)
            if rl.dual_clip and a < 0:
                gain = max(gain, rl.dual_clip * a)
            gain *= min(math.exp(before[t] - sequence.rollout_logprobs[t]), rl.importance_sampling_cap)
            d = own[t] - reference[t]
            penalty = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[rl.kl_estimator]
            total += sequence.loss_weight * (-gain + rl.kl_coef * penalty - rl.entropy_coef * spread[t])
    return total


@pytest.mark.parametrize("seed", range(20))
def test_loss_equals_the_straightforward_implementation(seed):
    rng = random.Random(seed)
    rl = RLConfig(
        clip_low=0.2,
        clip_high=0.3,
        dual_clip=rng.choice([None, 2.0]),
        kl_coef=0.1,
        kl_estimator=rng.choice(["k1", "k2", "k3"]),
        entropy_coef=0.01,
    )

    def noise(size, low=-3.0, high=0.0):
        return [rng.uniform(low, high) for _ in range(size)]

    sequences = []
    for _ in range(rng.randint(1, 6)):
        prompt, response = rng.randint(1, 5), rng.randint(1, 7)
        sequences.append(
            TrainSequence(
                token_ids=tuple(range(prompt + response)),
                num_prompt_tokens=prompt,
                advantage=rng.uniform(-2, 2),
                rollout_logprobs=tuple(noise(response)),
                loss_weight=rng.uniform(0.1, 1),
            )
        )
    logprobs, old, ref = ([noise(s.num_response_tokens) for s in sequences] for _ in range(3))
    entropy = [noise(s.num_response_tokens, 0, 3) for s in sequences]
    batch = pack(sequences)
    batch.old_logprobs, batch.ref_logprobs = torch.tensor(sum(old, [])), torch.tensor(sum(ref, []))
    result = policy_loss(torch.tensor(sum(logprobs, [])), torch.tensor(sum(entropy, [])), batch, rl)
    expected = reference_loss(sequences, logprobs, old, ref, entropy, rl)
    assert result.loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)  # float32 sums of up to 42 terms
