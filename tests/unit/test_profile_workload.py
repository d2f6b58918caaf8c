"""Profile of a workload against values worked out by hand, and against a model's own probabilities."""

import json
import math

import pytest
import torch

from tlt.workload.profile import (
    Response,
    entropy_profile,
    length_profile,
    percentile,
    profile,
    repetition_profile,
    running_requests,
    tail_profile,
)
from tools.profile_workload import find, main, read, with_model


def response(tokens, *, question="q", entropies=None, max_probs=None, **fields) -> Response:
    count = len(tokens)
    return Response(
        question=question,
        sample=fields.pop("sample", 0),
        token_ids=tuple(tokens),
        entropies=tuple(entropies or [0.1] * count),
        max_probs=tuple(max_probs or [0.9] * count),
        is_truncated=fields.pop("is_truncated", False),
        **fields,
    )


def test_percentiles_are_nearest_ranks():
    assert [percentile([3, 1, 2, 4], share) for share in (0.1, 0.25, 0.5, 0.51, 0.99, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert percentile(list(range(1, 101)), 0.99) == 99


def test_entropy_profile_of_five_tokens():
    result = entropy_profile(
        [
            response([1, 2], entropies=[0.0, 0.5], max_probs=[1.0, 0.6]),
            response([1, 2, 3], entropies=[0.009, 0.01, 1.0], max_probs=[0.9, 0.8, 0.2]),
        ]
    )
    assert result["entropy_mean"] == pytest.approx(1.519 / 5)
    assert result["entropy_below_0.01"] == pytest.approx(2 / 5)
    assert result["entropy_p80"] == 0.5
    assert result["max_prob_mean"] == pytest.approx(3.5 / 5)


def test_length_profile_of_ten_responses():
    result = length_profile([1, 2, 3, 4, 5, 6, 7, 8, 9, 50])
    assert (result["length_p10"], result["length_p50"], result["length_p90"], result["length_p99"]) == (1, 5, 9, 50)
    assert result["length_mean"] == 9.5
    assert result["length_p99_over_p50"] == 10


def test_requests_wait_for_a_place():
    # two places; 5 and 1 start, 3 follows at step 1, 2 at step 4: steps 0-1, 1-4, 4-5, 5-6
    assert running_requests([5, 1, 3, 2], 2) == [(1, 2), (3, 2), (1, 2), (1, 1)]


def test_tail_of_two_ranks():
    # rank 0, lengths 2, 4, 10: 3 run for 2 steps, 2 for 2, 1 for 6; rank 1, length 4: 1 runs for 4 steps, idle for 6
    responses = [response(range(n), replica=0) for n in (2, 4, 10)] + [response(range(4), replica=1)]
    result = tail_profile(responses, max_num_seqs=8)
    assert result["running_le_1"] == pytest.approx((6 + 4 + 6) / 20)
    assert result["running_le_2"] == pytest.approx((8 + 10) / 20)
    assert result["running_le_4"] == 1.0


def test_repetition_in_own_past_siblings_and_history():
    # own: 1 2 3 1 2 3 1 2: matches need 2 tokens, so the first known pair (1 2) comes at position 5, then 3 1, 1 2
    own = repetition_profile([response([1, 2, 3, 1, 2, 3, 1, 2])])
    assert own == {"predictable_own": 3 / 8, "predictable_siblings": 3 / 8, "predictable_history": 3 / 8}
    # siblings in step: at each position both know only what the other wrote before it; equal texts give no head start
    assert repetition_profile([response([5, 6, 7, 8]), response([5, 6, 7, 8], sample=1)])["predictable_siblings"] == 0
    # the second is two tokens behind the first: after 5 6 and 6 7 it is told 7 and 8
    shifted = repetition_profile([response([5, 6, 7, 8]), response([1, 2, 5, 6, 7, 8], sample=1)])
    assert shifted["predictable_siblings"] == pytest.approx(2 / 10)
    assert shifted["predictable_own"] == 0
    # history of the same question is known whole, that of another question is not used
    history = [response([5, 6, 7, 8], iteration=1), response([1, 2, 3, 4], question="other", iteration=1)]
    assert repetition_profile([response([5, 6, 7, 8])], history)["predictable_history"] == pytest.approx(2 / 4)
    assert repetition_profile([response([1, 2, 3, 4])], history)["predictable_history"] == 0


def test_the_longest_match_predicts():
    # at the end 8 1 gives 2; after 1 2 came 9 last, but after 8 1 2 came 3: the longer match gives 3
    tokens = [8, 1, 2, 3, 7, 1, 2, 9, 8, 1, 2, 3]
    assert repetition_profile([response(tokens)])["predictable_own"] == pytest.approx(2 / 12)


def test_profile_counts_truncation_passes_and_mixed_groups():
    responses = [
        response([1, 2], reward=1.0),
        response([1, 2], reward=0.0, sample=1, is_truncated=True),
        response([1, 2], question="r", reward=0.0),
        response([1, 2], question="r", reward=0.0, sample=1),
    ]
    result = profile(responses)
    assert (result["truncated"], result["pass_rate"], result["mixed_groups"]) == (0.25, 0.25, 0.5)
    with pytest.raises(ValueError, match="--hf-model"):
        profile([Response(question="q", sample=0, token_ids=(1,), entropies=(), max_probs=(), is_truncated=False)])
    with pytest.raises(ValueError, match="no response"):
        profile([])


@pytest.mark.megatron  # needs the tiny model only; marked for the time that importing transformers takes
def test_a_model_fills_in_the_probabilities(tiny_models):
    from transformers import AutoModelForCausalLM

    folder = tiny_models["llama"]
    (filled,) = with_model([response([7, 8], prompt_token_ids=(4, 5, 6))], str(folder), 0.5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, prefix in enumerate(([4, 5, 6], [4, 5, 6, 7])):
        with torch.no_grad():
            weights = [math.exp(value) for value in (model(torch.tensor([prefix])).logits[0, -1] / 0.5).tolist()]
        probs = [weight / sum(weights) for weight in weights]
        assert filled.entropies[index] == pytest.approx(-sum(p * math.log(p) for p in probs), rel=1e-4)
        assert filled.max_probs[index] == pytest.approx(max(probs), rel=1e-4)


def test_the_tool_reads_a_run_and_writes_table_json_and_png(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run" / "rollouts"
    folder.mkdir(parents=True)
    record = {
        "iteration": 0, "prompt_id": "p", "question": "q", "sample": 0, "replica": 0, "reward": 1.0,
        "finish_reason": "stop", "token_ids": [1, 2, 3], "entropies": [0.1, 0.2, 0.3], "max_probs": [0.9, 0.8, 0.7],
    }  # fmt: skip
    for iteration in (0, 20):
        (folder / f"eval_{iteration:07d}.jsonl").write_text(json.dumps(record | {"iteration": iteration}) + "\n")
    assert find(tmp_path / "run") == (folder / "eval_0000020.jsonl", [folder / "eval_0000000.jsonl"])
    out = tmp_path / "out" / "profile"
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "run"), "--out", str(out), "--anchors", str(tmp_path)])
    assert main() == 0
    assert "0.672" in capsys.readouterr().out, "the anchor that needs no file"
    result = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert result["entropy_mean"] == pytest.approx(0.2)
    assert result["predictable_history"] == pytest.approx(1 / 3)
    assert (tmp_path / "out" / "profile.png").stat().st_size > 1000
    assert "| pass rate | 1.000 | - |" in (tmp_path / "out" / "profile.md").read_text()


def test_bad_input_is_named(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.jsonl"
    path.write_text('{"sample": 0}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1"):
        read(path)
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "none"), "--out", str(tmp_path / "o")])
    assert main() == 2
    assert "--rollout-save-interval" in capsys.readouterr().err
