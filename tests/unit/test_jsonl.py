"""JSONL from outside: each line is a problem or an error that names file and line; nothing else ever comes out."""

import json
import logging
import math
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlt.config import DataConfig
from tlt.data.jsonl import MAX_LINE_CHARS, numbered_lines
from tlt.data.prompts import PromptBuilder
from tlt.data.source import Problem, parse_line, read_jsonl

GOOD = '{"prompt": "1 + 1", "answer": 2}'
BAD_LINES = {
    "cut off": '{"prompt": "1 + 1", "answer"',
    "two objects": GOOD + GOOD,
    "a list": "[1, 2]",
    "null": "null",
    "no answer": '{"prompt": "x"}',
    "no prompt": '{"answer": 1}',
    "blank prompt": '{"prompt": " \\n", "answer": 1}',
    "prompt of another type": '{"prompt": ["x"], "answer": 1}',
    "answer of another type": '{"prompt": "x", "answer": [1]}',
    "answer true": '{"prompt": "x", "answer": true}',
    "answer not a number": '{"prompt": "x", "answer": NaN}',
    "answer infinite": '{"prompt": "x", "answer": -Infinity}',
    "empty messages": '{"messages": [], "answer": 1}',
    "messages of another type": '{"messages": "x", "answer": 1}',
    "message without content": '{"messages": [{"role": "user"}], "answer": 1}',
    "nested too deeply": '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a number of 5,000 digits": '{"prompt": "x", "answer": ' + "9" * 5000 + "}",
    "half a character in the prompt": '{"prompt": "\\ud800", "answer": 1}',
    "half a character in a message": '{"messages": [{"role": "\\udfff", "content": "x"}], "answer": 1}',
    "half a character in the answer": '{"prompt": "x", "answer": "\\ud800"}',
    "a byte order mark": "\ufeff" + GOOD,
    "too long": '{"prompt": "' + "x" * MAX_LINE_CHARS + '", "answer": 1}',
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, kind):
    path = tmp_path / "problems.jsonl"
    path.write_text(f"{GOOD}\n\n{BAD_LINES[kind]}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"problems\.jsonl, line 3: "):
        read_jsonl(path, "--data-train")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b'{"prompt": "\xc3", "answer": 1}', b"\x80" * 50, bytes(range(256))]
)
def test_bytes_that_are_not_utf8_are_named(tmp_path, content):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + content.replace(b"\n", b"") + b"\n")
    with pytest.raises(ValueError, match=r"problems\.jsonl, line 2: not"):
        read_jsonl(path, "--data-train")


def test_bad_lines_are_left_out_as_far_as_is_allowed_each_named(tmp_path, caplog):
    path = tmp_path / "problems.jsonl"
    lines = [json.dumps({"prompt": f"{index} + 1", "answer": index + 1}) for index in range(50)]
    for index, bad in enumerate(BAD_LINES.values()):
        lines.insert(2 * index, bad)
    path.write_text("\n".join([*lines, lines[1]]), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        problems = read_jsonl(path, "--data-train", max_rejected=len(BAD_LINES))
    assert [problem.question for problem in problems] == [f"{index} + 1" for index in range(50)]
    rejected = [record.message for record in caplog.records if "rejected" in record.message]
    assert len(rejected) == len(BAD_LINES)
    assert [f"line {2 * index + 1}:" in message for index, message in enumerate(rejected)] == [True] * len(rejected)
    assert f"1 lines repeat an earlier question and are left out: [{len(lines) + 1}]" in caplog.text
    with pytest.raises(ValueError, match=f"line 1: .*; {len(BAD_LINES)} lines are bad, --data-max-rejected allows 3"):
        read_jsonl(path, "--data-train", max_rejected=3)


def test_a_file_of_only_bad_lines_holds_no_problem(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("x\ny\n")
    with pytest.raises(ValueError, match="holds no problem"):
        read_jsonl(path, "--data-train", max_rejected=2)


def test_an_enormous_line_is_not_read_into_memory(tmp_path):
    path = tmp_path / "problems.jsonl"
    with path.open("w") as file:
        file.write(GOOD + "\n")
        for _ in range(100):
            file.write("x" * 2**20)
        file.write("\n" + GOOD.replace("1 + 1", "2 + 2") + "\n")
    tracemalloc.start()
    lines = [(number, len(line)) for number, line in numbered_lines(path)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [number for number, _ in lines] == [1, 2, 3]
    assert peak < 8 * MAX_LINE_CHARS < 100 * 2**20
    assert len(read_jsonl(path, "--data-train", max_rejected=1)) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "question", "messages", "answer", "role", "content", "x"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


def check_line(line: str) -> None:
    try:
        problem = parse_line(line, "f, line 1", "name")
    except ValueError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert message.startswith("f, line 1: ")
        return
    assert isinstance(problem, Problem)
    assert problem.question.strip()
    problem.question.encode()
    problem.answer["gold"].encode()
    assert problem.answer["gold"] not in (str(math.nan), str(math.inf), str(-math.inf)) or '"' in line


@given(JSON)
def test_whatever_json_a_line_holds_it_is_a_problem_or_an_error(value):
    check_line(json.dumps(value))


@given(st.text(max_size=60) | st.text(alphabet='{}[]":,\\u0dpromtanswe19 ', max_size=60))
def test_whatever_text_a_line_holds_it_is_a_problem_or_an_error(line):
    check_line(line)


def test_a_tokenizer_without_pad_token_or_template(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = bare.chat_template = None
    with pytest.raises(ValueError, match="--data-chat-template: the tokenizer of --hf-model has no chat template"):
        PromptBuilder(DataConfig(train=("x",)), tokenizer=bare, max_prompt_tokens=99)
    builder = PromptBuilder(DataConfig(train=("x",), chat_template=False), tokenizer=bare, max_prompt_tokens=99)
    problem = Problem(name="n", question="1 + 1", messages=None, answer={})
    assert builder.build(problem, "x").token_ids == tuple(bare.encode("1 + 1"))
