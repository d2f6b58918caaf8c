"""The report on runs: its numbers from traces and metrics made by hand, and the page in a real headless browser."""

import io
import json
from html.parser import HTMLParser

import pytest

from tests.browser import Browser, find_browser
from tests.unit.test_e2e_pairs import write_run
from tests.unit.test_timeline import stats, write
from tlt.report.chart import Line, line_chart, shade_grid, ticks
from tlt.report.differences import differing
from tlt.report.run import read_run
from tlt.report.speculation import draft_lengths, drafted_shares, drafter_row, drafters, position_rates, spot_row
from tlt.timeline.picture import COLOURS
from tools import report

VOID = {"meta", "input", "br", "rect", "line", "circle", "polyline"}


@pytest.fixture
def runs(tmp_path):
    """Folders of a plain run and of one that drafted, in which nothing but that and the seed differs."""
    for name, seed in (("plain", 1), ("<full>", 2)):
        write_run(tmp_path / name, rollout_s=8.0 if name == "plain" else 5.0)
        start = {
            "commit": "abc", "world_size": 2, "packages": {"vllm": "1"}, "patches": ["one", "two"],
            "config": {
                "training": {"seed": seed, "save": name, "lr": 1e-3},
                "spec": {"strategy": "off" if name == "plain" else "adaptive:8", "drafter": ["<head>"]},
                "spot": {"training": "off"},
            },
        }  # fmt: skip
        (tmp_path / name / "run.json").write_text(json.dumps({"starts": [start]}))
    full = tmp_path / "<full>"
    # Iteration 1 begins at 0, iteration 2 at 10.5, iteration 3 at 21; the evaluation follows at 31.5.
    write(full / "trace", 0, steps=(
        stats([0, 0.5, 1.0], [8, 8, 3], drafts=[0, 4, 3], accepted=[0, 8, 9]),
        stats([11], [3], drafts=[1], accepted=[2]),
        stats([32], [64], drafts=[64], accepted=[64]),
    ))  # fmt: skip
    records = [json.loads(line) for line in (full / "metrics.jsonl").read_text().splitlines()]
    for index, record in enumerate(records[1:]):
        record |= {
            "spec/eagle/num_drafts": 10.0, "spec/eagle/num_draft_tokens": 40.0 + 20 * index,
            "spec/eagle/num_accepted_tokens": 20.0 + 10 * index, "spec/eagle/draft_s": 0.5,
            "spec/eagle/acceptance_length": 3.0 + index, "spec/eagle/acceptance_ceiling": 0.9,
            "spec/eagle/acceptance_rate_1": 0.9, "spec/eagle/acceptance_rate_2": 0.7,
            "spec/eagle/share_of_drafts": 0.8, "spec/acceptance_length": 3.0 + index,
            "spec/suffix/num_drafts": 2.0, "spec/suffix/share_of_drafts": 0.2,
            "spec/speculative_frac_of_time": 0.5, "spec/drafter_version": float(index), "spot/steps": 3.0,
            "spot/train_s": 1.5, "spot/published": float(index), "spot/gain": None,
        }  # fmt: skip
    records[3].pop("spec/suffix/num_drafts")
    (full / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return [tmp_path / "plain", full]


def test_drafters_and_decisions_of_a_run(runs):
    plain, full = map(read_run, runs)
    assert drafters(plain) == []
    assert spot_row(plain) == {}
    assert drafted_shares(plain) == {}
    assert drafters(full) == ["eagle", "suffix"]
    row = drafter_row(full, "eagle")
    assert (row["num_drafts"], row["num_draft_tokens"], row["num_accepted_tokens"], row["draft_s"]) == (
        30,
        180,
        90,
        1.5,
    )
    assert (row["acceptance_length"], row["first_length"], row["last_length"]) == (4, 3, 5)
    assert (row["acceptance_rate"], row["acceptance_ceiling"]) == (0.5, pytest.approx(0.9))
    assert drafter_row(full, "suffix")["acceptance_ceiling"] is None
    assert position_rates(full, "eagle") == pytest.approx([0.9, 0.7])
    assert draft_lengths(full)["eagle"] == [(1, 4), (2, 6), (3, 8)]
    assert spot_row(full) == {"steps": 9, "train_s": 4.5, "published": 3}
    # Two steps of 8 requests, 4 of 16 drafted for; evaluation is left out.
    assert drafted_shares(full) == {"3-4": {1: 1.0, 2: pytest.approx(1 / 3)}, "5-8": {1: 0.25}}


def test_differences_leave_out_what_is_equal_and_folders(runs):
    found = differing([read_run(folder) for folder in runs])
    assert found == {"training seed": ["1", "2"], "spec strategy": ["off", "adaptive:8"]}
    alone = differing([read_run(runs[0])])
    assert alone["spec drafter"] == ["<head>"]
    assert alone["package vllm"] == ["1"]
    assert alone["patches"] == ["one two"]
    assert "training save" not in alone


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3, 3, [2.6, 2.8, 3.0, 3.2, 3.4]),
        (0, 0, None),
        (100, 100.00000001, None),
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (-0.3, 0.4, None),
    ],
)
def test_ticks_are_round_and_cover_the_values(least, most, expected):
    found = ticks(least, most)
    assert found[0] <= least
    assert found[-1] >= most
    assert 2 <= len(found) <= 8
    assert len({f"{each:.6g}" for each in found}) == len(found)
    assert expected is None or found == pytest.approx(expected)


