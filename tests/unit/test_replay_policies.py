"""The replay of policies against numbers worked out by hand, the fit of its model, and its command."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tlt.spec.policy import parse_policy
from tlt.spec.recording import RecordedRollout, read_recording, write_recording
from tlt.spec.replay import Drift, Prospects, World, as_recorded, at_least, heavy_tailed, replay
from tlt.spec.step_model import DrafterModel, Line, StepModel, fit_model, stated_model
from tlt.spec.strategy import DecodeStep, parse_strategy
from tlt.types import OFF, SpecStrategy
from tools.replay_policies import main

QUIET = StepModel(
    steps=Line(0.010, 0.001),
    drafters={"eagle": DrafterModel(covers=(1.0,), stands=(1.0, 0.5), passes=Line(0.002, 0.0))},
    noise=np.ones(1),
)


def strategies(*texts: str) -> tuple[SpecStrategy, ...]:
    return tuple(parse_strategy(text, "test") for text in texts)


def world(**changes) -> World:
    return replace(
        World(
            model=QUIET, arms=strategies("eagle:1", "eagle:2", "off"), drift=Drift(fall=0.0),
            lengths=as_recorded([1]), num_requests=1,
        ), **changes
    )  # fmt: skip


def test_expected_tokens_and_seconds_by_hand():
    assert QUIET.expected(OFF, 3) == pytest.approx((3, 0.013))
    (two,) = strategies("eagle:2")
    assert QUIET.expected(two, 3) == pytest.approx((3 * 2.5, 0.010 + 9 * 0.001 + 2 * 0.002))
    assert QUIET.expected(two, 3, share=0.5)[0] == pytest.approx(3 * (1 + 0.5 + 0.5 * 0.25))
    half = replace(QUIET, drafters={"suffix": DrafterModel(covers=(0.5, 0.25), stands=(0.8,), passes=Line(0.001, 0))})
    (three,) = strategies("suffix:3")  # one look-up, 0.5 + 0.25 + 0.25 draft tokens
    tokens, seconds = half.expected(three, 4)
    assert tokens == pytest.approx(4 * (1 + 0.5 * 0.8 + 0.25 * 0.64 + 0.25 * 0.512))
    assert seconds == pytest.approx(0.010 + 8 * 0.001 + 0.001)


def test_regret_is_the_time_that_the_oracle_would_not_have_needed():
    # One step for one request. eagle:1 gets 2 tokens in 14 ms, eagle:2 2.5 in 17 ms, off 1 in 11 ms.
    for text, regret in (("eagle:2", 0.0), ("eagle:1", 0.014 - 2 * 0.017 / 2.5), ("off", 0.011 - 0.017 / 2.5)):
        found = replay(parse_policy(text, "test")[0], world(), iterations=4, seed=0)
        assert found.regret_s == pytest.approx([regret] * 4)
        assert found.num_steps == 4
    oracle = replay(None, world(num_requests=40, lengths=heavy_tailed(30, 1.0, 200)), iterations=3, seed=0)
    assert oracle.regret_s == pytest.approx([0, 0, 0], abs=1e-12)


def test_the_oracle_knows_the_batch_size_and_the_moment():
    arms = strategies("off", "eagle:1", "eagle:2", "eagle:4", "eagle:6")
    best = [str(arm) for arm in Prospects(stated_model(), arms, max_requests=64, share=1.0).best[1:]]
    assert best[0] == "eagle:4"  # by hand: 3.44 tokens in 31.5 ms; eagle:2 2.53 in 24.5 ms, eagle:6 3.94 in 38.5 ms
    assert "eagle:1" in best
    assert best[-1] == "off"  # 64 tokens in 112 ms; eagle:1 117.8 in 210 ms
    lengths = [int(text.partition(":")[2] or 0) for text in best]
    assert lengths == sorted(lengths, reverse=True)
    assert Prospects(stated_model(), arms, max_requests=64, share=0.2).best[-1] == OFF


def test_drift_falls_with_each_period_and_spares_drafters_that_do_not_learn():
    drift = Drift(fall=0.5, recovery=2.0, period=4)
    shares = [drift.share(iteration) for iteration in range(5)]
    assert shares[0] == shares[4] == 0.5
    assert shares[:4] == sorted(shares[:4])
    assert shares[2] == pytest.approx(1 - 0.5 / np.e)
    arms = strategies("eagle:2", "suffix:2")
    full, half = (Prospects(stated_model(), arms, max_requests=1, share=share) for share in (1.0, 0.5))
    assert (half.rates[arms[0]][1] < full.rates[arms[0]][1]).all()
    assert (half.rates[arms[1]][1] == full.rates[arms[1]][1]).all()


def test_a_rollout_ends_when_all_have_their_tokens_and_batches_shrink():
    sizes: list[int] = []

    class Watching:
        def choose(self, num_running: int) -> SpecStrategy:
            sizes.append(num_running)
            return OFF

        def observe(self, step: DecodeStep) -> None:
            assert step.num_tokens == step.num_verified == sizes[-1]

    replay(Watching(), world(lengths=as_recorded([2, 5, 9]), num_requests=50), iterations=1, seed=1)
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], len(sizes), len(set(sizes))) == (50, 9, 3)


def test_drafts_stand_as_often_as_the_model_says():
    rng = np.random.default_rng(0)
    arms = strategies("eagle:4", "suffix:8")
    prospects = Prospects(stated_model(), arms, max_requests=32, share=1.0)
    for arm in arms:
        steps = [prospects.play(arm, 32, 1.0, rng)[0] for _ in range(1000)]
        tokens, seconds = prospects.model.expected(arm, 32)
        noise = prospects.model.noise.mean()
        assert np.mean([step.num_tokens for step in steps]) == pytest.approx(tokens, rel=0.01)
        assert np.mean([step.draft_s + noise * step.verify_s for step in steps]) == pytest.approx(seconds, rel=0.01)
    assert at_least(np.array([0, 2, 2, 3]), 4) == (3, 3, 1, 0)


def recorded(seed: int = 0) -> RecordedRollout:
    """Steps of the stated model under three arms at all batch sizes."""
    rng = np.random.default_rng(seed)
    arms = strategies("eagle:4", "suffix:8", "off")
    model = stated_model()
    prospects = Prospects(model, arms, max_requests=32, share=1.0)
    steps = [
        prospects.play(arm, size, float(noise), rng)[0]
        for size in range(1, 33) for arm in arms for noise in rng.choice(model.noise, 20)
    ]  # fmt: skip
    return RecordedRollout(policy="beg-mab@1=eagle:4|suffix:8", steps=tuple(steps), response_tokens=(3, 700))


def test_a_recording_is_written_and_read(tmp_path):
    path = tmp_path / "recording.jsonl"
    write_recording(path, [recorded(0), recorded(1)])
    assert read_recording(path, "--recording") == [recorded(0), recorded(1)]
    for text in ('{"policy": "off"}', "no JSON", path.read_text().splitlines()[0].replace("eagle:4", "medusa:4")):
        path.write_text(text)
        with pytest.raises(ValueError, match="--recording .* line 1 is no recorded rollout"):
            read_recording(path, "--recording")
    with pytest.raises(ValueError, match="--recording must be a file"):
        read_recording(tmp_path / "none", "--recording")


def test_the_fit_finds_the_model_that_made_the_recording():
    model, found = stated_model(), fit_model([recorded()])
    assert set(found.drafters) == {"eagle", "suffix"}
    for size in (1, 8, 30, 100):
        assert found.steps.seconds(size) == pytest.approx(model.steps.seconds(size), rel=0.1)
    assert found.noise.mean() == pytest.approx(model.noise.mean(), rel=0.05)
    eagle, suffix = found.drafters["eagle"], found.drafters["suffix"]
    assert eagle.stands == pytest.approx((0.84, 0.82, 0.76, 0.74), abs=0.02)
    assert eagle.covers == (1, 1, 1, 1)
    assert eagle.passes.seconds(7) == pytest.approx(0.002)
    assert suffix.covers == pytest.approx((0.4,) * 8, abs=0.02)
    assert suffix.stands[:3] == pytest.approx((0.75,) * 3, abs=0.03)


def test_a_fit_takes_step_times_alone_of_mixed_drafters():
    (adaptive,) = strategies("adaptive:4")
    step = DecodeStep(strategy=adaptive, num_running=2, drafted=(2, 1), accepted=(1, 1), draft_s=0.1, verify_s=0.03)
    found = fit_model([RecordedRollout(policy="adaptive:4", steps=(step,), response_tokens=())])
    assert found.drafters == {}
    assert found.steps.seconds(5) == 0.03
    with pytest.raises(ValueError, match="no step that decoded"):
        fit_model([])


def test_the_cost_model_learns_to_lose_little():
    arms = strategies("off", "eagle:1", "eagle:2", "eagle:4", "eagle:6", "suffix:8")
    drifting = World(
        model=stated_model(), arms=arms, drift=Drift(), lengths=heavy_tailed(60, 1.0, 400), num_requests=16
    )  # fmt: skip
    policy, _ = parse_policy("cost-model@eagle:1|eagle:2|eagle:4|eagle:6|suffix:8", "test")
    found = replay(policy, drifting, iterations=20, seed=2)
    assert found.regret_s[5:].sum() < 0.04 * found.seconds[5:].sum()
    again = replay(parse_policy("cost-model@eagle:1|eagle:2|eagle:4|eagle:6|suffix:8", "test")[0], drifting,
                   iterations=20, seed=2)  # fmt: skip
    assert again.regret_s.tolist() == found.regret_s.tolist()


def test_the_command_writes_table_numbers_and_picture(tmp_path, capsys):
    recording = tmp_path / "recording.jsonl"
    write_recording(recording, [replace(recorded(), response_tokens=(1, 20, 50))])
    policies = ["eagle:4", "beg-mab@1=eagle:4|suffix:8", "cost-model@eagle:4|suffix:8"]
    common = ["--policies", *policies, "--iterations", "3", "--seeds", "2", "--requests", "2", "5"]
    assert main([*common, "--recording", str(recording), "--out", str(tmp_path / "fitted")]) == 0
    result = json.loads((tmp_path / "fitted.json").read_text())
    rows = {(row["num_requests"], row["policy"]): row for row in result["rows"]}
    assert set(rows) == {(size, policy) for size in (2, 5) for policy in ("off", *policies, "oracle")}
    assert rows[5, "off"]["speed_vs_off"] == rows[5, "oracle"]["speed_vs_oracle"] == 1
    assert rows[5, "oracle"]["regret_s"] == 0 < rows[5, "off"]["regret_s"]
    assert rows[5, "eagle:4"]["curve"]["iterations"] == [1, 2, 3]
    assert len((tmp_path / "fitted.md").read_text().splitlines()) == 2 + len(rows)
    assert (tmp_path / "fitted.png").stat().st_size > 5000

    lengths = tmp_path / "lengths.json"
    lengths.write_text("[5, 6]")
    assert main([*common, "--lengths", str(lengths), "--out", str(tmp_path / "stated")]) == 0
    lengths.write_text("{}")
    capsys.readouterr()
    for flags, message in (
        (["--lengths", str(lengths)], "--lengths must be a file with a JSON list"),
        (["--policies", "eagle2:4"], "--policies must draft with"),
        (["--policies", "medusa"], "--policies must be"),
        (["--recording", str(tmp_path / "none")], "--recording must be a file"),
        (["--requests", "0"], "--requests must be at least 1"),
        (["--drift-fall", "2"], "--drift-fall must be in"),
        (["--seeds", "0"], "--seeds must be at least 1"),
    ):
        assert main(["--out", str(tmp_path / "bad"), *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "bad.json").exists()
