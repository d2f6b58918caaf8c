"""Idle ranks: states and transitions, what is trained on, averaged and judged.

Every order of what ranks do: test_spot_protocol.py. Real processes and delays: tests/distributed/test_spot_ranks.py.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from tests.unit.drafter_cases import make_sample, make_target, make_trainer
from tlt.config import DrafterConfig, SpotConfig
from tlt.drafter import trainer
from tlt.drafter.batch import cut, starts_of, stretches, whole
from tlt.drafter.buffer import HiddenStateBuffer
from tlt.drafter.learner import HeadLearner
from tlt.spot.board import TailBoard
from tlt.spot.judgement import NO_JUDGES, Judges
from tlt.spot.rank_state import TRANSITIONS, Event, Rank, RankState
from tlt.spot.training import SpotTraining, is_held_out
from tlt.trace import NoTrace
from tlt.types import drawn_prompt_id, prompt_id_of, rollout_name


class Counters:
    """A store of one process."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def add(self, key: str, amount: int) -> int:
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]


def test_whatever_the_table_does_not_list_is_refused():
    for state in RankState:
        for event in Event:
            rank = Rank()
            rank.state = state
            if (state, event) in TRANSITIONS:
                rank.on(event)
                assert rank.state is TRANSITIONS[state, event]
            else:
                with pytest.raises(RuntimeError, match=state.value):
                    rank.on(event)


def test_from_every_state_a_rank_can_come_back():
    ways: dict[RankState, set[RankState]] = {state: set() for state in RankState}
    for (state, _), target in TRANSITIONS.items():
        ways[state].add(target)
    for state in RankState:
        found, frontier = set(), {state}
        while frontier:
            found |= frontier
            frontier = set().union(*(ways[each] for each in frontier)) - found
        assert RankState.BACK in found, state


