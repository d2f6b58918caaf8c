"""Time by phase and paired ratios of runs, from traces and metrics made by hand; the plan of tools/bench_e2e.py."""

import json
from types import SimpleNamespace

import pytest

from tests.unit.test_timeline import write
from tlt.report import mode_picture, pairs
from tlt.report.run import read_run
from tlt.timeline.breakdown import PHASES, breakdown
from tools import bench_e2e
from tools.training_run import TRACKER


def write_run(folder, *, rollout_s: float, iterations: int = 3, tokens: float = 100.0, accuracy: float = 0.5):
    """Two ranks; an iteration has a rollout (rank 1 ends after 2 s), 1 s of scoring of which rank 1's is in the tail,
    3 s of update, 1 s of sync, 0.5 s without a name; the last one an evaluation of 10 s and a checkpoint of 2 s."""
    for rank in (0, 1):
        spans, now = [("build_engine", -5, -1)], 0.0
        for iteration in range(1, iterations + 1):
            own_s = 2.0 if rank else rollout_s
            train = [("spot_training", now + 3, now + 4)] if rank and rollout_s > 4 else []
            spans += [("rollout", now, now + own_s), *train]
            scored = now + (4.5 if rank else rollout_s)
            spans.append(("reward", scored, scored + 1))
            updated = now + rollout_s + 1 + 3
            spans += [("update", updated - 3, updated), ("weight_sync", updated, updated + 1)]
            end = updated + 1.5
            if iteration == iterations:
                spans += [("evaluation", end, end + 10), ("save", end + 10, end + 12)]
                end += 12
            spans.append(("iteration", now, end, {"iteration": iteration}))
            now = end
        write(folder / "trace", rank, *spans)
    records = [{"iteration": 0, "eval/greedy_accuracy": 0.25}] + [
        {
            "iteration": iteration, "rl/reward": 0.25 * iteration, "rollout/response_tokens_mean": tokens,
            "rollout/entropy": 0.2, "rollout/max_prob": 0.9, "rollout/duration_s": rollout_s,
        }
        for iteration in range(1, iterations + 1)
    ]  # fmt: skip
    records[-1]["eval/greedy_accuracy"] = accuracy
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "run.json").write_text(json.dumps({"starts": [{"commit": "abc", "flags": []}]}))
    return read_run(folder)


def test_an_iterations_phases_add_up_and_evaluation_does_not_count(tmp_path):
    run = write_run(tmp_path / "run", rollout_s=8.0)
    for iteration, found in run.breakdowns().items():
        assert {phase: round(value, 6) for phase, value in found.seconds.items()} == {
            "rollout": 8, "tail": 6, "reward": 1, "publish": 0, "logprobs": 0, "update": 3, "sync": 1, "other": 0.5,
            "iteration": 13.5,
        }, iteration  # fmt: skip
        # Of rank 1's 6 s of tail it trained for 1 and scored for 1.
        assert found.idle_frac == pytest.approx(4 / 27)
        assert found.training_frac == pytest.approx(1 / 27)
    with pytest.raises(ValueError, match=r"of one iteration, got \[1, 2\]"):
        breakdown(run.timeline([1, 2]))


def test_scoring_and_tails_belong_to_their_own_rollout(tmp_path):
    folder = tmp_path / "run"
    write(
        folder / "trace", 0, ("rollout", 0, 4), ("reward", 4, 5), ("rollout", 6, 8), ("reward", 8, 8.5),
        ("iteration", 0, 10, {"iteration": 1}),
    )  # fmt: skip
    write(
        folder / "trace", 1, ("rollout", 0, 1), ("reward", 1, 2), ("rollout", 6, 9), ("reward", 9, 9.25),
        ("iteration", 0, 10, {"iteration": 1}),
    )  # fmt: skip
    (folder / "metrics.jsonl").write_text("")
    (folder / "run.json").write_text('{"starts": []}')
    seconds = read_run(folder).breakdowns()[1].seconds
    assert (seconds["rollout"], seconds["tail"], seconds["reward"]) == (7, 4, 1.25)


def test_phases_add_up_where_ranks_wait_for_each_other_in_turn(tmp_path):
    folder = tmp_path / "run"
    for rank, updated in ((0, 6), (1, 9)):
        write(folder / "trace", rank, ("rollout", 0, 4), ("update", 4, updated), ("weight_sync", updated, 10),
              ("iteration", 0, 10, {"iteration": 1}))  # fmt: skip
    (folder / "metrics.jsonl").write_text("")
    (folder / "run.json").write_text('{"starts": []}')
    seconds = read_run(folder).breakdowns()[1].seconds
    assert (seconds["update"], seconds["sync"], seconds["other"]) == (3.5, 2.5, 0)


