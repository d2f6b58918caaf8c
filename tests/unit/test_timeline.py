"""The timeline of a run from a trace made by hand, with the product's writers, and what the tool draws of it."""

import json
import math
import re

import pytest

from tlt.rollout.collector import trace_steps
from tlt.timeline import series
from tlt.timeline.page import stairs, unbroken
from tlt.timeline.phases import TAIL, timeline
from tlt.timeline.picture import COLOURS, WIDTH_PX
from tlt.timeline.records import complete_iterations, read_rank, read_trace
from tlt.trace import Trace
from tlt.types import EngineStats
from tools import plot_trace

START_S = 1_700_000_000.0
TRAINING = "tail: drafter training"


def write(folder, rank: int, *spans, steps: tuple[EngineStats, ...] = ()) -> None:
    """Spans are (name, begin, end) and attributes; seconds after START_S."""
    trace = Trace(folder, rank)
    for name, begin_s, end_s, *attributes in spans:
        trace.record(name, begin_s=START_S + begin_s, end_s=START_S + end_s, **(attributes or [{}])[0])
    for stats in steps:
        trace_steps(trace, stats)
    trace.close()


def stats(begins_s, running, *, drafts=None, accepted=None) -> EngineStats:
    """Steps of half a second."""
    nothing = [0] * len(begins_s)
    return EngineStats(
        step_begin_s=[START_S + each for each in begins_s], step_s=[0.5] * len(begins_s), running_requests=running,
        step_drafts=drafts or nothing, step_accepted=accepted or nothing,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Two ranks, two iterations, the second with a second rollout; a third was killed on rank 1."""
    folder = tmp_path / "run" / "trace"
    write(
        folder, 0,
        ("build_engine", -9, -1), ("rollout", 0, 10), ("reward", 10, 10.5), ("rollout_exchange", 10.5, 10.6),
        ("update", 11, 15), ("weight_sync", 15, 16, {"policy_version": 1}),
        ("rollout", 16, 18), ("reward", 18, 18.5), ("evaluation", 16, 19, {"iteration": 1}),
        ("save", 19, 20, {"iteration": 1}), ("iteration", 0, 20, {"iteration": 1}),
        ("rollout", 20, 22), ("rollout", 24, 30), ("old_logprobs", 30, 31), ("update", 31, 32),
        ("iteration", 20, 33, {"iteration": 2}), ("iteration", 33, 40, {"iteration": 3}),
        steps=(stats([0, 4, 8], [2, 1, 1], drafts=[0, 2, 2], accepted=[0, 3, 1]), stats([16], [1])),
    )  # fmt: skip
    write(
        folder, 1,
        ("rollout", 0, 4), ("spot_training", 5, 9, {"num_samples": 3}), ("reward", 9, 9.5),
        ("rollout_exchange", 9.5, 10.6), ("update", 11, 15), ("evaluation", 16, 19, {"iteration": 1}),
        ("iteration", 0, 19.5, {"iteration": 1}),
        ("rollout", 20, 23), ("rollout", 24, 26), ("spot_training", 26, 31), ("old_logprobs", 31, 31.5),
        ("iteration", 20, 33, {"iteration": 2}), ("iteration", 33, 34, {"iteration": 3, "error": "Interrupted"}),
        steps=(stats([20, 20.5], [1, 1]),),
    )  # fmt: skip
    return folder.parent


def of(run, *iterations: int):
    return timeline(read_trace(run / "trace"), iterations)


def bars(found, phase: str, rank: int) -> list[tuple[float, float]]:
    return [
        (bar.begin_s - START_S, bar.end_s - START_S)
        for bar in found.bars
        if (bar.phase, bar.rank) == (phase, rank)
    ]  # fmt: skip


def test_a_tail_is_the_wait_for_the_slowest_rollout_without_what_was_done_meanwhile(run):
    first = of(run, 1)
    assert bars(first, TAIL, 0) == []
    assert bars(first, TAIL, 1) == [(4, 5), (9.5, 10)]
    assert bars(first, TRAINING, 1) == [(5, 9)]
    second = of(run, 2)  # each rollout has its own; training that ends late leaves no wait
    assert bars(second, TAIL, 0) == [(22, 23)]
    assert bars(second, TAIL, 1) == []
    assert second.seconds()[TRAINING] == {0: 0, 1: 5}


def test_spans_within_a_phase_count_once(run):
    found = of(run, 1, 2)
    assert bars(found, "rollout", 0) == [(0, 10), (20, 22), (24, 30)]
    assert bars(found, "evaluation", 0) == [(16, 19)]
    assert bars(found, "reward", 0) == [(10, 10.5)]
    for rank in found.ranks:
        own = sorted((bar.begin_s, bar.end_s) for bar in found.bars if bar.rank == rank)
        assert all(end <= begin for (_, end), (begin, _) in zip(own, own[1:], strict=False))
        assert sum(by_rank[rank] for by_rank in found.seconds().values()) <= found.end_s - found.begin_s
    assert found.end_s - found.begin_s == 33


def test_iterations_count_where_all_ranks_completed_them_and_the_last_try_is_taken(run):
    assert list(complete_iterations(read_trace(run / "trace"))) == [1, 2]
    write(run / "trace", 0, ("rollout", 100, 103), ("iteration", 100, 110, {"iteration": 2}))
    write(run / "trace", 1, ("rollout", 101, 102))
    assert list(complete_iterations(read_trace(run / "trace"))) == [1], "killed before rank 1 had completed it again"
    write(run / "trace", 1, ("iteration", 101, 111, {"iteration": 2}))
    assert of(run, 2).iterations == {2: (START_S + 100, START_S + 111)}


def test_ranks_of_an_earlier_start_are_left_out(run):
    write(run / "trace", 0, ("iteration", 100, 110, {"iteration": 3}))
    assert [trace.rank for trace in read_trace(run / "trace")] == [0]


def test_series_of_engine_steps(run):
    found = of(run, 1)
    times, running = series.running_requests(found, 0)
    assert running == [0, 2, 1, 0, 1, 0, 0]
    assert [round(each - START_S, 3) for each in times] == [0, 0, 4, 8.5, 16, 16.5, 20]
    _, lengths = series.acceptance_lengths(found, 0)
    assert [each for each in lengths if not math.isnan(each)] == [2.5, 1.5]
    assert series.has_drafts(found)
    assert not series.has_drafts(of(run, 2))
    assert "drafts" not in (run / "trace" / "rank1.jsonl").read_text(), "only what is needed is written"


def test_lines_of_the_page():
    assert stairs([0, 2, 3], [5, 4, 0]) == [(0, 5), (2, 5), (2, 4), (3, 4), (3, 0), (3, 0)]
    nan = math.nan
    assert unbroken([0, 1, 2, 3, 4], [1, 2, nan, 3, nan]) == [[(0, 1), (1, 2)], [(3, 3), (3, 3)]]


def test_a_line_that_a_rank_still_writes_is_left_and_any_other_bad_one_is_named(tmp_path):
    write(tmp_path, 0, ("rollout", 0, 1))
    path = tmp_path / "rank0.jsonl"
    path.write_text(path.read_text() + '{"name": "upd')
    assert [span.name for span in read_rank(path).spans] == ["rollout"]
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=r"rank0\.jsonl, line 2: not a record"):
        read_rank(path)


def draw(monkeypatch, *arguments) -> int:
    monkeypatch.setattr("sys.argv", ["plot_trace.py", *map(str, arguments)])
    return plot_trace.main()


def test_the_tool_writes_picture_page_and_chrome_trace(run, tmp_path, monkeypatch):
    import matplotlib.image
    from matplotlib.colors import to_rgb

    assert draw(monkeypatch, run, "--out", tmp_path / "out" / "p") == 0
    pixels = matplotlib.image.imread(tmp_path / "out" / "p.png")[:, :, :3]
    assert pixels.shape[1] == WIDTH_PX
    for phase in ("rollout", TRAINING, "update", "evaluation", "checkpoint", "old logprobs"):
        assert (abs(pixels - to_rgb(COLOURS[phase])).max(2) < 0.01).sum() > 500, phase

    page = (tmp_path / "out" / "p.html").read_text()
    assert not re.search(r"https?:|//|src=|href=|url\(|@import", page), "a page that needs no network"
    assert "rank 1, tail: drafter training: 4.000 s from 5.000 s" in page
    assert page.count("<polyline") >= 3
    assert "$" not in page

    trace = json.loads((tmp_path / "out" / "p.trace.json").read_text())
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    assert {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "rank 1"}} in events
    assert {"ph": "X", "name": TRAINING, "pid": 1, "tid": 0, "ts": 5e6, "dur": 4e6} in events
    whole = {"ph": "X", "name": "iteration", "pid": 0, "tid": 1, "ts": 0, "dur": 20e6, "args": {"iteration": 1}}
    assert whole in events
    counters = [event for event in events if event["ph"] == "C" and event["name"] == "acceptance length"]
    assert [(event["ts"], event["args"]["tokens"]) for event in counters] == [(4e6, 2.5), (8e6, 1.5)]
    assert all(event["ts"] >= 0 for event in events if "ts" in event)


def test_without_engine_steps_the_metrics_give_the_acceptance_length(run, tmp_path, monkeypatch):
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"iteration": iteration, "spec/acceptance_length": 1 + iteration}) + "\n"
            for iteration in (1, 2, 3)
        )
    )
    for path in (run / "trace").iterdir():
        path.write_text("".join(line for line in path.open() if "engine_steps" not in line))
    found = plot_trace.read(run, None)
    assert series.iteration_lengths(found) == [(START_S, START_S + 10, 2), (START_S + 20, START_S + 30, 3)]
    assert draw(monkeypatch, run, "--out", tmp_path / "p", "--iterations", "2:2") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "RUN none must be the folder of a run (--save), there is none"),
        (["."], "trace holds no trace: a run writes rank<N>.jsonl there"),
        (["run", "--iterations", "2"], "--iterations must be A:B, the first and the last iteration, got '2'"),
        (["run", "--iterations", "2:1"], "--iterations must be A:B, the first and the last iteration, got '2:1'"),
        (["run", "--iterations", "2:3"], "--iterations 2:3 must lie in 1:2, the iterations that all ranks completed"),
    ],
)
def test_bad_input_is_named(run, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(run.parent)
    assert draw(monkeypatch, *arguments, "--out", "p") == 2
    error = capsys.readouterr().err
    assert error.startswith("plot_trace.py: error: ")
    assert message in error
    assert not list(run.parent.glob("p.*"))


def test_a_run_without_a_complete_iteration_is_refused(tmp_path, monkeypatch, capsys):
    write(tmp_path / "trace", 0, ("rollout", 0, 1))
    assert draw(monkeypatch, tmp_path, "--out", tmp_path / "p") == 2
    assert "has no iteration that all 1 ranks completed" in capsys.readouterr().err
