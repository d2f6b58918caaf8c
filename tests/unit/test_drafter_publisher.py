"""A head is published only if recent text that it did not see says that it is better."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.unit.drafter_cases import make_target, make_trainer
from tests.unit.test_drafter_training import text_of_states
from tlt.drafter.batch import whole
from tlt.drafter.publisher import HELD_OUT_SHARE, DrafterPublisher, is_held_out


def samples(version: int = 1):
    return [
        replace(one, request_id=f"{version}/{one.request_id}", policy_version=version) for one in text_of_states(0)
    ]


def make_publisher(trainer, **kwargs) -> DrafterPublisher:
    return DrafterPublisher(copy.deepcopy(trainer.head), version=3, num_draft_tokens=2, **kwargs)


def trained(steps: int):
    trainer = make_trainer(lr=6e-3, starts_per_step=1000, num_depths=2, warmup_steps=5)
    pieces = [whole(sample) for sample in samples() if not is_held_out(sample)]
    for _ in range(steps):
        trainer.step(pieces)
    return trainer


def test_a_better_head_is_published_and_a_worse_one_is_not():
    random, better = trained(0), trained(25)
    publisher = make_publisher(random)
    text = samples()
    verdict = publisher.consider(better.published(), text, target=better.target)
    assert verdict.is_published
    assert verdict.version == publisher.version == 4
    assert verdict.candidate_length > verdict.live_length + 0.05
    assert verdict.num_texts == sum(map(is_held_out, text)) > 0
    assert all(torch.equal(tensor, better.published()[name]) for name, tensor in publisher.live.items())
    for candidate in (random.published(), better.published()):  # worse; as good
        again = publisher.consider(candidate, text, target=better.target)
        assert not again.is_published
        assert again.version == 4
        assert again.live_length == pytest.approx(verdict.candidate_length)
    assert all(torch.equal(tensor, better.published()[name]) for name, tensor in publisher.live.items())
    demanding = make_publisher(random, min_gain=10.0)
    assert not demanding.consider(better.published(), text, target=better.target).is_published


def test_only_recent_held_out_text_decides():
    random, better = trained(0), trained(5)
    # The older version's text comes from another model: there the trained head is no better.
    older = [replace(one, last_hidden_states=-one.last_hidden_states) for one in samples(version=0)]
    verdict = make_publisher(random).consider(better.published(), [*older, *samples(version=1)], target=better.target)
    alone = make_publisher(random).consider(better.published(), samples(version=1), target=better.target)
    assert verdict == alone
    few = make_publisher(random, max_texts=1).consider(better.published(), samples(), target=better.target)
    assert few.num_texts == 1
    seen = [sample for sample in samples() if not is_held_out(sample)]
    none = make_publisher(random).consider(better.published(), seen, target=better.target)
    assert (none.is_published, none.num_texts) == (False, 0)


def test_a_broken_candidate_is_refused():
    trainer = trained(0)
    publisher = make_publisher(trainer)
    weights = trainer.published()
    with pytest.raises(ValueError, match="not finite"):
        publisher.consider(
            {**weights, "fc.weight": weights["fc.weight"] * float("nan")}, samples(), target=make_target()
        )
    with pytest.raises(ValueError, match="the live drafter has the weights"):
        publisher.consider({"fc.weight": weights["fc.weight"]}, samples(), target=make_target())
    assert publisher.version == 3


def test_a_roll_back_makes_the_former_head_the_one_to_beat():
    random, better = trained(0), trained(5)
    publisher = make_publisher(random)
    former = publisher.live
    publisher.consider(better.published(), samples(), target=better.target)
    publisher.withdrawn(former, version=5)
    assert publisher.version == 5
    assert all(torch.equal(tensor, former[name]) for name, tensor in publisher.live.items())


def test_held_out_responses_are_a_fixed_share_of_all():
    many = [replace(samples()[0], request_id=f"{i}:p#{j}") for i in range(500) for j in range(4)]
    share = sum(map(is_held_out, many)) / len(many)
    assert share == pytest.approx(1 / HELD_OUT_SHARE, abs=0.03)
