"""Prompts: held-out problems are never drawn, the order is resumable, mixtures keep their weights."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tlt.config import DataConfig, EvalConfig
from tlt.data.procedural import make_dataset, make_item
from tlt.data.prompts import PromptBuilder, PromptStream, excluded_questions, held_out_prompts
from tlt.data.source import parse_source, question_key
from tlt.rewards.scoring import score

ROOT = Path(__file__).parents[2]
SMALL = 'reasoning-gym:chain_sum:{"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}'


def make(tokenizer, *, train=(SMALL,), weights=None, num_held_out=64, seed=1, chat_template=True):
    data = DataConfig(train=train, weights=weights, instruction=" Answer only.", chat_template=chat_template)
    builder = PromptBuilder(data, tokenizer=tokenizer, max_prompt_tokens=400)
    held_out = held_out_prompts(EvalConfig(num_prompts=num_held_out), data, builder, seed=seed)
    excluded = {question_key(prompt.text) for prompt in held_out}
    return PromptStream(data, builder, seed=seed, excluded=excluded), held_out


def test_training_never_draws_a_held_out_question(tokenizer):
    # 200 problems in all: 64 are held out, and 3,000 draws see every other one
    stream, held_out = make(tokenizer)
    assert len({question_key(prompt.text) for prompt in held_out}) == 64
    drawn = {question_key(prompt.text) for prompt in stream.next_batch(3000)}
    assert not drawn & {question_key(prompt.text) for prompt in held_out}
    assert len(drawn) == 136


MAKE_ONE_OF_EACH = """
import hashlib, json
from reasoning_gym.factory import DATASETS
from tlt.data.procedural import REFUSED, make_dataset, make_item
for task in sorted(DATASETS.keys() - REFUSED.keys() - {"composite"}):  # which names no task of its own
    items = [make_item(make_dataset(task, {"size": 4}, 5), index) for index in range(4)]
    print(task, hashlib.sha256(json.dumps([item["question"] for item in items]).encode()).hexdigest())
"""


def test_every_process_has_the_same_problems():
    """Ranks and scorers each make them for themselves; Python's strings hash otherwise in each."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE_ONE_OF_EACH], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    first, second = (process.communicate()[0].splitlines() for process in processes)
    assert len(first) > 90
    assert [one for one, other in zip(first, second, strict=True) if one != other] == []


def test_a_task_without_problems_of_its_own_is_refused():
    with pytest.raises(
        ValueError, match="--data-train: reasoning-gym:ransom_note is refused: it has other problems in"
    ):
        parse_source("reasoning-gym:ransom_note", "--data-train", seed=1)
    with pytest.raises(ValueError, match="--data-train: reasoning-gym:codeio is refused: it runs programs"):
        parse_source("reasoning-gym:codeio", "--data-train", seed=1)
    with pytest.raises(ValueError, match="--data-train: the size of reasoning-gym:gcd must be at least 1, got 0"):
        parse_source('reasoning-gym:gcd:{"size": 0}', "--data-train", seed=1)


@pytest.mark.parametrize("task", ["gsm_symbolic", "list_functions", "chain_sum"])
def test_a_task_does_not_end_where_its_dataset_does(task):
    """Two of these have no problem beyond their size, which is no limit of a run; answers are found again."""
    spec = f'reasoning-gym:{task}:{{"size": 7}}'
    source, state = parse_source(spec, "--data-train", seed=3), random.getstate()
    problems = [source.problem(position) for position in range(30)]
    assert random.getstate() == state, "a run's own generator is left alone"
    assert len({problem.question for problem in problems}) > 20, "later ones are others"
    again = parse_source(spec, "--data-train", seed=3)
    assert [again.problem(position).question for position in (29, 3, 14)] == [
        problems[position].question for position in (29, 3, 14)
    ], "a function of seed and position, in whatever order they are asked for"
    for problem in problems:
        answer = problem.answer
        item = make_item(make_dataset(task, answer["config"], answer["seed"]), answer["index"])
        assert item["question"] == problem.question, "what was asked is what is scored"
        assert score(answer, item["answer"]) == 1.0


