"""Offline acceptance: against drafting every verification of a response one token at a time, as an engine does."""

import pytest
import torch

from tests.unit.drafter_cases import SAMPLES, drafted_one_by_one, make_target, make_trainer
from tlt.drafter.evaluation import SampledText, evaluate
from tlt.drafter.trainer import Target
from tlt.spec.acceptance import AcceptanceStats
from tlt.spec.race import race
from tlt.spec.randomness import TOKEN
from tlt.types import HiddenStateSample

NUM_DRAFT_TOKENS = 3
EVEN = torch.arange(0, 50, 2)


def probs_of(output: torch.Tensor, target: Target) -> torch.Tensor:
    return (output @ target.output_weight.T / target.temperature).softmax(-1)


def engine_walk(head, sample: HiddenStateSample, target: Target, *, seed: int, coupled: bool, cap: int):
    """Acceptance of one response, every draft made on its own text up to there."""
    stats = AcceptanceStats()
    tokens = sample.token_ids.tolist()
    known = sample.num_prompt_tokens + 1
    while known < len(tokens):
        count = min(NUM_DRAFT_TOKENS, sample.num_prompt_tokens + cap - known - 1)
        drafts: list[int] = []
        for step in range(count):
            output = drafted_one_by_one(head, target, sample, start=known - 2, tokens=drafts)[-1:]
            probs = probs_of(output, target)
            column = (
                race(probs, [seed], [known + step], stream=TOKEN, token_ids=EVEN) if coupled else probs.argmax(1)
            )  # fmt: skip
            drafts.append(int(EVEN[column]))
        accepted = 0
        while accepted < count and known + accepted < len(tokens) and drafts[accepted] == tokens[known + accepted]:
            accepted += 1
        if count > 0:
            stats.count(count, accepted, 0.0)
        known += accepted + 1
    return stats


def speak(head, target: Target, *, length: int, num_prompt_tokens: int, seed: int) -> HiddenStateSample:
    """A text that agrees with the head about half of the time."""
    generator = torch.Generator().manual_seed(seed)
    sample = SAMPLES[3]
    tokens = sample.token_ids[: num_prompt_tokens + 1].tolist()
    states = torch.randn(length - 1, sample.last_hidden_states.shape[1], generator=generator)
    while len(tokens) < length:
        known = HiddenStateSample(
            request_id="", token_ids=torch.tensor(tokens, dtype=torch.int32), num_prompt_tokens=num_prompt_tokens,
            last_hidden_states=states[: len(tokens) - 1], policy_version=0,
        )  # fmt: skip
        probs = probs_of(drafted_one_by_one(head, target, known, start=len(tokens) - 2, tokens=[])[-1:], target)
        guess = int(EVEN[race(probs, [seed], [len(tokens)], stream=TOKEN, token_ids=EVEN)])
        tokens.append(guess if torch.rand(1, generator=generator) < 0.6 else int(torch.randint(50, (1,))))
    return HiddenStateSample(
        request_id=str(seed), token_ids=torch.tensor(tokens, dtype=torch.int32), num_prompt_tokens=num_prompt_tokens,
        last_hidden_states=states, policy_version=0,
    )  # fmt: skip


@pytest.mark.parametrize("cut_off", [True, False])
def test_offline_acceptance_is_that_of_drafting_step_by_step(cut_off):
    torch.manual_seed(0)
    head, target = make_trainer().head, make_target()
    with torch.no_grad():
        samples = [speak(head, target, length=34, num_prompt_tokens=4, seed=seed) for seed in (1, 2)]
        texts = [SampledText(sample=sample, seed=int(sample.request_id)) for sample in samples]
        cap = 30 if cut_off else 100
        found = evaluate(
            head, texts, target=target, num_draft_tokens=NUM_DRAFT_TOKENS, max_response_tokens=cap
        )  # fmt: skip
        for coupled, stats in ((True, found.coupled), (False, found.one_hot)):
            expected = AcceptanceStats()
            for text in texts:
                expected.add(
                    engine_walk(head, text.sample, target, seed=text.seed, coupled=coupled, cap=cap)
                )  # fmt: skip
            assert (stats.num_drafts, stats.drafted, stats.accepted) == (
                expected.num_drafts, expected.drafted, expected.accepted
            )  # fmt: skip
    assert found.num_texts == 2
    assert 0.2 < found.coupled.acceptance_length - 1 < 2.9  # some stand, some do not
    assert found.coupled.accepted[2] > 0


def test_overlap_and_standing_of_sampled_drafts_are_their_means():
    # Texts drawn from the target itself: the estimate from the sampled tokens must meet the sum over all tokens.
    head, target = make_trainer().head, make_target()
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(8, 32, generator=generator)
    weight = target.output_weight
    overlaps, found = [], []
    for index in range(300):
        tokens = [4, 6]
        for state in states[:7]:  # every next token is drawn from the state before it
            p = torch.softmax(state @ weight.T / target.temperature, 0)
            tokens.append(int(EVEN[torch.multinomial(p, 1, generator=generator)]))
        sample = HiddenStateSample(
            request_id=str(index), token_ids=torch.tensor(tokens, dtype=torch.int32), num_prompt_tokens=1,
            last_hidden_states=torch.cat([states[7:], states[:7]]), policy_version=0,
        )  # fmt: skip
        one = evaluate(head, [SampledText(sample=sample, seed=index)], target=target, num_draft_tokens=1)
        found.append(one.overlap()[0])
        assert one.sampled_length == pytest.approx(1 + found[-1])
        for start in range(7):
            output = drafted_one_by_one(head, target, sample, start=start, tokens=[])
            p = probs_of(sample.last_hidden_states[start + 1 : start + 2], target)
            overlaps.append(float(torch.minimum(p, probs_of(output, target)).sum()))
    mean, expected = sum(found) / len(found), sum(overlaps) / len(overlaps)
    assert 0.05 < expected < 0.95
    assert mean == pytest.approx(expected, abs=0.03)  # 2,100 draws of a number in [0, 1]: 3 standard errors at most


def test_a_token_that_may_not_be_drafted_never_stands():
    head, target = make_trainer().head, make_target()
    sample = SAMPLES[1]
    odd = HiddenStateSample(
        request_id="odd", token_ids=sample.token_ids // 2 * 2 + 1, num_prompt_tokens=5,
        last_hidden_states=sample.last_hidden_states, policy_version=0,
    )  # fmt: skip
    found = evaluate(head, [SampledText(sample=odd, seed=1)], target=target, num_draft_tokens=2)
    assert found.one_hot.acceptance_length == found.coupled.acceptance_length == found.sampled_length == 1.0
    assert found.one_hot.num_drafts == 13  # of 14 verifications; the last token needs no draft
