"""The soak's figures: slopes of known series, faults that pretrain_rl.py understands, a report with all of it."""

import json
import math
import random

import numpy as np
import pytest

from tlt.faults import parse_faults
from tools import soak
from tools.soak import SERIES, Soak, Start, draw, draw_faults, read_series, report, slope
from tools.training_run import TRACKER

STARTS = [
    Start(begin_iteration=0, end_iteration=60, faults=["sigkill@save/61/0", "slow@reward/3/1"], returncode=1),
    Start(begin_iteration=60, end_iteration=100, faults=["exception@drafter_step/70/1"]),
]


@pytest.mark.parametrize("true_slope", [0.0, 0.5, -2.0])
def test_one_slope_is_found_under_the_levels_of_all_starts(true_slope):
    generator = np.random.default_rng(0)
    values = {
        iteration: 900 + 300 * (iteration > 60) + true_slope / 100 * iteration + generator.normal(0, 0.05)
        + 1000 * ((iteration - 1) % 60 < 5)  # warm-up of each start
        for iteration in range(1, 101)
    }  # fmt: skip
    value, error, num_points = slope(values, STARTS, warm_up=6)
    assert num_points == 54 + 34
    assert abs(value - true_slope) < 4 * error
    assert 0 < error < 0.2


def test_starts_that_are_all_warm_up_have_no_slope():
    value, error, num_points = slope({iteration: 1.0 for iteration in range(1, 101)}, STARTS, warm_up=60)
    assert math.isnan(value)
    assert math.isnan(error)
    assert num_points == 0


def test_the_error_covers_noise_whose_neighbours_are_alike():
    generator = np.random.default_rng(1)
    num_covered = num_covered_if_independent = 0
    for _ in range(100):
        noise = np.zeros(101)
        for index in range(1, 101):
            noise[index] = 0.8 * noise[index - 1] + generator.normal()
        value, error, num_points = slope(dict(enumerate(noise)), STARTS, warm_up=0)
        num_covered += abs(value) < 2.5 * error
        spread = sum(((end - begin) ** 3) / 12 for begin, end in ((0, 60), (60, 100)))
        num_covered_if_independent += abs(value) < 2.5 * 100 * noise.std() / spread**0.5
    assert num_covered >= 80
    assert num_covered_if_independent < num_covered


def test_drawn_faults_are_flags():
    generator = random.Random(3)
    for begin in range(0, 200, 7):
        faults = draw_faults(generator, begin=begin, end=200, every=40, num_ranks=2)
        parsed = parse_faults(faults, world_size=2)
        assert all(begin < fault.iteration <= 200 for fault in parsed)
        fatal = [fault for fault in parsed if fault.kind != "slow" and fault.point != "drafter_step"]
        assert len(fatal) == (parsed[0] in fatal) <= 1


def test_the_report_has_every_series_and_start(tmp_path):
    (tmp_path / "trace").mkdir()
    lines = [
        {"iteration": iteration, **{name: 5.0 + 0.01 * (iteration % 7) for name in SERIES if name != "iteration_s"}}
        for iteration in range(101)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spans = [{"name": "iteration", "iteration": n, "begin_s": n, "end_s": n + 0.5 + n % 3} for n in range(1, 101)]
    failed = {"name": "iteration", "iteration": 61, "begin_s": 0, "end_s": 999, "error": "OSError"}
    (tmp_path / "trace" / "rank0.jsonl").write_text("".join(json.dumps(s) + "\n" for s in [failed, *spans]) + '{"na')
    series = read_series(tmp_path)
    assert all(len(values) == 100 for values in series.values())
    result = Soak(starts=STARTS)
    text = report(series, result, warm_up=10)
    assert text.count("\n| ") >= len(SERIES) + len(STARTS)
    assert "| 0 | 60 | sigkill@save/61/0 | 1 | 1 |" in text
    assert "| 60 | 100 | end | 1 | 0 |" in text
    draw(series, result, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--iterations", "0"], "--iterations must be at least 14 (--warm-up and 2 to see a slope), got 0"),
        (["--every", "0"], "--every must be at least 1, got 0"),
        (["--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--iterations", "20"], "--save must be a run with fewer than --iterations 20, got "),
    ],
)
def test_what_cannot_be_soaked_is_refused_in_one_line(tmp_path, capsys, flags, message):
    (tmp_path / TRACKER).write_text("20")
    with pytest.raises(SystemExit) as refused:
        soak.main([*flags, "--out", str(tmp_path / "soak"), "--", "--save", str(tmp_path)])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_flags_with_which_no_start_makes_an_iteration_end_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(soak, "run_command", lambda num_ranks: ["sh", "-c", "echo wrong flag; exit 2", "sh"])
    save = tmp_path / "new" / "run"
    assert soak.main(["--out", str(tmp_path / "soak"), "--", "--save", str(save)]) == 1
    log = tmp_path / "new" / "run.log"
    expected = f"soak.py: error: a start ended with status 2 and completed no iteration: see {log}\n"
    assert capsys.readouterr().err == expected
    assert log.read_text() == "wrong flag\n"
