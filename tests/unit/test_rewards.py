"""Scoring is exact; whatever a scorer does, the run goes on."""

import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlt.config import RewardConfig
from tlt.rewards.pool import RewardPool
from tlt.rewards.scoring import extract, last_answer, score
from tlt.types import Prompt, Rollout, RolloutGroup
from tools.fuzz_graders import fuzz

ROOT = str(Path(__file__).parents[2])
SUM = {
    "kind": "reasoning-gym",
    "task": "chain_sum",
    "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "seed": 3,
    "index": 5,
}  # 6 + 2


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("8", 1.0),
        ("6 + 2 = 8", 1.0),
        ("<answer>8</answer> or 9", 1.0),
        ("8 9", 0.0),
        ("0123456789 8 88", 0.0),  # partial credit: the oracle is a part of the answer
        ("-8", 0.0),
        ("", 0.0),
        ("\x00" * 10, 0.0),
    ],
)
def test_sums_are_scored_exactly(response, expected):
    import reasoning_gym

    dataset = reasoning_gym.create_dataset("chain_sum", seed=3, **SUM["config"])
    assert dataset[5]["question"].endswith("6 + 2 =")
    assert score(SUM, response) == expected


@pytest.mark.parametrize(
    ("gold", "response", "expected"),
    [
        ("42", "The answer is $\\boxed{42}$.", 1.0),
        ("\\frac{1}{3}", "$\\frac{2}{6}$", 1.0),
        ("\\frac{1}{3}", "$0.3333$", 0.0),
        ("18", "$18", 1.0),
        ("18", "I do not know", 0.0),
    ],
)
def test_mathematical_equality(gold, response, expected):
    assert score({"kind": "math", "gold": gold}, response) == expected


def test_extraction_takes_the_last_answer():
    assert extract("a <answer>1</answer> <answer> 2 </answer>", "2") == "2"
    assert extract("1,234 and then -5,678.5", "7") == "-5678.5"
    assert extract("first\nlast line\n\n", "text") == "last line"


def scripted(answer: dict, response: str) -> float:
    if response == "hang":
        time.sleep(60)
    if response == "libraries":
        return float({"math_verify", "reasoning_gym"} <= sys.modules.keys())
    if response == "die":
        os._exit(3)
    if response == "forked":
        from tlt.rewards import zygote

        return float(os.getppid() == zygote.PID)
    if response == "signal":
        for process in (os.getpid(), os.getppid()):  # and the zygote, without which no one could be replaced
            os.kill(process, signal.SIGUSR1)
            os.kill(process, signal.SIGTERM)
        response = "good"
    if response == "raise":
        raise ValueError("weird response")
    if response == "print":
        print("x" * 1000, flush=True)
        os.write(2, b"y" * 1000)
        return 1.0
    if response == "eat":
        bytearray(2**31)
    if response.startswith("leak"):
        LEAKED.append(bytes(100 * 2**20))
    if response in WRONG:
        return WRONG[response]
    return float(response == "good" or response.startswith("leak"))


LEAKED: list[bytes] = []
WRONG = {"nan": float("nan"), "infinite": float("inf"), "none": None, "text": "1.0", "huge": "9" * 10**6}


def group(name: str, texts: list[str]) -> RolloutGroup:
    prompt = Prompt(prompt_id=name, source="s", token_ids=(1,), text="", answer={})
    rollouts = tuple(
        Rollout(
            token_ids=(1,), logprobs=(-1.0,), text=text, finish_reason="stop", policy_version=0, sample_index=index
        )
        for index, text in enumerate(texts)
    )
    return RolloutGroup(prompt=prompt, rollouts=rollouts)


@pytest.fixture(scope="module", autouse=True)
def own_fork_server():
    """The zygote, as a rank has it: other tests of this process may have started a server for their ranks."""
    server = multiprocessing.forkserver._forkserver
    names = ("_forkserver_pid", "_forkserver_alive_fd", "_forkserver_address", "_preload_modules")
    others = {name: getattr(server, name) for name in names}
    server._forkserver_pid = server._forkserver_alive_fd = server._forkserver_address = None
    yield
    server._stop()
    for name, value in others.items():
        setattr(server, name, value)


@pytest.fixture
def pool():
    pool = RewardPool(RewardConfig(timeout_s=1.0), scorer=scripted)
    yield pool
    pool.close()


def submit(pool: RewardPool, groups: list[RolloutGroup]) -> None:
    for item in groups:
        for index, rollout in enumerate(item.rollouts):
            pool.submit(item.prompt, index, rollout)


def test_a_fresh_process_has_the_libraries_before_a_response_comes(pool):
    """Imported with it they would take seconds of its time limit, and after a hang of the next one's."""
    groups = [group("a", ["libraries", "hang", "libraries"])]
    submit(pool, groups)
    assert pool.collect(groups)[0].rewards == (1.0, 0.0, 1.0)


START_ANOTHER = """
    other = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    other.start()
    other.join()
"""
SCRIPT = """
import multiprocessing, os, sys
sys.path.insert(0, {root!r})
from tests.unit.test_rewards import RewardConfig, RewardPool, group, scripted, submit
if __name__ == "__main__":
{before}
    pool = RewardPool(RewardConfig({config}), scorer=scripted)
    groups = [group("a", {responses})]
    submit(pool, groups)
{then}
"""


def write_script(path: Path, *, before: str, config: str, responses: list[str], then: str) -> None:
    """A program that submits responses as a rank would."""
    path.write_text(SCRIPT.format(root=ROOT, before=before, config=config, responses=responses, then=then))


COLLECT = """
    print(pool.collect(groups)[0].rewards)
    pool.close()
"""