def test_the_first_iteration_of_each_start_is_not_counted(tmp_path):
    run = write_run(tmp_path / "run", rollout_s=8.0)
    assert run.warm_iterations() == {2, 3}
    for rank in (0, 1):  # resumed after iteration 3, by two starts: the first was killed before it was through
        write(
            tmp_path / "run" / "trace", rank, ("build_engine", 100, 101), ("build_engine", 110, 111),
            *[
                (name, 100 + 20 * each, 110 + 20 * each, {"iteration": each}) for each in (4, 5)
                for name in ("rollout", "iteration")
            ],
        )  # fmt: skip
    assert read_run(tmp_path / "run").warm_iterations() == {2, 3, 5}


def measured(tmp_path, mode: str, seed: int, **run) -> dict:
    return {mode: write_run(tmp_path / f"{mode}{seed}", **run)}


@pytest.fixture
def found(tmp_path) -> list[pairs.MeasuredRun]:
    """Plain takes 13.5 and 15.5 s; full 10.5 s each; a third seed has plain alone."""
    runs = [
        measured(tmp_path, "plain", 1, rollout_s=8.0) | measured(tmp_path, "full", 1, rollout_s=5.0, accuracy=0.75),
        measured(tmp_path, "plain", 2, rollout_s=10.0) | measured(tmp_path, "full", 2, rollout_s=5.0, tokens=110.0),
        measured(tmp_path, "plain", 3, rollout_s=99.0),
    ]
    return [
        one
        for seed, run in enumerate(runs, start=1)
        for one in pairs.measure_seed(run, requests_per_rank=8, seed=seed)
    ]  # fmt: skip


def test_ratios_are_of_pairs_and_rows_carry_what_made_them_possible(found):
    table = {(row["mode"], row["phase"]): row for row in pairs.rows(found)}
    assert set(table) == {(mode, phase) for mode in ("plain", "full") for phase in PHASES}
    whole, rollout = table["full", "iteration"], table["full", "rollout"]
    assert whole["ratio_vs_plain"] == pytest.approx((13.5 / 10.5 + 15.5 / 10.5) / 2)
    assert (rollout["ratio_min"], rollout["ratio_vs_plain"], rollout["ratio_max"]) == pytest.approx((1.6, 1.8, 2.0))
    assert (whole["median_s"], whole["num_pairs"], whole["num_runs"]) == (pytest.approx(10.5), 2, 2)
    assert table["plain", "iteration"]["ratio_vs_plain"] == 1
    assert table["plain", "iteration"]["num_pairs"] == 3
    assert whole["ratio_vs"] == {"plain": whole["ratio_vs_plain"], "full": 1}
    assert table["plain", "iteration"]["ratio_vs"]["full"] == pytest.approx((10.5 / 13.5 + 10.5 / 15.5) / 2)
    assert table["full", "logprobs"]["ratio_vs_plain"] is None, "a phase that takes no time has no ratio"
    for row in table.values():
        assert (row["entropy_nats"], row["one_hot_ceiling"]) == pytest.approx((0.2, 0.9))
    assert whole["tokens_vs_plain"] == pytest.approx(1.05)
    assert whole["same_text_frac"] == 0.5
    assert (whole["final_accuracy_min"], whole["final_accuracy"], whole["final_accuracy_max"]) == (0.5, 0.625, 0.75)
    assert whole["acceptance_length"] == 1, "nothing was drafted in these"


def test_tables_curves_and_picture(found, tmp_path):
    import matplotlib.image
    from matplotlib.colors import to_rgb

    text = pairs.markdown_tables(pairs.rows(found))
    assert "| full | 2 | 10.50 | 1.38 (1.29 to 1.48) | 1.80 (1.60 to 2.00) | 1.00 |" in text
    assert "| 0.625 (0.500 to 0.750) | 0.200 | 0.900 |" in text
    assert "| full | 5.00 | 3.00 | 1.00 | 0.00 | 0.00 | 3.00 | 1.00 | 0.50 | 10.50 |" in text
    assert "| full | 1.38 | 1.00 |" in text
    curves = [run.curves["greedy_accuracy"] for run in found if run.mode == "full"]
    assert pairs.spread(curves) == [(0, 0.25, 0.25, 0.25), (3, 0.625, 0.5, 0.75)]
    assert pairs.spread([]) == []
    mode_picture.draw(found, tmp_path / "p.png", title="a title")
    pixels = matplotlib.image.imread(tmp_path / "p.png")[:, :, :3]
    for name in ("rollout", "tail", "update", "sync"):
        colour = to_rgb(mode_picture.PHASE_COLOURS[name])
        assert (abs(pixels - colour).max(2) < 0.01).sum() > 500, name