def test_rollouts_have_counters_of_their_own():
    store = Counters()
    boards = [TailBoard(store, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(3):
        for board in boards:
            board.begin()
        boards[0].ended()
        assert not boards[0].all_ended()
        boards[1].ended()
        assert boards[0].all_ended()
        assert boards[1].all_ended()


class Watched:
    """A learner that notes what it is given."""

    def __init__(self) -> None:
        self.trained: list = []
        self.judged: list = []

    def train(self, samples, *, should_stop, on_step) -> None:
        self.trained += samples
        on_step()

    def average(self, sum_in_place, gather, *, weight: float) -> None:
        """One rank is its own mean."""

    def score(self, pieces, tensors, *, should_stop=None) -> torch.Tensor:
        self.judged += [piece.sample for piece in pieces]
        return torch.zeros(len(pieces), dtype=torch.float64)

    def published(self) -> dict:
        return {}


class Engine:
    """Part of the engine that is asked for, with a real buffer."""

    policy_version = drafter_version = 0

    def __init__(self, *, max_bytes: int):
        self.buffer = HiddenStateBuffer(max_bytes)

    def rollout(self, version: int, lengths: Sequence[int]) -> None:
        self.policy_version = version
        for index, length in enumerate(lengths):
            sample = replace(make_sample(length, 3, seed=index), policy_version=version)
            self.buffer.add(replace(sample, request_id=rollout_name(f"v{version}:p{index // 2}", index % 2)))

    def hidden_state_samples(self) -> list:
        return list(self.buffer)

    def training_samples(self, *, seed: int) -> list:
        return self.buffer.training_samples(seed=seed)

    def drafter_tensors(self) -> dict:
        return {}


def watched_tail(engine: Engine, learner: Watched, config: SpotConfig) -> None:
    spot = SpotTraining(
        learner, engine, TailBoard(Counters(), rank=0, world_size=2), Alone(), config=config, is_stopped=lambda: False,
        trace=NoTrace(),
    )  # fmt: skip
    spot.begin()
    spot.use_tail()
    spot.publish()


class Alone:
    rank, world_size = 0, 1

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def sum_in_place(self, values: torch.Tensor) -> None:
        """Of one rank."""

    def all_gather_objects(self, value) -> list:
        return [value]


def test_old_samples_are_left_and_held_out_ones_are_never_trained_on():
    config, learner, engine = SpotConfig(max_age=1, held_out_every=4), Watched(), Engine(max_bytes=230_000)
    trained, judged = set(), set()
    for version in range(1, 7):  # odd versions have long responses; old samples leave the buffer for lack of room
        engine.rollout(version, range(8, 48) if version % 2 else range(8, 28))
        watched_tail(engine, learner, config)
        trained |= {sample.request_id for sample in learner.trained}
        judged |= {sample.request_id for sample in learner.judged}
        versions = {sample.policy_version for sample in learner.trained}
        assert versions == ({version} if version % 2 else {version - 1, version}), "long ones come from before"
        assert {sample.policy_version for sample in learner.judged} == {version, max(version - 1, 1)}
        learner.trained.clear()
        learner.judged.clear()
    assert engine.buffer.num_dropped > 0
    assert not trained & judged
    prompts = set(map(prompt_id_of, judged))
    assert not prompts & set(map(prompt_id_of, trained)), "siblings of what is trained on are no judges"
    assert len(prompts) == pytest.approx(90 / 4, abs=13)  # 3 standard deviations of 4.1


class Scoring(Watched):
    """Scores a piece between two questions whether to stop; notes of whose weights."""

    def __init__(self, *, num_in_tail: int) -> None:
        super().__init__()
        self.num_in_tail = num_in_tail
        self.scored: list[tuple[object, int]] = []

    def score(self, pieces, tensors, *, should_stop=None) -> torch.Tensor:
        num = len(pieces) if should_stop is None else self.num_in_tail
        self.scored.append((tensors["of"], len(pieces[:num])))
        return torch.arange(len(pieces[:num]), dtype=torch.float64)

    def published(self) -> dict:
        return {"of": "candidate"}


def judging(learner: Scoring, **config) -> SpotTraining:
    """A rank of two, in whose tail one optimizer step was made."""
    engine = Engine(max_bytes=230_000)
    engine.drafter_tensors = lambda: {"of": engine.drafter_version}
    engine.rollout(0, [30] * 24)
    spot = SpotTraining(
        learner, engine, TailBoard(Counters(), rank=0, world_size=2), Alone(), is_stopped=lambda: False,
        config=SpotConfig(held_out_every=2, **config), trace=NoTrace(),
    )  # fmt: skip
    spot.begin()
    spot.use_tail()
    return spot


def test_the_head_that_drafts_is_judged_in_the_tail_and_the_trained_one_at_the_meeting():
    learner = Scoring(num_in_tail=100)
    spot = judging(learner, judge_starts=50)
    assert learner.scored == [(0, 4)], "13 drafts of each response, at every other of its 26 tokens"
    metrics = spot.publish()
    assert learner.scored[1:] == [("candidate", 4)]
    assert metrics["spot/judges"] == 4


def test_what_was_scored_before_a_tail_ended_judges_and_all_ranks_do_where_it_is_not_enough():
    learner = Scoring(num_in_tail=5)
    metrics = judging(learner, compare_first="on").publish()
    assert learner.scored == [(0, 5), (0, 5), ("candidate", 5)]
    assert metrics["spot/judges"] == 5
    learner = Scoring(num_in_tail=0)
    judging(learner).publish()
    assert [of for of, _ in learner.scored] == [0, 0, "candidate"]
    assert learner.scored[0][1] == 0 < learner.scored[1][1] == learner.scored[2][1]


def test_scores_of_a_head_that_was_withdrawn_are_made_anew():
    learner = Scoring(num_in_tail=100)
    spot = judging(learner, judge_starts=100)
    spot.engine.drafter_version += 1
    spot.publish()
    assert [of for of, _ in learner.scored] == [0, 1, "candidate"]


@pytest.mark.parametrize("every", [2, 3, 8])
def test_one_of_so_many_prompts_that_are_drawn_in_a_row_judges(every):
    sample, places = make_sample(9, 3, seed=0), []
    for row in range(40):
        names = [drawn_prompt_id(row * every + place + 1, "gcd/7") for place in range(every)]
        judges = [is_held_out(replace(sample, request_id=rollout_name(name, 5)), every=every) for name in names]
        assert sum(judges) == 1
        places.append(judges.index(True))
    counts = [places.count(place) for place in range(every)]
    assert max(counts) - min(counts) <= 2, "every place judges as often"


@pytest.mark.parametrize("are_held_out", [False, True])
def test_a_rank_of_one_prompt_trains_on_all_of_it_or_on_none_of_it(are_held_out):
    config, learner, engine = SpotConfig(held_out_every=2), Watched(), Engine(max_bytes=230_000)
    samples = [make_sample(20, 3, seed=seed) for seed in range(4)]
    names = (f"p{number}" for number in range(100))
    prompt = next(
        name for name in names
        if is_held_out(replace(samples[0], request_id=rollout_name(name, 0)), every=2) == are_held_out
    )  # fmt: skip
    for number, sample in enumerate(samples):
        engine.buffer.add(replace(sample, request_id=rollout_name(prompt, number)))
    watched_tail(engine, learner, config)
    assert (len(learner.trained), len(learner.judged)) == ((0, 0) if are_held_out else (4, 0))
    held_out = [sample for sample in engine.buffer if is_held_out(sample, every=2)]
    assert len(held_out) == 4 * are_held_out


def make_learner(seed: int = 1, *, embedding: torch.Tensor | None = None) -> HeadLearner:
    target = make_target()
    embedding = target.embedding if embedding is None else embedding
    return HeadLearner(
        make_trainer().head, DrafterConfig(starts_per_step=16, warmup_steps=0, num_depths=3), seed=seed,
        temperature=0.8, target=lambda: (embedding, target.output_weight),
    )  # fmt: skip


SAMPLES = [make_sample(14, 3, seed=seed) for seed in range(6)]
PIECES = [whole(sample) for sample in SAMPLES]


def trained(num_steps: int, seed: int = 1) -> HeadLearner:
    learner, count = make_learner(seed), []
    learner.train(SAMPLES, should_stop=lambda: len(count) >= num_steps, on_step=lambda: count.append(1))
    assert learner.trainer.num_steps == num_steps
    return learner


def step(learner: HeadLearner) -> None:
    learner.trainer.micro_step_starts = 16  # measured, so of other sizes: sums in another order
    learner.trainer.step([whole(sample) for sample in SAMPLES])


def shared_by(learner: HeadLearner) -> list[torch.Tensor]:
    """All that ranks make one of."""
    parts = (learner.trainer.parameters.values(), learner.trainer.average.values(), moments(learner))
    return [tensor.detach().clone() for part in parts for tensor in part]


def moments(learner: HeadLearner) -> list[torch.Tensor]:
    """Adam's own, of all parameters."""
    return [state[name] for state in learner.trainer.optimizer.state.values() for name in trainer.MOMENTS]


def meet(learners: list[HeadLearner], weights: list[float]) -> None:
    """As on ranks of their own; first each one's part is made, then all get the sum."""
    parts: list[list[torch.Tensor]] = [[] for _ in learners]
    counts: list[list[int]] = []
    for own, learner, weight in zip(parts, copy.deepcopy(learners), weights, strict=True):
        learner.average(
            lambda tensor, own=own: own.append(tensor.clone()), lambda own: (counts.append(own), [own])[1],
            weight=weight,
        )  # fmt: skip
    for learner, weight in zip(learners, weights, strict=True):
        sums = map(sum, zip(*parts, strict=True))
        learner.average(lambda tensor, sums=sums: tensor.copy_(next(sums)), lambda own: counts, weight=weight)


def test_weights_and_optimizers_become_the_mean_of_the_ranks_by_their_steps():
    learners = [trained(3, seed=1), trained(1, seed=2), make_learner(), trained(9, seed=3)]
    with torch.no_grad():
        for tensor in (*learners[3].trainer.parameters.values(), *moments(learners[3])):
            tensor.fill_(float("nan"))  # a rank whose trainer failed
    first, second, idle = map(shared_by, learners[:3])
    assert len(idle) == 4 * len(learners[0].trainer.parameters)
    expected = [0.75 * one + 0.25 * other for one, other in zip(first, second, strict=True)]
    meet(learners, [0.75, 0.25, 0.0, 0.0])
    for learner in learners:
        for found, tensor in zip(shared_by(learner), expected, strict=True):
            torch.testing.assert_close(found, tensor)
        assert learner.trainer.num_steps == 3
        assert {int(state["step"]) for state in learner.trainer.optimizer.state.values()} == {3}
    # Whoever trains next makes the same step.
    for learner in learners:
        step(learner)
    for learner in learners[1:]:
        for found, tensor in zip(shared_by(learner), shared_by(learners[0]), strict=True):
            assert torch.equal(found, tensor)


def test_training_that_begins_anew_keeps_nothing_of_the_one_before():
    learner, fresh = trained(5), make_learner()
    learner.begin_from(fresh.published())
    fresh.trainer.num_passes = learner.trainer.num_passes  # goes on: each pass takes other starts
    for each in (learner, fresh):
        step(each)
    for found, tensor in zip(shared_by(learner), shared_by(fresh), strict=True):
        torch.testing.assert_close(found, tensor)


def test_a_learning_rate_is_halved_three_times_and_kept_by_checkpoints():
    learner, resumed = make_learner(), make_learner()
    rates = [learner.trainer.lr_scale(0.0)]
    while learner.slow_down():
        rates.append(learner.trainer.lr_scale(0.0))
    assert rates == [1, 1 / 2, 1 / 4, 1 / 8]
    assert learner.trainer.lr_scale(0.0) == 1 / 8
    learner.begin_from(learner.published())
    resumed.load_state_dict(learner.state_dict())
    assert resumed.trainer.lr_scale(0.0) == 1 / 8
    assert not resumed.slow_down()


def test_the_average_of_a_head_that_drafts_holds_on_to_it():
    learner = make_learner()
    live, decay = learner.published(), learner.trainer.config.ema_decay
    step(learner)
    for name, parameter in learner.trainer.parameters.items():
        torch.testing.assert_close(
            learner.published()[name], decay * live[name] + (1 - decay) * parameter.detach()
        )  # fmt: skip


def test_a_score_is_the_expected_number_of_accepted_tokens_and_rises_with_training():
    learner = make_learner()
    live = learner.published()
    found = learner.score(PIECES, live)
    assert len(found) == len(PIECES)
    assert 0 < float(found.sum()) / sum(piece.num_starts for piece in PIECES) < learner.trainer.config.num_depths
    one_by_one = torch.cat([learner.score([piece], live) for piece in PIECES])
    torch.testing.assert_close(found, one_by_one, rtol=1e-5, atol=1e-5)
    parts = torch.stack([learner.score(cut(piece, 4), live).sum() for piece in PIECES])
    torch.testing.assert_close(found, parts, rtol=1e-5, atol=1e-5)
    better = trained(60)
    before = {name: parameter.detach().clone() for name, parameter in better.trainer.parameters.items()}
    torch.testing.assert_close(better.score(PIECES, live), found, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], p.detach()) for name, p in better.trainer.parameters.items())
    assert float(better.score(PIECES, better.published()).sum()) > 1.1 * float(found.sum())


