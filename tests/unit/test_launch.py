"""How a program begins under an environment that torchrun did not make."""

import logging

import pytest

from tlt.config import RunConfig
from tlt.launch import prepare, ranks_per_node

FLAGS = ["--hf-model", "m", "--save", "s", "--data-train", "reasoning-gym:gcd", "--dry-run"]


@pytest.fixture
def begin(monkeypatch):
    """Status of a dry run under environment variables; its logging is undone."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level

    def run(**variables: str):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return prepare(
            FLAGS, program="tools/program.py", description="", config_class=RunConfig,
            read_inputs=lambda config, world_size: ranks_per_node(world_size),
        )  # fmt: skip

    yield run
    root.handlers[:] = before
    root.setLevel(level)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE in the environment must be a number of at least 1, got 'abc'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE in the environment must be a number of at least 1, got '0'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE in the environment must be a number of at least 1, got ''"),
        ({"RANK": "-1"}, "RANK in the environment must be a number of at least 0, got '-1'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK in the environment must be a number of at least 0, got 'x'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE in the environment must be a number of at least 1, got '0'"),
    ],
)
def test_a_bad_variable_is_named_in_one_line(begin, capsys, variables, message):
    assert begin(**variables) == 2
    assert capsys.readouterr().err == f"program.py: error: {message}\n"


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "4"}, {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}])
def test_what_torchrun_says_is_taken(begin, capsys, variables):
    assert begin(**variables) == 0
    assert "error" not in capsys.readouterr().err