def args(tmp_path, *flags: str):
    return bench_e2e.arguments(["--hf-model", "m", "--out", str(tmp_path / "out"), *flags])


def test_the_order_of_modes_rotates_and_requests_become_prompts(tmp_path):
    found = args(
        tmp_path, "--modes", "plain,suffix:8,eagle:3", "--iterations", "5", "--block", "3", "--seeds", "7", "9",
        "--requests-per-rank", "8", "32", "--drafter", "h", "--", "--lr", "1", "--seed", "5",
    )  # fmt: skip
    blocks = [block for seed in found.seeds for block in bench_e2e.plan(found, seed)]
    order = [block.mode for block in blocks]
    assert order[:9] == ["plain", "suffix:8", "eagle:3", "suffix:8", "eagle:3", "plain", *order[:3]]
    assert order[12:15] == ["suffix:8", "eagle:3", "plain"]
    assert [block.last for block in blocks[:6]] == [3, 3, 3, 5, 5, 5]
    flags = bench_e2e.flags(found, blocks[-1])
    assert flags[:4] == ["--lr", "1", "--seed", "5"]
    told = dict(zip(flags[4::2], flags[5::2], strict=True))
    assert (told["--seed"], told["--train-iters"], told["--rl-prompts-per-iteration"]) == ("9", "5", "8")
    assert bench_e2e.mode_flags("full", ["h"]) == [
        "--spec-strategy", "adaptive:8", "--spec-drafter", "h", "--spot-training", "on", "--spec-hidden-states-mib",
        "256",
    ]  # fmt: skip
    assert bench_e2e.mode_flags("suffix:8", ["h"]) == ["--spec-strategy", "suffix:8"]
    assert len({block.folder(tmp_path) for block in blocks}) == 12


def test_a_stopped_benchmark_goes_on_and_refuses_other_flags(tmp_path):
    found = args(tmp_path, "--modes", "plain", "--iterations", "4", "--block", "2", "--seeds", "1")
    first, second = bench_e2e.plan(found, 1)
    folder = first.folder(bench_e2e.runs_folder(found))
    launched = []

    def launch(flags, ranks, log):
        launched.append((dict(zip(flags[::2], flags[1::2], strict=True))["--train-iters"], ranks))
        if len(launched) == 2:
            return  # a signal: pretrain_rl.py saves what it has and ends well
        (folder / f"iter_{launched[-1][0]}").mkdir()
        (folder / TRACKER).write_text(launched[-1][0])

    bench_e2e.run_block(found, first, launch)
    bench_e2e.run_block(found, first, launch)  # is done
    with pytest.raises(RuntimeError, match="was stopped before iteration 4"):
        bench_e2e.run_block(found, second, launch)
    bench_e2e.run_block(found, second, launch)
    assert launched == [("2", 2), ("4", 2), ("4", 2)]
    assert not list(folder.glob("iter_*")), "checkpoints go when the run is complete"
    bench_e2e.run_block(found, second, launch)
    assert len(launched) == 3
    with pytest.raises(ValueError, match="holds a run with other flags"):
        bench_e2e.run_block(SimpleNamespace(**vars(found) | {"flags": ["--lr", "1"]}), second, launch)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--requests-per-rank", "3"], "--requests-per-rank x --ranks must be multiples of --group-size 8, got 3 x 2"),
        (["--block", "1"], "--block must be from 2 to --iterations (6)"),
        (["--iterations", "7", "--block", "3"], "--iterations 7 leaves a block of 1"),
        (["--modes", "eagle:3"], "--modes eagle:3 needs --drafter DIR"),
        (["--modes", "suffix:8+spots"], "what follows + must be one of spot, tail, got 'spots'"),
        (["--modes", "suffix:8+spot"], "--spot-training on: --spec-drafter must be"),
        (["--modes", "suffixes:8"], "--modes"),
        (["--modes", "plain", "--", "--lrr", "1"], "--lrr"),
    ],
)
def test_bad_input_is_named_before_anything_runs(tiny_models, tmp_path, capsys, flags, message):
    def launch(*_):
        raise AssertionError("nothing may run")

    common = ["--hf-model", str(tiny_models["llama"]), "--out", str(tmp_path / "out")]
    own = flags if "--" in flags else [*flags, "--"]
    data = ["--data-train", "reasoning-gym:chain_sum", "--rollout-max-response-tokens", "60"]
    assert bench_e2e.main([*common, *own, *data], launch) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
