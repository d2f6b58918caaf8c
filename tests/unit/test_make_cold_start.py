"""Chains of thought of the cold start: right answers, seeded, of many lengths, disjoint from RL."""

import json
import re
from random import Random

import pytest

from tlt.rewards.scoring import score
from tools import make_cold_start
from tools.make_cold_start import QUICK_OPENINGS, chain_sum, examples, gcd, main

SUMS = 'reasoning-gym:chain_sum:{"min_terms": 2, "max_terms": 12, "min_digits": 1, "max_digits": 1}'
GCD = 'reasoning-gym:gcd:{"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 40}'


def test_every_step_of_a_sum_is_right_or_put_right(monkeypatch):
    monkeypatch.setattr(make_cold_start, "WRONG_STEP_PROB", 0.5)
    monkeypatch.setattr(make_cold_start, "CHECK_PROB", 0.0)
    text = chain_sum("problem: 4 + 8 - 2 - 9 + 1 = ", Random(1))
    steps = [tuple(map(int, found)) for found in re.findall(r"(-?\d+) [+-] (\d+) = (-?\d+)", text)]
    right = [(4, 8, 12), (12, 2, 10), (10, 9, 1), (1, 1, 2)]
    assert [step for step in steps if step in right] == right
    assert len(steps) > len(right), "some wrong steps came first"
    assert text.endswith("2.")


def test_gcd_takes_as_many_steps_as_its_partial_quotients(monkeypatch):
    monkeypatch.setattr(make_cold_start, "WRONG_STEP_PROB", 0.0)
    monkeypatch.setattr(make_cold_start, "CHECK_PROB", 0.0)
    question = "Find the GCD of these numbers: 10, 34."
    steps = re.findall(r"\d+ - \d+ = \d+", gcd(question, Random(0)))  # 34 = 3*10+4, 10 = 2*4+2, 4 = 2*2: 3+2+(2-1)
    assert steps == ["34 - 10 = 24", "24 - 10 = 14", "14 - 10 = 4", "10 - 4 = 6", "6 - 4 = 2", "4 - 2 = 2"]
    assert "12" in gcd("Find the GCD of these numbers: 12, 12.", Random(0))


def test_a_check_repeats_the_steps_and_keeps_the_answer(monkeypatch):
    monkeypatch.setattr(make_cold_start, "CHECK_PROB", 0.9)
    text = chain_sum("problem: 4 + 8 = ", Random(2))
    assert text.count("= 12") > 1
    assert score({"kind": "math", "gold": "12"}, text.splitlines()[-1]) == 1.0


def test_examples_are_seeded_distinct_correct_and_vary_in_length():
    records = examples([SUMS, GCD], [3, 1], num_examples=120, seed=5)
    assert records == examples([SUMS, GCD], [3, 1], num_examples=120, seed=5)
    assert records != examples([SUMS, GCD], [3, 1], num_examples=120, seed=6)
    assert len({record["prompt"] for record in records}) == 120
    assert 15 <= sum(record["task"] == "gcd" for record in records) <= 45
    lengths = sorted(len(record["response"]) for record in records)
    assert lengths[-2] > 3 * lengths[60]
    assert len({record["response"].splitlines()[0] for record in records}) >= 8, "openings vary"


def test_a_small_task_keeps_problems_for_rl():
    small = 'reasoning-gym:chain_sum:{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'
    with pytest.raises(ValueError, match="too few distinct problems: (8|9|10|11|12)"):  # about half of 200
        examples([small], [1], num_examples=150, seed=1)


def test_the_tool_writes_what_training_reads_and_names_bad_flags(tmp_path, monkeypatch, capsys):
    arguments = ["x", "--out", str(tmp_path), "--sources", SUMS, "--num-examples", "10", "--num-held-out", "3"]
    monkeypatch.setattr("sys.argv", arguments)
    assert main() == 0
    lines = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("train", "held_out")}
    assert {name: len(rows) for name, rows in lines.items()} == {"train": 10, "held_out": 3}
    assert set(json.loads(lines["train"][0])) == {"prompt", "response", "task"}
    monkeypatch.setattr("sys.argv", [*arguments, "--weights", "1", "2"])
    assert main() == 2
    assert "--weights" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments[:4], "reasoning-gym:sudoku"])
    assert main() == 2
    assert "sudoku" in capsys.readouterr().err


def test_a_share_of_sums_is_answered_at_a_glance():
    question = "problem: 4 + 8 - 2 - 9 = "
    assert "\n4 + 8 - 2 - 9 = 1.\n" in chain_sum(question, Random(1), quick_frac=1.0)
    assert "4 + 8 - 2 - 9 = 1" not in chain_sum(question, Random(1))
    assert gcd("numbers: 10, 34.", Random(1), quick_frac=1.0) == gcd("numbers: 10, 34.", Random(1))
    records = examples([SUMS], [1], num_examples=200, seed=5, quick_frac=0.65)
    quick = [record for record in records if any(record["response"].startswith(o) for o in QUICK_OPENINGS)]
    assert 110 <= len(quick) <= 150
    assert len({record["response"].splitlines()[0] for record in quick}) == len(QUICK_OPENINGS)