def test_charts_say_what_they_show():
    line = Line(name="a & b", colour="#123456", points=[(0, 0.0), (1, 1.0)])
    drawn = line_chart([line], label="reward")
    assert 'points="52.0,190.0 410.0,10.0"' in drawn, "from the lower left to the upper right corner"
    assert "<title>a &amp; b, iteration 1: 1</title>" in drawn
    assert line_chart([Line(name="x", colour="#000", points=[])], label="nothing") == ""
    grid = shade_grid({"1": {3: 0.5}, "2": {4: 1.0}}, label="shares")
    assert grid.count("<rect") == 2
    assert 'fill-opacity="0.500"' in grid
    assert shade_grid({}, label="nothing") == ""


class Structure(HTMLParser):
    """Raises where a tag is closed that is not the last one opened; keeps texts by tag."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag, attributes):
        assert not {"src", "href"} & {name for name, _ in attributes}, f"<{tag}> asks for something else"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.fixture
def page(runs, tmp_path):
    path = tmp_path / "out" / "report.html"
    assert report.main([*map(str, runs), "--out", str(path)]) == 0
    return path


def test_the_page_is_whole_and_asks_for_nothing(page):
    structure = Structure()
    text = page.read_text()
    structure.feed(text)
    assert structure.open == []
    assert "$" not in text
    assert "url(" not in text
    assert "@import" not in text
    cells = structure.texts["td"]
    for expected in ("adaptive:8", "<full>", "eagle", "suffix", "0.90 0.70", "training seed"):
        assert expected in cells, expected
    assert {"Runs", "Drafters", "Curves", "What each rank did"} <= set(structure.texts["h2"])
    assert "reward" in structure.texts["figcaption"]
    assert "held-out accuracy, mean of samples" not in structure.texts["figcaption"], "no run has them"
    assert text.count("<section>") == 2


def test_a_person_sees_the_page_in_a_browser(page, tmp_path):
    import matplotlib.image
    from matplotlib.colors import to_rgb

    program = find_browser()
    if program is None:
        pytest.skip("no browser: install Debian's chromium-headless-shell, or name one in CHROMIUM")
    broken = tmp_path / "broken.html"
    broken.write_text('<!DOCTYPE html><script>console.error("x"); none()</script><img src="none.png">')
    with Browser(program, tmp_path / "profile") as browser:
        browser.open(broken)
        assert len(browser.complaints()) >= 3, "the browser tells what is wrong"
        browser.open(page)
        pixels = matplotlib.image.imread(io.BytesIO(browser.screenshot()), format="png")[:, :, :3]
        (tmp_path / "report.png").write_bytes(browser.screenshot())
        widths = [
            browser.evaluate("document.querySelector('.time').getBoundingClientRect().width"),
            browser.evaluate(
                "(slider => {slider.value = 2; slider.dispatchEvent(new Event('input'));"
                " return document.querySelector('.time').getBoundingClientRect().width})"
                "(document.querySelector('input[type=range]'))"
            ),
        ]
        assert widths[1] == pytest.approx(4 * widths[0], rel=0.03), "the slider zooms, less a scroll bar"
        assert browser.evaluate("document.querySelectorAll('figure svg').length") >= 10
        # Nothing is drawn beside its chart, and every text has a size.
        assert browser.evaluate("[...document.querySelectorAll('svg text')].every(t => t.getBBox().width > 0)")
        assert browser.complaints() == []
        assert browser.requests() == [page.resolve().as_uri()]
    assert (pixels.min(2) < 0.9).mean() > 0.02, "not blank"
    for phase in ("rollout", "update", "weight sync"):
        assert (abs(pixels - to_rgb(COLOURS[phase])).max(2) < 0.02).sum() > 2000, phase


def test_runs_are_named_by_what_tells_them_apart_and_bad_input_is_named(runs, tmp_path, capsys):
    folders = [tmp_path / "a" / "seed_1" / "x", tmp_path / "b" / "seed_1" / "x"]
    assert report.names_of(folders) == ["a/seed_1/x", "b/seed_1/x"]
    assert report.names_of(runs) == ["plain", "<full>"]
    out = ["--out", str(tmp_path / "o.html")]
    for arguments, message in (
        ([str(runs[0]), str(runs[0])], "the same folder is given twice"),
        ([str(tmp_path / "none")], "must be the folder of a run (--save), there is none"),
        ([str(tmp_path)], "metrics.jsonl is missing"),
        ([str(runs[0]), "--last-iterations", "0"], "--last-iterations must be at least 1, got 0"),
    ):
        assert report.main([*arguments, *out]) == 2
        assert message in capsys.readouterr().err
    (runs[0] / "metrics.jsonl").write_text("{}\n")
    assert report.main([str(runs[0]), *out]) == 2
    assert "metrics.jsonl, line 1: not metrics" in capsys.readouterr().err
    assert not (tmp_path / "o.html").exists()
