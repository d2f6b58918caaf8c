"""The replay's counts against texts worked out by hand, and its command on a tiny file."""

import gzip
import json

import numpy as np
import pytest

from tlt.drafter.history import SuffixHistory
from tools.replay_history import (
    CUT_TOKENS,
    MIN_LOOP_TOKENS,
    SOURCES,
    Suffix,
    Tally,
    Text,
    drafter_for,
    loop_start,
    main,
    replay,
    run_source,
)

LIMITS = {"min_match": 1, "tokens_per_match": 8.0, "min_prob": 0.0}


def text(tokens, *, checkpoint=0, prompt="p") -> Text:
    token_ids = np.array(tokens, dtype=np.int32)
    return Text(checkpoint=checkpoint, prompt=prompt, token_ids=token_ids, loop_start=loop_start(token_ids))


@pytest.mark.parametrize("period", [1, 7, 40])
@pytest.mark.parametrize("cut", [0, 3, CUT_TOKENS])
def test_a_loop_starts_behind_its_first_round(period, cut):
    head, rounds = list(range(1000, 1050)), 3 + (MIN_LOOP_TOKENS + CUT_TOKENS) // period
    tokens = head + list(range(period)) * rounds + [5000] * cut
    assert loop_start(np.array(tokens)) == len(head) + period


def test_ends_that_are_no_loop():
    straight = list(range(200))
    for tokens in ([], [1], straight, straight + list(range(100, 200)), straight + [7] * 20 + list(range(300, 309))):
        assert loop_start(np.array(tokens, dtype=np.int32)) == len(tokens)


def test_a_replay_accepts_what_was_recorded_and_adds_one_token():
    drafter = Suffix([np.array([1, 2, 3, 4, 9], dtype=np.int32)], [], LIMITS)
    steps = list(replay(text([1, 2, 3, 5, 6]), drafter, 2))
    # Nothing matches at the start; behind 1, [2, 3] is drafted and stands, 5 is recorded; nothing followed 5.
    assert [(step.position, step.num_tokens, step.num_accepted_tokens, len(step.probs)) for step in steps] == [
        (0, 1, 0, 0), (1, 3, 2, 2), (4, 1, 0, 0),
    ]  # fmt: skip
    tally = Tally()
    for step in steps:
        tally.count(step)
    rates = tally.rates()
    assert (rates["tokens_per_step"], rates["drafted_per_step"], rates["acceptance_rate"]) == (5 / 3, 2 / 3, 1)
    assert sum(row["tokens"] for row in rates["calibration"]) == 2


def test_a_draft_behind_the_end_of_the_text_counts_as_drafted_only():
    drafter = Suffix([np.array([1, 2, 3, 4], dtype=np.int32)], [], LIMITS)
    *_, last = replay(text([1, 2]), drafter, 3)
    assert (last.num_tokens, last.num_accepted_tokens, len(last.probs)) == (1, 1, 3)


def test_siblings_are_known_up_to_the_own_position_only():
    own, sibling = text([1, 2, 3, 4, 5, 6]), text([1, 2, 3, 4, 5, 6], checkpoint=1)
    drafter = drafter_for("siblings", own, [own, sibling], SuffixHistory(0), LIMITS)
    assert sum(step.num_accepted_tokens for step in replay(own, drafter, 4)) == 0


def test_history_drafts_from_earlier_checkpoints_and_newest_from_the_last_one_only():
    texts = [text([1, 2, 3, 4]), text([9, 8, 7, 6], checkpoint=1), text([1, 2, 3, 4, 9, 8, 7, 6], checkpoint=2)]
    accepted = {
        source: run_source(source, texts, 4, LIMITS, history_bytes=10**6)["all"].num_accepted_tokens
        for source in ("own", "newest", "history")
    }
    assert accepted == {"own": 0, "newest": 3, "history": 6}


def test_the_command_writes_a_table_of_every_source(tmp_path, tiny_models, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "data.jsonl.gz"
    with gzip.open(data, "wt") as file:
        for step in (5, 10):
            for idx in range(2):
                file.write(json.dumps({"step": step, "idx": idx, "text": "1 + 2 = 3. " * 5}) + "\n")
    arguments = ["--data", str(data), "--hf-model", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["source"] for row in result["rows"]] == list(SOURCES)
    assert result["texts"] == 2
    best = max(result["rows"], key=lambda row: row["all"]["tokens_per_step"])
    assert best["source"] in ("newest", "history")
    assert len((tmp_path / "out.md").read_text().splitlines()) == 2 + len(SOURCES)
    for flags, message in (
        (["--data", str(tmp_path / "none")], f"--data must be a file, got '{tmp_path}/none'"),
        (["--max-draft-tokens", "8", "0"], "--max-draft-tokens must be at least 1, got 0"),
    ):
        assert main([*arguments, *flags]) == 2
        assert capsys.readouterr().err == f"replay_history.py: error: {message}\n"