def test_scoring_that_is_stopped_gives_the_first_scores():
    learner, answers = make_learner(), [False, False, True]  # before, and after each pair of them
    learner.trainer.micro_step_starts = 20  # two responses of ten drafts each
    found = learner.score(PIECES, learner.published(), should_stop=lambda: answers.pop(0))
    assert not answers
    torch.testing.assert_close(found, learner.score(PIECES, learner.published())[:4], rtol=1e-5, atol=1e-5)
    assert len(learner.score([], learner.published(), should_stop=lambda: pytest.fail("nothing to stop"))) == 0
    assert len(learner.score(PIECES, learner.published(), should_stop=lambda: True)) == 0


def test_a_policy_in_bfloat16_is_judged_as_one_in_float32(monkeypatch):
    monkeypatch.setattr(trainer, "multiplies_in", lambda dtype, device: True)
    rounded = make_target().embedding.bfloat16()
    half, full = make_learner(embedding=rounded), make_learner(embedding=rounded.float())
    assert half.trainer.dtype == torch.bfloat16
    assert full.trainer.dtype == torch.float32
    expected = full.score(PIECES, full.published())
    found = half.score(PIECES, full.published())
    assert not torch.equal(found, expected), "or it was not bfloat16"
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


def test_nothing_to_train_on_returns_at_once():
    make_learner().train(
        [make_sample(3, 3, seed=0)], should_stop=lambda: pytest.fail("asked although there is nothing"),
        on_step=lambda: pytest.fail("a step on nothing"),
    )  # fmt: skip