def test_a_source_that_is_held_out_whole_is_an_error(tokenizer):
    stream, held_out = make(tokenizer, num_held_out=200)
    assert len(held_out) == 200
    with pytest.raises(ValueError, match="--eval-num-prompts"):
        stream.next_batch(1)


def test_the_order_goes_on_where_it_was_saved(tokenizer):
    straight, _ = make(tokenizer)
    expected = straight.next_batch(30)
    first, _ = make(tokenizer)
    first.next_batch(11)
    second, _ = make(tokenizer)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.next_batch(19) == expected[11:]


def test_seeds_give_different_prompts_and_ids_are_unique(tokenizer):
    one, two = make(tokenizer, seed=1)[0].next_batch(300), make(tokenizer, seed=2)[0].next_batch(300)
    assert [prompt.text for prompt in one] != [prompt.text for prompt in two]
    assert len({prompt.prompt_id for prompt in one}) == 300


def test_a_problem_that_comes_again_has_another_id_and_the_same_key(tokenizer):
    drawn = make(tokenizer)[0].next_batch(500)  # of 136 problems
    ids, keys = {prompt.prompt_id for prompt in drawn}, {prompt.problem_key for prompt in drawn}
    assert len(ids) == 500
    assert len(keys) == len({prompt.text for prompt in drawn}) <= 136


def test_mixtures_keep_their_weights(tokenizer):
    stream, _ = make(tokenizer, train=(SMALL, "reasoning-gym:gcd"), weights=(3.0, 1.0))
    counts = Counter(prompt.source for prompt in stream.next_batch(1000))
    assert counts["reasoning-gym:chain_sum"] == pytest.approx(750, abs=60)  # 4.4 standard deviations of 13.7


def test_the_prompt_is_the_chat_template_of_question_and_instruction(tokenizer):
    prompt = make(tokenizer)[0].next_batch(1)[0]
    text = tokenizer.decode(list(prompt.token_ids))
    assert text == f"<|im_start|>user\n{prompt.text} Answer only.<|im_end|>\n<|im_start|>assistant\n"


def test_a_jsonl_epoch_has_each_problem_once_and_repeats_in_another_order(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"question": f"What is {i} + {i}?", "answer": f"so\n#### {2 * i}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    stream, _ = make(tokenizer, train=(f"jsonl:{path}",), num_held_out=0)
    first, second = ([prompt.text for prompt in stream.next_batch(20)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(row["question"] for row in rows)
    assert first != second
    assert stream.next_batch(1)[0].answer["gold"].isdigit()


def test_held_out_problems_follow_the_mixture_and_have_their_own_ids(tokenizer):
    longer = SMALL.replace('"max_terms": 2', '"max_terms": 3').replace('"min_terms": 2', '"min_terms": 3')
    _, held_out = make(tokenizer, train=(SMALL, longer), weights=(1.0, 3.0), num_held_out=40)
    counts = Counter(prompt.text.count("+") + prompt.text.count("-") for prompt in held_out)
    assert counts == {1: 10, 2: 30}
    assert len({prompt.prompt_id for prompt in held_out}) == 40


def test_excluded_questions_are_neither_trained_on_nor_held_out(tokenizer, tmp_path):
    _, some = make(tokenizer, num_held_out=100)
    path = tmp_path / "cold_start.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt.text.upper(), "response": "x"}) + "\n" for prompt in some))
    excluded = excluded_questions([str(path)])
    assert excluded == {question_key(prompt.text) for prompt in some}
    data = DataConfig(train=(SMALL,), instruction=" Answer only.")
    builder = PromptBuilder(data, tokenizer=tokenizer, max_prompt_tokens=400)
    held_out = held_out_prompts(EvalConfig(num_prompts=64), data, builder, seed=1, excluded=excluded)
    drawn = PromptStream(data, builder, seed=1, excluded=excluded).next_batch(1000)
    assert not {question_key(prompt.text) for prompt in [*held_out, *drawn]} & excluded
    with pytest.raises(ValueError, match="--data-exclude: nowhere is not a file"):
        excluded_questions(["nowhere"])