@pytest.mark.parametrize(
    ("before", "rewards"), [("", "(1.0, 0.0, 1.0, 0.0, 1.0)"), (START_ANOTHER, "(1.0, 0.0, 1.0, 0.0, 0.0)")],
    ids=["any folder", "a server of another library"],
)  # fmt: skip
def test_scorers_have_the_libraries_wherever_a_run_begins(before, rewards, tmp_path):
    """They are forked from the zygote, which must find its module there; or from nothing, where it cannot be."""
    responses = ["libraries", "hang", "libraries", "die", "forked"]
    write_script(
        tmp_path / "score.py", before=before, config="timeout_s=1.0", responses=responses, then=COLLECT
    )  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "score.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert ended.stdout.strip() == rewards, ended.stderr


def test_hanging_dying_and_raising_scorers_cost_one_reward_each(pool):
    groups = [group("a", ["good", "hang", "bad"]), group("b", ["die", "good", "raise"])]
    submit(pool, [group("first", ["good"])])  # starts the processes
    begin_s = time.monotonic()
    submit(pool, groups)
    assert time.monotonic() - begin_s < 0.5, "submit returns at once"
    scored = pool.collect(groups)
    assert [item.rewards for item in scored] == [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
    assert pool.stats()["reward/timeouts"] == 1
    assert pool.stats()["reward/errors"] == 2
    assert time.monotonic() - begin_s < 30


def test_a_signal_to_all_processes_of_a_job_costs_no_reward(pool):
    groups = [group("a", ["signal", "die", "good"])]
    submit(pool, groups)
    assert pool.collect(groups)[0].rewards == (1.0, 0.0, 1.0)
    for scorer in pool.pool._pool_manager.worker_manager.workers:  # which are idle
        os.kill(scorer, signal.SIGTERM)
    groups = [group("b", ["good", "hang", "good"])]
    submit(pool, groups)
    assert pool.collect(groups)[0].rewards == (1.0, 0.0, 1.0)


def test_scorers_that_eat_leak_print_or_return_no_number(capfd):
    pool = RewardPool(RewardConfig(timeout_s=10.0, memory_mib=1000), scorer=scripted)
    leaking = [f"leak {index}" for index in range(25)]  # 2.5 GiB in all
    groups = [group("a", ["good", "eat", "print", "bad"]), group("b", leaking), group("c", ["good", *WRONG])]
    try:
        submit(pool, groups)
        first, second, third = (item.rewards for item in pool.collect(groups))
    finally:
        pool.close()
    assert first == (1.0, 0.0, 1.0, 0.0)
    assert second == (1.0,) * len(leaking), "who comes after a leak loses nothing"
    assert third == (1.0,) + (0.0,) * len(WRONG)
    assert pool.stats()["reward/errors"] == 1 + len(WRONG)
    assert pool.stats()["reward/out_of_memory"] >= 3
    captured = capfd.readouterr()
    assert "xxx" not in captured.out
    assert "yyy" not in captured.err


END_BESIDE_A_SCORER = """
    pool.pending["a", 0][0].result()
    print(next(iter(pool.pool._pool_manager.worker_manager.workers)), flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("before", ["", START_ANOTHER], ids=["the zygote", "a server of another library"])
def test_a_scorer_ends_with_its_rank_however_that_ends(before, tmp_path):
    write_script(
        tmp_path / "orphan.py", before=before, config="", responses=["good", "hang"], then=END_BESIDE_A_SCORER
    )  # fmt: skip
    ended = subprocess.run([sys.executable, "orphan.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while is_running(int(ended.stdout)):
        assert time.monotonic() < deadline, "the scorer sleeps on"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


HOSTILE = (
    "<answer>" * 120_000, "</answer>" * 110_000, "<answer>8" * 100_000 + "</answer>", "8" * 10**6, "-" * 10**6,
    "8," * 500_000, "1." * 500_000, "\n" * 10**6, "\x00" * 10**6, "8\n" * 500_000, " " * 10**6 + "8",
)  # fmt: skip


@pytest.mark.parametrize("gold", ["8", "eight"])
@pytest.mark.parametrize("response", HOSTILE, ids=lambda text: repr(text[:12]))
def test_extraction_is_linear_in_a_megabyte(response, gold):
    begin_s = time.process_time()
    extract(response, gold)
    assert time.process_time() - begin_s < 2


@given(st.lists(st.sampled_from(["<answer>", "</answer>", "8", " ", "<answer", ">", "x"]), max_size=12).map("".join))
def test_the_last_answer_is_that_of_a_scan_from_the_left(text):
    found = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    assert last_answer(text) == (found[-1] if found else None)


def test_a_response_that_was_not_submitted_is_an_error(pool):
    with pytest.raises(RuntimeError, match="never submitted"):
        pool.collect([group("a", ["good"])])


def test_abandoned_responses_are_forgotten(pool):
    groups = [group("a", ["good"])]
    submit(pool, groups)
    pool.abandon()
    with pytest.raises(RuntimeError, match="never submitted"):
        pool.collect(groups)


def test_scoring_needs_no_engine_and_no_torch():
    code = "import sys, tlt.rewards.scoring; sys.exit('torch' in sys.modules or 'vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_rank_keeps_its_signals_and_imports_no_libraries_of_scorers():
    code = (
        "import signal, sys, tlt.rewards.pool\n"
        "found = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]\n"
        "sys.exit(found != [signal.SIG_DFL] * 2 or 'reasoning_gym' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_hostile_responses_get_a_reward_each():
    counts = fuzz(120, seed=5, timeout_s=5.0, memory_mib=1500, workers=1)
    rewards = Counter({key: value for key, value in counts.items() if not isinstance(key, str)})
    assert rewards.total() == 120
    assert {reward for _, reward in rewards} <= {0.0, 1.0}
    assert len({kind for kind, _ in rewards}) >= 5
