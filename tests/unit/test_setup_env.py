"""tools/setup_env.sh with a stub for Python: when an environment is installed, gone on with, or made anew."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUP = ROOT / "tools" / "setup_env.sh"

PYTHON = """#!/usr/bin/env bash
case "$1 $2" in
    "-c "*) echo 3.11 ;;
    "-m venv")
        venv="${!#}"
        if [[ $* == *--clear* ]]; then rm -rf "$venv"; fi
        mkdir -p "$venv/bin"
        cp "$0" "$venv/bin/python"
        ;;
esac
echo "$*" >>"$CALLS"
[[ -z $FAILS || $* != *"$FAILS"* ]]
"""


class SetUp:
    """Runs the script on one environment."""

    def __init__(self, folder: Path):
        self.python, self.venv, self.calls = folder / "python", folder / "venv", folder / "calls"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def __call__(
        self, *flags: str, fails: str = "", script: Path = SETUP, **variables: Path
    ) -> subprocess.CompletedProcess:
        """Commands that contain `fails` fail; `script` is one that calls this one, `variables` its environment."""
        self.calls.write_text("")
        given = {"PYTHON": str(self.python), "VENV": str(self.venv), "CALLS": str(self.calls), "FAILS": fails}
        given |= {name: str(value) for name, value in variables.items()}
        return subprocess.run(
            ["bash", str(script), *flags], env={**os.environ, **given}, capture_output=True, text=True
        )  # fmt: skip

    def did(self, what: str) -> bool:
        """Whether the last run called Python with this."""
        return what in self.calls.read_text()


@pytest.fixture
def set_up(tmp_path) -> SetUp:
    return SetUp(tmp_path)


def test_nothing_is_done_twice(set_up):
    assert set_up().returncode == 0
    assert set_up.did("--require-hashes")
    assert set_up().returncode == 0
    assert set_up.calls.read_text() == ""


@pytest.mark.parametrize(("first", "second"), [([], ["--gpu"]), (["--gpu"], [])])
def test_an_environment_of_the_other_kind_is_made_anew(set_up, first, second):
    set_up(*first)
    assert not set_up.did("--clear")
    assert set_up(*second).returncode == 0
    assert set_up.did("-m venv --clear")


def test_an_installation_that_was_stopped_goes_on(set_up):
    assert set_up(fails="--require-hashes").returncode != 0
    assert set_up().returncode == 0
    assert set_up.did("--require-hashes")
    assert not set_up.did("--clear")


def test_one_that_was_stopped_is_of_its_kind(set_up):
    assert set_up(fails="--require-hashes").returncode != 0
    assert set_up("--gpu").returncode == 0
    assert set_up.did("--clear")


def test_what_is_optional_may_fail_to_build(set_up):
    process = set_up("--gpu", fails="transformer-engine")
    assert process.returncode == 0
    assert "transformer-engine[pytorch]==" in process.stderr
    assert set_up.did("flash-attn==")
    assert set_up("--gpu").returncode == 0
    assert set_up.calls.read_text() == "", "set-up ended"


def test_the_benchmark_of_a_given_cold_start_makes_its_environment(set_up, tmp_path):
    (tmp_path / "head").mkdir()
    script = ROOT / "examples" / "reasoner_cpu" / "bench_e2e.sh"
    process = set_up("--quick", script=script, COLD=tmp_path, DRAFTER=tmp_path / "head", OUT=tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert set_up.did("--require-hashes")
    assert set_up.did(f"{ROOT}/tools/bench_e2e.py --hf-model {tmp_path}/hf")