@pytest.mark.parametrize(("num_questions", "num_steps"), [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1), (6, 1)])
def test_half_of_a_step_is_made_when_the_tail_ends(num_questions, num_steps):
    learner, answers, steps = make_learner(), [*[False] * (num_questions - 1), True], []
    learner.trainer.micro_step_starts = 6  # a step has the 20 starts of two samples, in four micro-steps, of two looks
    learner.train(SAMPLES, should_stop=lambda: answers.pop(0), on_step=lambda: steps.append(1))
    assert not answers
    assert len(steps) == learner.trainer.num_steps == num_steps


def test_stretches_of_all_responses_judge_the_newest_policy_first():
    samples = [replace(make_sample(100, 3, seed=seed), policy_version=seed // 4) for seed in range(8)]  # of 96 drafts
    everything = stretches(samples, size=8, num_starts=10_000, seed=0)
    assert len(everything) == 8 * 12
    starts = {(piece.sample.request_id, start) for piece in everything for start in range(piece.first, piece.end)}
    assert len(starts) == sum(piece.num_starts for piece in everything) == sum(each.num_starts for each in samples)
    found = stretches(samples, size=8, num_starts=200, seed=0)
    assert found == everything[: len(found)]
    assert 200 <= sum(piece.num_starts for piece in found) < 208
    assert {piece.sample.policy_version for piece in found} == {1}
    assert {piece.sample.request_id for piece in found} == {each.request_id for each in samples[4:]}
    assert {piece.first // 50 for piece in found} == {0, 1}, "from anywhere in them"
    assert {piece.sample.policy_version for piece in stretches(samples, size=8, num_starts=400, seed=0)} == {0, 1}
    other = stretches(samples, size=8, num_starts=200, seed=1)
    assert [(each.sample.request_id, each.first) for each in other] != [
        (each.sample.request_id, each.first) for each in found
    ]
    assert stretches([make_sample(3, 3, seed=0)], size=8, num_starts=5, seed=0) == []


def test_every_other_start_is_scored_as_it_is_among_all():
    learner = make_learner()
    tensors, samples = learner.published(), [make_sample(41, 3, seed=1), make_sample(24, 6, seed=2)]
    ones = [one for sample in samples for one in cut(whole(sample), 1)]
    names = [(one.sample.request_id, one.first) for one in ones]
    scores = dict(zip(names, learner.score(ones, tensors), strict=True))
    pieces = stretches(samples, size=5, num_starts=10_000, seed=0, step=2)
    names = [[(piece.sample.request_id, start) for start in piece.starts] for piece in pieces]
    every_other = {(sample.request_id, start) for sample in samples for start in starts_of(sample)[::2]}
    assert sorted(name for each in names for name in each) == sorted(every_other)
    expected = torch.stack([torch.stack([scores[name] for name in each]).sum() for each in names])
    torch.testing.assert_close(learner.score(pieces, tensors), expected, rtol=1e-5, atol=1e-5)


def test_a_response_judges_once_by_all_of_its_stretches():
    first, second = make_sample(30, 3, seed=1), make_sample(12, 3, seed=2)
    pieces = (*cut(whole(first), 10)[:2], whole(second), cut(whole(first), 10)[2])
    judges = Judges(
        pieces=pieces, live=torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), first=torch.zeros(0), drafter_version=0
    )
    found = judges.scores(torch.tensor([5.0, 6.0, 7.0, 8.0]).double())
    assert found.tolist() == [[7, 19, 26], [3, 7, 8]]
    assert judges.num_starts == 34
    assert NO_JUDGES.scores(torch.zeros(0)).shape == (0, 3)
