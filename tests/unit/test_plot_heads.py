"""The curve of a trained and of a frozen head, from what a run wrote."""

import json

import pytest

from tools.plot_heads import draw, read, table

ROW = {"spot/first_score": 0.5, "spot/live_score": 0.75, "spot/candidate_score": 1.25, "spot/steps": 7.0}


def test_only_trained_tails_are_drawn(tmp_path):
    rows = [{"iteration": 1, **ROW, "spot/published": 1.0}, {"iteration": 2, "spot/steps": 0.0, "spot/published": 0.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read(tmp_path)
    assert table(records).splitlines()[2:] == ["| 1 | 7 | 1.50 | 1.75 | 2.25 | yes |"]
    assert draw(records, tmp_path / "heads.png") == {"frozen": [1.5], "drafts": [1.75], "trained": [2.25]}
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_compared_nothing_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"iteration": 1, "spot/steps": 3.0}) + "\n")
    with pytest.raises(ValueError, match="--spot-compare-first on"):
        read(tmp_path)
