"""Drafter training: alignment, packing, depths beyond the first, losses, trainer, on a small head of random weights.

Not covered here: that the engine feeds its drafter the same inputs (tests/engine/test_drafter_alignment.py), and
several ranks (tests/distributed/test_drafter_trainer.py).
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import smooth_l1_loss

from tests.unit.drafter_cases import (
    AUX_LAYERS,
    HIDDEN,
    PIECES,
    SAMPLES,
    VOCABULARY,
    drafted_one_by_one,
    make_sample,
    make_target,
    make_trainer,
    with_aux_states,
)  # fmt: skip
from tlt.config import DrafterConfig
from tlt.drafter import trainer
from tlt.drafter.batch import cut, micro_batches, pack, shuffled_steps, starts_of, whole
from tlt.drafter.losses import LossWeights, drafter_loss, target_distribution
from tlt.drafter.trainer import MIN_MICRO_STEP_STARTS, Target
from tlt.drafter.unroll import unroll
from tlt.drafter.vocabulary import draft_vocabulary
from tlt.types import HiddenStateSample, Piece


def test_a_start_has_its_hidden_state_the_next_token_and_the_next_hidden_state():
    sample = SAMPLES[0]  # nine tokens, three of them the prompt's: drafts begin at 2 and predict tokens 4, ..., 8
    assert list(starts_of(sample)) == [2, 3, 4, 5, 6]
    batch = pack([PIECES[1], whole(sample)], num_depths=3)
    begin, end = batch.bounds[1]
    assert end - begin == 7
    assert batch.next_token_ids[begin:end].tolist() == sample.token_ids[1:8].tolist()
    assert torch.equal(batch.hidden_states[begin:end], sample.last_hidden_states[:7])
    assert batch.position_ids[begin:end].tolist() == list(range(7))
    own = torch.arange(len(batch.starts))[-5:]
    assert (batch.starts[own] - begin).tolist() == [2, 3, 4, 5, 6]
    assert batch.room[own].tolist() == [3, 3, 3, 2, 1]
    for depth in (1, 2, 3):
        starts = own[batch.room[own] >= depth]
        rows = batch.start_rows[starts] + depth - 1
        positions = batch.starts[starts] - begin + depth - 1
        assert torch.equal(batch.row_position_ids[rows], positions)
        assert torch.equal(batch.row_token_ids[rows], sample.token_ids[positions + 1].long())
        assert torch.equal(batch.target_hidden_states[rows], sample.last_hidden_states[positions + 1])
    with pytest.raises(ValueError, match="needs a piece"):
        pack([], num_depths=1)


def starts_in(pieces: list[Piece]) -> list[tuple[str, int]]:
    return sorted((piece.sample.request_id, start) for piece in pieces for start in range(piece.first, piece.end))


def test_a_pass_has_every_start_once_however_it_is_cut():
    every = [(sample.request_id, start) for sample in SAMPLES for start in starts_of(sample)]
    assert len(every) == 5 + 14 + 1 + 18 + 0  # the last sample has one response token, which no draft precedes
    for size in (1, 7, 16, 100):
        steps = list(shuffled_steps(PIECES, starts_per_step=size, seed=3))
        assert starts_in([piece for step in steps for piece in step]) == sorted(every)
        assert all(sum(piece.num_starts for piece in step) >= size for step in steps[:-1])
        micro = list(micro_batches(PIECES, size))
        assert starts_in([piece for held in micro for piece in held]) == sorted(every)
        assert all(sum(piece.num_starts for piece in held) <= size for held in micro)
    short = list(micro_batches(PIECES, 100, max_positions=25))
    assert starts_in([piece for held in short for piece in held]) == sorted(every)
    assert [len(held) for held in short] == [2, 1, 1], "the longest response is longer than that alone"
    order = [[piece.sample.request_id for piece in step] for step in shuffled_steps(PIECES, starts_per_step=7, seed=3)]
    again = [[piece.sample.request_id for piece in step] for step in shuffled_steps(PIECES, starts_per_step=7, seed=4)]
    assert order != again
    assert cut(whole(make_sample(2, 2, seed=0)), 5) == []


@pytest.mark.parametrize("aux_layers", [(), AUX_LAYERS])
def test_every_depth_is_what_drafting_token_by_token_gives(aux_layers):
    trainer, num_depths = make_trainer(aux_layers=aux_layers), 4
    pieces = [part for piece in map(whole, map(with_aux_states, SAMPLES[:3])) for part in cut(piece, 8)]
    batch = pack(pieces, num_depths=num_depths, reads=trainer.head.reads)
    assert batch.hidden_states.shape[1] == (3 * HIDDEN if aux_layers else HIDDEN)
    starts = [(piece.sample, start) for piece in pieces for start in range(piece.first, piece.end)]
    deep = torch.rand(len(starts), generator=torch.Generator().manual_seed(0)) < 0.7
    with torch.no_grad():
        for going_on in (None, deep):
            depths = unroll(trainer.head, batch, trainer.target.embedding, num_depths=num_depths, deep=going_on)
            found = {
                (depth, int(start)): (output, int(row))
                for depth, one in enumerate(depths, start=1)
                for output, start, row in zip(one.output, one.starts, one.rows, strict=True)
            }
            for index, (sample, start) in enumerate(starts):
                room = min(num_depths, len(sample.token_ids) - 2 - start)
                room = room if going_on is None or going_on[index] else 1
                tokens = sample.token_ids[start + 2 : start + 1 + room].tolist()
                expected = drafted_one_by_one(trainer.head, trainer.target, sample, start=start, tokens=tokens)
                for depth in range(1, room + 1):
                    output, row = found.pop((depth, index))
                    torch.testing.assert_close(output, expected[depth - 1], rtol=1e-4, atol=1e-5)  # fp32, other order
                    assert torch.equal(batch.target_hidden_states[row], sample.last_hidden_states[start + depth])
            assert not found  # no depth beyond a sample's end


def gradients(trainer, pieces: list[Piece], max_starts: int) -> tuple[dict[str, float], list[torch.Tensor]]:
    sums: dict[str, float] = {}
    for held in micro_batches(pieces, max_starts):
        for name, value in trainer.micro_step(held).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums, [parameter.grad.clone() for parameter in trainer.head.parameters()]


@pytest.mark.parametrize("deep_frac", [1.0, 0.5])
def test_loss_and_gradient_do_not_depend_on_packing(deep_frac):
    sums, expected = gradients(make_trainer(deep_frac=deep_frac), PIECES, 100)
    for max_starts in (1, 6, 20):
        other, found = gradients(make_trainer(deep_frac=deep_frac), PIECES[::-1], max_starts)
        assert other == pytest.approx(sums, rel=1e-5)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # fp32 sums in another order


def test_a_head_of_three_layers_is_trained_on_them_and_for_the_last_hidden_state():
    trainer = make_trainer(aux_layers=AUX_LAYERS)
    samples = [with_aux_states(sample) for sample in SAMPLES]
    before = {name: parameter.detach().clone() for name, parameter in trainer.head.named_parameters()}
    sums, gradient = gradients(trainer, [whole(sample) for sample in samples], 100)
    assert all(bool(one.any()) for one in gradient)
    trainer.step([whole(sample) for sample in samples])
    assert not torch.equal(trainer.head.fuse.weight, before["fuse.weight"])
    # The last hidden states are what it is compared with, and no input.
    changed = [replace(sample, last_hidden_states=sample.last_hidden_states.roll(1, 0)) for sample in samples]
    outputs = []
    for some in (samples, changed):
        batch = pack([whole(sample) for sample in some[:2]], num_depths=2, reads=trainer.head.reads)
        outputs.append(unroll(trainer.head, batch, trainer.target.embedding, num_depths=2)[1].output)
    assert torch.equal(*outputs)
    other, _ = gradients(make_trainer(aux_layers=AUX_LAYERS), [whole(sample) for sample in changed], 100)
    assert other["loss"] != pytest.approx(sums["loss"], rel=1e-3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        make_trainer().micro_step([whole(replace(s, last_hidden_states=s.aux_hidden_states)) for s in samples[:2]])


def test_positions_count_by_their_weights():
    sample, num_depths = SAMPLES[1], 2
    weights = torch.zeros(len(sample.token_ids))
    weights[9] = 2.0  # where a draft was read that was rejected
    weighted = make_trainer(num_depths=num_depths)
    sums, _ = gradients(weighted, [whole(sample, weights=weights)], 100)
    plain = make_trainer(num_depths=num_depths)
    alone, _ = gradients(plain, [Piece(sample=sample, first=8, end=10)], 100)
    # Position 9 is the first token of the draft from 9 and the second of that from 8; of the two drafts alone there
    # are position 8's first and position 10's second besides.
    assert sums["weight"] == pytest.approx(2.0 * (1 + 0.9))
    assert alone["weight"] == pytest.approx(2 * (1 + 0.9))
    assert 0 < sums["loss"] < 2 * alone["loss"]


def test_nothing_but_the_head_is_trained():
    trainer = make_trainer(total_variation_weight=0.5)
    target = trainer.target
    before = target.embedding.clone(), target.output_weight.clone()
    head = [parameter.detach().clone() for parameter in trainer.head.parameters()]
    hidden = [sample.last_hidden_states.clone() for sample in SAMPLES]
    trainer.step(PIECES)
    assert torch.equal(before[0], target.embedding)
    assert torch.equal(before[1], target.output_weight)
    assert all(torch.equal(a, s.last_hidden_states) for a, s in zip(hidden, SAMPLES, strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(head, trainer.head.parameters(), strict=True))
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.head.parameters()}
    # Tensors that would record a gradient, as a policy's parameters do, get none.
    policy = {name: getattr(target, name).clone().requires_grad_() for name in ("embedding", "output_weight")}
    trainer.renew_target(Target(**policy, temperature=1.0))
    trainer.step(PIECES)
    assert all(parameter.grad is None for parameter in policy.values())


def test_losses_are_their_equations():
    generator = torch.Generator().manual_seed(0)
    output, hidden = torch.randn(2, 6, HIDDEN, generator=generator)
    weight = 0.5 * torch.randn(VOCABULARY, HIDDEN, generator=generator)
    p, q = ((x @ weight.T / 0.7).softmax(1) for x in (hidden, output))
    target = target_distribution(hidden, weight, temperature=0.7)
    torch.testing.assert_close(target.probs, p)
    torch.testing.assert_close(target.entropy, -(p * p.log()).sum(1))
    loss, parts = drafter_loss(
        output, hidden, target, weight, temperature=0.7,
        weights=LossWeights(cross_entropy=2.0, total_variation=0.3, hidden=0.5),
    )  # fmt: skip
    expected = {
        "kl": (p * (p / q).log()).sum(1),
        "total_variation": 0.5 * (p - q).abs().sum(1),
        "hidden": smooth_l1_loss(output, hidden, reduction="none").mean(1),
    }
    assert set(parts) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        loss, 2 * expected["kl"] + 0.3 * expected["total_variation"] + 0.5 * expected["hidden"], rtol=1e-4, atol=1e-5
    )
    same, _ = drafter_loss(hidden, hidden, target, weight, temperature=0.7, weights=LossWeights(total_variation=1.0))
    assert same.abs().max() < 1e-5


def text_of_states(shift: int) -> list[HiddenStateSample]:
    """Random tokens; the state at a position is a function of the token `shift` positions before it."""
    states = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(1)) * 2
    tokens = torch.randint(VOCABULARY, (24, 30), generator=torch.Generator().manual_seed(5))
    return [
        HiddenStateSample(
            request_id=str(i), token_ids=row.int(), num_prompt_tokens=1, policy_version=0,
            last_hidden_states=states[row.roll(shift)][:-1],
        )
        for i, row in enumerate(tokens)
    ]  # fmt: skip


def test_training_learns_the_right_alignment_and_not_one_that_is_off_by_one():
    # The output at t stands for the state at t + 1, which with shift 0 is a function of the given token t + 1; with
    # shift -1 it is one of token t + 2, which nothing tells.
    kl = {}
    for shift in (0, -1):
        trainer = make_trainer(lr=6e-3, starts_per_step=1000, num_depths=2, warmup_steps=5)
        pieces = [whole(sample) for sample in text_of_states(shift)]
        for _ in range(50):
            trainer.step(pieces[:20])
        sums, _ = gradients(trainer, pieces[20:], 1000)
        kl[shift] = sums["kl"] / sums["weight"]
    assert kl[0] < 0.3 < 1.0 < kl[-1]


def test_one_batch_is_learned_by_heart():
    trainer = make_trainer(lr=4e-3, warmup_steps=5)
    first = trainer.step(PIECES)
    for _ in range(200):
        last = trainer.step(PIECES)
    assert last["kl"] < 0.02 * first["kl"]
    assert last["loss"] < 0.05 * first["loss"]


def counted(trainer, steps: int):
    return lambda: min(trainer.num_steps / steps, 1.0)


def has_gradients(trainer) -> bool:
    return any(parameter.grad is not None for parameter in trainer.head.parameters())


@pytest.mark.parametrize("num_looks_more", [0, 1], ids=["after a micro-step", "after a forward pass"])
def test_a_step_that_is_stopped_is_made_of_what_it_gathered_if_that_is_enough(num_looks_more):
    micro = list(micro_batches(PIECES, 8))
    total = sum(piece.num_starts for piece in PIECES)
    made = []
    for num_before in range(1 - num_looks_more, len(micro) + 1 - num_looks_more):
        gathered = [piece for held in micro[:num_before] for piece in held]
        num_starts = sum(piece.num_starts for piece in gathered)
        stopped, expected, untouched = make_trainer(), make_trainer(), make_trainer()
        stopped.micro_step_starts = expected.micro_step_starts = 8
        answers = [*[False] * (2 * num_before - 1 + num_looks_more), True]
        metrics = stopped.step(PIECES, should_stop=lambda answers=answers: answers.pop(0), least_frac=0.5)
        assert not answers, "it stops as soon as it is told, and asks no more"
        assert not has_gradients(stopped)
        if 2 * num_starts >= total:
            assert (metrics["starts"], metrics["stop"]) == (num_starts, 1)
            expected.step(gathered)
        else:
            assert metrics == {}
            expected = untouched
        assert stopped.num_steps == expected.num_steps
        for a, b in zip(expected.head.parameters(), stopped.head.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        made.append(bool(metrics))
    assert made == sorted(made)
    assert True in made
    assert False in made


def test_an_interrupted_training_ends_as_if_it_had_not_been():
    config = {"starts_per_step": 16, "deep_frac": 0.5}
    uninterrupted = make_trainer(**config)
    uninterrupted.train(PIECES, progress=counted(uninterrupted, 7))
    # Stops after a micro-step of the third optimizer step: what it had gathered is dropped, and made anew.
    first = make_trainer(**config)
    first.micro_step_starts = 8  # makes the first steps many micro-steps
    first.train(
        PIECES, progress=counted(first, 7), should_stop=lambda: first.num_steps == 2 and has_gradients(first)
    )  # fmt: skip
    assert first.num_steps == 2
    assert all(parameter.grad is None for parameter in first.head.parameters())
    second = make_trainer(seed=99, **config)
    second.load_state_dict(first.state_dict())
    second.train(PIECES, progress=counted(second, 7))
    assert (second.num_steps, second.num_passes) == (uninterrupted.num_steps, uninterrupted.num_passes) == (7, 2)
    for a, b in zip(uninterrupted.head.parameters(), second.head.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # micro-steps of other sizes: sums in another order
    for name, average in uninterrupted.published().items():
        torch.testing.assert_close(average, second.published()[name], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="checkpoint holds"):
        second.load_state_dict({**first.state_dict(), "head": {}})


def test_the_learning_rate_warms_up_and_decays_with_what_is_done():
    trainer = make_trainer(warmup_steps=4, min_lr_frac=0.1)
    assert trainer.lr_scale(0.0) == pytest.approx(0.25)
    trainer.num_steps = 100
    assert trainer.lr_scale(0.0) == pytest.approx(1.0)
    assert trainer.lr_scale(0.5) == pytest.approx(0.55)
    assert trainer.lr_scale(1.0) == pytest.approx(0.1)


def test_micro_steps_take_the_size_that_fits_their_time():
    trainer = make_trainer(micro_step_ms=200, starts_per_step=512)
    for _ in range(20):
        trainer._adapt(trainer.micro_step_starts, trainer.micro_step_starts * 2e-3)  # 2 ms a start
    assert trainer.micro_step_starts == pytest.approx(100, abs=2)
    for _ in range(20):
        trainer._adapt(trainer.micro_step_starts, 10.0)
    assert trainer.micro_step_starts == MIN_MICRO_STEP_STARTS


def test_the_published_weights_are_an_average_that_forgets_the_random_ones():
    trainer = make_trainer(ema_decay=0.9)
    for _ in range(20):
        trainer.step(PIECES, lr_scale=0.1)
    first = trainer.published()
    for _ in range(80):
        trainer.step(PIECES, lr_scale=0.0)
    for name, parameter in trainer.head.named_parameters():
        torch.testing.assert_close(trainer.published()[name], parameter.detach(), rtol=1e-3, atol=1e-4)
        assert not torch.equal(first[name], parameter)
    last = make_trainer(ema_decay=0.0)
    last.step(PIECES)
    assert all(torch.equal(last.published()[name], parameter) for name, parameter in last.head.named_parameters())


def test_a_new_target_is_what_the_next_step_learns():
    trainer = make_trainer()
    pieces = PIECES[:2]
    before, _ = gradients(trainer, pieces, 100)
    trainer.renew_target(replace(make_target(), output_weight=-trainer.target.output_weight))
    after, _ = gradients(trainer, pieces, 100)
    assert after["hidden"] == pytest.approx(before["hidden"])
    assert after["kl"] != pytest.approx(before["kl"], rel=1e-3)


def test_the_draft_vocabulary_is_the_most_frequent_tokens_in_order():
    ids, coverage = draft_vocabulary(torch.tensor([5, 0, 9, 1, 5, 0]), 3)
    assert ids.tolist() == [0, 2, 4]
    assert coverage == pytest.approx(19 / 20)
    assert draft_vocabulary(torch.tensor([0, 0, 7, 0]), 2)[0].tolist() == [0, 2]
    assert draft_vocabulary(torch.tensor([1, 2]), 10)[0].tolist() == [0, 1]


def test_bad_settings_are_refused_by_their_flag():
    for name, value in (("deep_frac", 0.0), ("num_depths", 0), ("lr", 0.0), ("ema_decay", 1.0), ("depth_decay", 2.0)):
        with pytest.raises(ValueError, match="--drafter-" + name.replace("_", "-")):
            DrafterConfig(**{name: value})


def test_products_in_bfloat16_teach_the_same_and_leave_weights_in_float32(monkeypatch):
    monkeypatch.setattr(trainer, "multiplies_in", lambda dtype, device: True)
    full, half = make_trainer(), make_trainer(dtype=torch.bfloat16)
    for _ in range(20):
        expected, found = full.step(PIECES), half.step(PIECES)
    assert found["kl"] != expected["kl"], "or it was not bfloat16"
    assert found["kl"] == pytest.approx(expected["kl"], rel=0.02)
    assert expected["kl"] < 1.2, "it learned"
    assert {tensor.dtype for tensor in half.published().values()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in half.optimizer.state.values()} == {torch.float32}


def test_a_cpu_that_would_emulate_bfloat16_multiplies_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert make_trainer(dtype=torch.bfloat16).dtype == torch.float32
    assert trainer.multiplies_in(torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert make_trainer(dtype=torch.bfloat16).dtype == torch.bfloat16
