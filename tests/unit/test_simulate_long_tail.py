"""The simulator's command, and its comparison with a run whose times are known."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tlt.simulation.costs import learned_costs
from tlt.simulation.lengths import named_lengths
from tlt.simulation.measured import decode_steps, num_reading, read_run
from tlt.simulation.sweep import Sweep, points
from tlt.simulation.validation import measured_table, validate
from tlt.spec.recording import RecordedRollout, write_recording
from tlt.spec.replay import Prospects
from tlt.spec.step_model import stated_model
from tlt.spec.strategy import parse_strategy
from tlt.timeline.records import read_trace
from tlt.trace import Trace
from tools.simulate_long_tail import main

PROMPT_S, OTHER_S = 0.5, 2.0


def step_s(running: int) -> float:
    return 0.010 + 0.002 * running


def write_run(folder: Path, lengths: dict[int, list[list[int]]], *, spec: str = "off", moves: str = "off") -> Path:
    """A run of two replicas whose step times are `step_s`: `lengths` by iteration and replica. Its rest takes 2 s and
    10 ms a token."""
    rollout = {"tensor_parallel_size": 1, "consolidate_tail": moves, "max_num_seqs": 64, "max_response_tokens": 500}
    start = {"config": {"rollout": rollout, "spec": {"strategy": spec}}}
    (folder / "rollouts").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"starts": [start]}))
    traces = [Trace(folder / "trace", rank) for rank in range(2)]
    metrics, clock = [], 1000.0
    for number, both in lengths.items():
        ends, records = [], []
        for replica, own in enumerate(both):
            now, begins, running = clock + PROMPT_S, [clock], [len(own)]
            for done in range(2, max(own) + 1):  # the prompts' step gave one token each
                begins.append(now)
                now += step_s(sum(length >= done for length in own))
                running.append(sum(length > done for length in own))
            traces[replica].record("rollout", begin_s=clock, end_s=now)
            traces[replica].record(
                "engine_steps",
                begin_s=clock,
                end_s=now,
                begin_ms=[1e3 * (each - clock) for each in begins],
                running=running,
            )
            ends.append(now)
            records += [
                {"prompt_id": f"{number}-{replica}", "question": f"q{replica}", "sample": sample, "replica": replica,
                 "prompt_token_ids": [1, 2], "token_ids": [0] * length}
                for sample, length in enumerate(own)
            ]  # fmt: skip
        end_s = max(ends) + OTHER_S + 0.01 * sum(map(sum, both))
        for trace in traces:
            trace.record("iteration", begin_s=clock, end_s=end_s, iteration=number)
        metrics.append({"iteration": number, "rollout/duration_s": max(ends) - clock, "rl/sampling_rounds": 1.0})
        path = folder / "rollouts" / f"train_{number:07d}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        clock = end_s
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in metrics))
    return folder


LENGTHS = {1: [[5, 9, 30], [4, 12, 80]], 2: [[7, 8, 20], [3, 60, 61]], 3: [[50, 51, 52], [2, 3, 9]]}


def test_a_run_with_even_steps_is_predicted_exactly(tmp_path):
    run = read_run(write_run(tmp_path / "run", LENGTHS), "--validate")
    assert [one.num_tokens for one in run.iterations] == [140, 159, 167]
    first = run.iterations[0].steps[0]
    assert first.running == (3,) * 4 + (2,) * 4 + (1,) * 21
    assert first.seconds == pytest.approx([step_s(running) for running in first.running])
    assert (first.begin_s, first.end_s) == pytest.approx((PROMPT_S, 0.0))
    found = validate(run, "--validate")
    for one in found.comparisons:
        assert one.predicted_rollout_s == pytest.approx(one.rollout_s)
        assert one.own_rollout_s == pytest.approx(one.rollout_s)
    assert (found.rollout_error, found.total_error) == pytest.approx((0.0, 0.0), abs=1e-9)
    assert abs(found.iteration_error) < 0.05  # the rest of two iterations is their mean, of more a line
    more = LENGTHS | {4: [[10, 10, 10], [20, 20, 20]]}
    found = validate(read_run(write_run(tmp_path / "more", more), "--validate"), "--validate")
    assert found.iteration_error == pytest.approx(0.0, abs=1e-9)


def test_what_was_slower_than_the_others_shows_as_an_error(tmp_path):
    run = read_run(write_run(tmp_path / "run", LENGTHS), "--validate")
    slow = replace(run.iterations[1], rollout_s=1.25 * run.iterations[1].rollout_s)
    found = validate(replace(run, iterations=(run.iterations[0], slow, run.iterations[2])), "--validate")
    assert found.comparisons[1].rollout_error == pytest.approx(-0.2)
    assert found.total_error < -0.05
    assert found.comparisons[1].own_error == pytest.approx(-0.2)  # the steps alone say nothing of the rest


def test_steps_that_read_prompts_are_told_apart():
    assert num_reading([3, 3, 2, 1, 0]) == 1
    assert num_reading([2, 4, 6, 6, 5, 0]) == 3
    assert num_reading([6, 5, 4, 7, 7]) == 1  # responses taken over


def test_waiting_for_responses_to_take_over_is_no_steps_time(tmp_path):
    traces = [Trace(tmp_path, rank) for rank in range(1)]
    traces[0].record("rollout", begin_s=10.0, end_s=16.0)
    traces[0].record("iteration", begin_s=10.0, end_s=17.0, iteration=1)
    # Prompts; two steps of one request; 3 s without any; one that reads an adopted one's text; two of that one.
    traces[0].record(
        "engine_steps", begin_s=10.0, end_s=15.5, begin_ms=[0, 1000, 1100, 4200, 5000, 5200],
        running=[1, 1, 0, 1, 1, 0], drafts=[0, 1, 1, 0, 1, 1], accepted=[0, 2, 1, 0, 3, 3],
    )  # fmt: skip
    (trace,) = read_trace(tmp_path)
    steps = decode_steps(trace, trace.spans[1], begin_s=9.5)
    assert steps.running == (1, 0, 1, 1)
    assert steps.seconds == pytest.approx((0.1, 0.8, 0.2, 0.3))
    assert steps.tokens == (3, 0, 4, 4)
    assert (steps.begin_s, steps.end_s) == pytest.approx((1.5, 0.5))


def test_measured_steps_are_means_by_batch_size(tmp_path):
    run = read_run(write_run(tmp_path / "run", LENGTHS), "--validate")
    table = measured_table([each for one in run.iterations for each in one.steps], max_running=5)
    assert table.seconds[1:] == pytest.approx([step_s(1), step_s(2), step_s(3), step_s(3), step_s(3)])
    assert table.tokens == [1.0] * 6


def test_iterations_that_cannot_be_compared_are_named(tmp_path):
    folder = write_run(tmp_path / "run", LENGTHS, moves="on")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[0]["rl/sampling_rounds"] = 2.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "rollouts" / "train_0000002.jsonl").unlink()
    run = read_run(folder, "--validate")
    assert set(run.left_out) == {1, 2}
    assert run.consolidates
    with pytest.raises(ValueError, match="--validate: to predict .* takes 2"):
        validate(run, "--validate")


def sweep(**changes) -> Sweep:
    lengths = named_lengths("lognormal:50:1", "--lengths")
    return replace(Sweep(tp_size=1, ranks=[2], requests=[8], lengths=lengths), **changes)


def test_points_are_combinations_without_what_cannot_matter():
    found = points(
        sweep(ranks=[2, 4], strategies=["eagle:4"], max_running_requests=[0, 8], training=[False, True],
              switch_s=[1.0, 2.0], consolidation=["off", "on"])
    )  # fmt: skip
    # For each number of ranks and each way to move: plain once, eagle:4 with two limits, idle or with two thresholds.
    assert len(found) == len(set(found)) == 2 * 2 * (1 + 2 * 3)
    learning = points(sweep(strategies=["cost-model@eagle:4"], max_running_requests=[0, 8]))
    assert [one.max_running_requests for one in learning] == [0, 0]
    assert [one.requests for one in points(sweep(ranks=[2, 4], global_requests=64))] == [32, 16]


def test_costs_of_a_checkpoint_are_what_it_learned():
    from tlt.drafter.router import DraftRouter
    from tlt.spec.cost_model import CostModel

    prices, router = CostModel(), DraftRouter(["eagle"], max_draft_tokens=2)
    router.begin({"g": "s"})
    prices.observe_step(4, 0.02)
    prices.observe_pass("eagle", 4, 0.003)
    for stood in (2, 1, 0, 1):
        router.verified("eagle", request="r", group="g", is_random=True, match_length=0,
                        confidences=np.array([0.6, 0.6]), num_stood=stood)  # fmt: skip
    costs = learned_costs(json.loads(json.dumps({"costs": prices.state_dict(), "router": router.state_dict()})), "run")
    assert costs.origin == "measured"
    assert costs.model.steps.seconds(4) == 0.02
    eagle = costs.model.drafters["eagle"]
    assert eagle.passes.seconds(4) == 0.003
    assert eagle.stands == pytest.approx((3 / 4, 1 / 3), abs=0.01)
    assert set(costs.model.drafters) == {"eagle"}


SMALL = ["--lengths", "lognormal:60:1", "--max-response-tokens", "300", "--requests", "8", "--iterations", "2"]


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_the_command_sweeps_and_writes_table_numbers_and_picture(tmp_path, capsys):
    out = tmp_path / "sweep"
    flags = ["--ranks", "2", "8", "--strategies", "adaptive:2", "--consolidation", "on", "off"]
    assert main(["--out", str(out), *SMALL, *flags, "--training", "on", "--json", str(tmp_path / "rows.json")]) == 0
    rows = rows_of(tmp_path / "rows.json")
    assert len(rows) == 2 * 2 * 2
    plain = [row for row in rows if row["strategy"] == "off" and row["consolidation"] == "off"]
    assert [row["rollout_ratio"] for row in plain] == [1.0, 1.0]
    assert all(row["iteration_ratio"] <= max(row["rollout_ratio"], 1.0) + 1e-9 for row in rows)
    assert {row["ranks"]: row["tokens"] for row in plain}[8] > 2 * {row["ranks"]: row["tokens"] for row in plain}[2]
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + len(rows)
    assert "strategy" in table[0]
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    assert (tmp_path / "sweep.md").read_text().splitlines() == table


def test_the_command_takes_measured_costs(tmp_path):
    prospects = Prospects(stated_model(), [parse_strategy("eagle:4", "")], max_requests=8, share=1.0)
    rng = np.random.default_rng(0)
    arms = (parse_strategy("eagle:4", ""), parse_strategy("off", ""))
    steps = tuple(prospects.play(arm, size, 1.0, rng)[0] for size in range(1, 9) for arm in arms for _ in range(20))
    recording = tmp_path / "recording.jsonl"
    write_recording(recording, [RecordedRollout(policy="x", steps=steps, response_tokens=(3,))])
    out = tmp_path / "measured"
    common = ["--out", str(out), *SMALL, "--ranks", "2", "--recording", str(recording), "--rollout-share", "0.5"]
    assert main([*common, "--strategies", "eagle:4"]) == 0
    about = json.loads(Path(f"{out}.json").read_text())["about"]
    assert about["costs_are"] == "measured"
    plain, eagle = rows_of(Path(f"{out}.json"))
    assert plain["plain_rollout_share"] == pytest.approx(0.5)
    assert eagle["tokens_per_step"] == pytest.approx(3.4, abs=0.3)
    assert eagle["iteration_ratio"] == pytest.approx(2 / (1 / eagle["rollout_ratio"] + 1))


def test_the_command_reproduces_the_papers_table_in_shape(tmp_path):
    out = tmp_path / "paper"
    assert main(["--out", str(out), "--paper", "--iterations", "1", "--lengths", "lognormal:3000:1.0",
                 "--strategies", "eagle:4"]) == 0  # fmt: skip
    rows = rows_of(Path(f"{out}.json"))
    small = [row for row in rows if row["model"] == "7B"]
    assert [row["nodes"] for row in small] == [1, 2, 4, 8]
    assert [row["requests_per_replica"] for row in small] == [256, 128, 64, 32]
    simulated = [row["tlt"] for row in small]
    assert simulated == sorted(simulated)  # the smaller a replica's batch, the more of its time it may speculate
    assert all(row["tlt"] == pytest.approx(row["reported"], rel=0.2) for row in small)
    assert (tmp_path / "paper.png").stat().st_size > 5000


def test_the_command_compares_a_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", LENGTHS)
    assert main(["--out", str(tmp_path / "v"), "--validate", str(run)]) == 0
    assert "rollout 0.0 %" in capsys.readouterr().out
    assert [row["iteration"] for row in rows_of(tmp_path / "v.json")] == [1, 2, 3]
    assert (tmp_path / "v.png").stat().st_size > 5000


def test_the_command_names_the_flag_that_is_wrong(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for flags, message in (
        (["--validate", str(tmp_path / "empty")], "--validate .* has no run.json"),
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--ranks", "6", "--tp", "4"], "--ranks must be multiples of --tp 4"),
        (["--stands", "1.2"], r"--stands must be in \[0, 1\]"),
        (["--lengths", "lognormal:x:1"], "--lengths must be constant"),
        (["--strategies", "medusa:4"], "--strategies must be"),
        (["--recording", str(tmp_path / "none")], "--recording must be a file"),
        (["--checkpoint", str(tmp_path)], "--checkpoint must be a folder with speculation.json"),
        (["--rollout-share", "0"], "--rollout-share must be in"),
        (["--idle-threshold", "-1"], "--idle-threshold must be at least 0"),
    ):
        assert main(["--out", str(tmp_path / "bad"), *flags]) == 2
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "bad.json").exists()
