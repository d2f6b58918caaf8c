"""A run that something happens to ends with an error that says where, never hangs, and goes on where it was: in the
end its metrics are those of a run that nothing happened to, bit for bit.

The whole matrix of points, ranks and kinds is in the slow set. Not covered: several machines.
"""

import json
import re
import time
from pathlib import Path

import pytest

from tests.e2e import runs
from tests.engine.test_speculation import PEAKED, write_head
from tests.tiny_models import write_tiny_model
from tools.training_run import last_iteration

pytestmark = [pytest.mark.engine, pytest.mark.megatron]

DEADLINE_MINUTES = 1.0
POINTS = (
    "rollout", "reward", "rollout_exchange", "old_logprobs", "update", "optimizer_step", "weight_sync", "save",
    "save_commit",
)  # fmt: skip
CAUSES = {
    "exception": "RuntimeError: injected fault", "out-of-memory": "MemoryError: injected fault",
    "disk-full": "No space left on device",
}  # fmt: skip
"""Of kinds that a rank survives for long enough to say so."""
NUM_ITERATIONS = 2 * len(POINTS) + 1
"""Each start completes one and is struck in the next; the last start is not struck."""


def small(model: Path, save: Path, **overrides) -> list[str]:
    values = {
        "rl_prompts_per_iteration": 4, "rl_group_size": 4, "rollout_max_response_tokens": 24, "eval_num_prompts": 0,
        "rollout_save_interval": 0, "distributed_timeout_minutes": DEADLINE_MINUTES,
    }  # fmt: skip
    return runs.flags(model, save, **(values | overrides))


def strike(model: Path, save: Path, fault: str, **overrides) -> dict:
    """One start that completes an iteration and that a fault strikes in the next one; what became of it. `fault` ends
    in its rank, or in several with commas between them: whichever comes there is struck."""
    iteration = last_iteration(save) + 2
    place, _, ranks = fault.rpartition("/")
    begin_s = time.monotonic()
    flags = [
        *small(model, save, train_iters=iteration, **overrides),
        "--fault", *(f"{place}/{iteration}/{rank}" for rank in ranks.split(",")),
    ]  # fmt: skip
    process = runs.ForkedRun("pretrain_rl", flags)
    output = runs.finish(process, timeout_s=1500)
    return {
        "fault": fault, "iteration": iteration, "status": process.returncode, "seconds": time.monotonic() - begin_s,
        "lost_iterations": iteration - last_iteration(save), "output": output,
    }  # fmt: skip


def fault_is_late(point: str, rank: str) -> bool:
    """Whether rank 0 may have committed the checkpoint by then."""
    return point == "save_commit" and rank != "0"


def check(ended: dict) -> None:
    """It ended, said why, and lost the current iteration at most."""
    kind, _, place = ended["fault"].partition("@")
    point, rank = place.split("/")
    output = ended["output"]
    assert ended["status"] not in (0, None), output[-3000:]
    assert f"injected fault at {point}, iteration {ended['iteration']}: {kind}" in output
    # Where another rank than the one that commits is struck at the commit, the iteration may be there whole.
    assert ended["lost_iterations"] in ((0, 1) if fault_is_late(point, rank) else (1,)), "the current one at most"
    if kind in CAUSES:
        phase = {"optimizer_step": "update", "save_commit": "save"}.get(point, point)
        said = f"rank {rank} failed in {phase} of iteration {ended['iteration']}: "
        assert re.search(re.escape(said) + ".*" + re.escape(CAUSES[kind]), output), output[-3000:]
    if kind in ("sigstop", "hang"):
        # A collective's time-out and the heartbeat's deadline are the same; where the rank that hosts the store is the
        # one that stopped, the store is what does not answer.
        assert re.search(r"rank \d (in .* ends the run|failed in .* of iteration)", output), output[-3000:]


def finished(model: Path, save: Path, num_iterations: int, **overrides) -> list[dict]:
    """Metrics after the run was started without a fault and has come to its end."""
    runs.run_forked("pretrain_rl", small(model, save, train_iters=num_iterations, **overrides), timeout_s=900)
    return runs.records(save)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_faults_of_three_kinds_and_a_damaged_checkpoint_change_nothing(tiny_models, tmp_path):
    model, save = tiny_models["llama"], tmp_path / "run"
    for fault in ("exception@rollout_exchange/1", "disk-full@save_commit/0", "out-of-memory@optimizer_step/1"):
        check(strike(model, save, fault))
    finished(model, save, 4)
    flip_a_byte(next((save / "iter_0000004").glob("*.distcp")))
    output = runs.run_forked("pretrain_rl", small(model, save, train_iters=4))
    assert "iter_0000004 is damaged" in output
    assert "resumed from" in output
    assert runs.records(save) == finished(model, tmp_path / "undisturbed", 4)
    assert not list(save.glob("*.tmp"))
    readable = [path for path in save.rglob("*") if path.stat().st_mode & 0o007]
    assert not readable, "not for everyone on the machine"


@pytest.fixture(scope="module")
def undisturbed(tiny_models, tmp_path_factory) -> list[dict]:
    return finished(tiny_models["llama"], tmp_path_factory.mktemp("undisturbed") / "run", NUM_ITERATIONS)


def write_result(folder: Path, ended: dict) -> None:
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps({**ended, "output": ended["output"][-2000:]}) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["exception", "sigkill", "out-of-memory", "disk-full"])
def test_a_run_survives_every_point_on_every_rank(tiny_models, undisturbed, tmp_path, kind):
    model, save = tiny_models["llama"], tmp_path / "run"
    for point in POINTS:
        for rank in (0, 1):
            ended = strike(model, save, f"{kind}@{point}/{rank}")
            write_result(tmp_path, ended)
            check(ended)
    assert last_iteration(save) in (NUM_ITERATIONS - 1, NUM_ITERATIONS)
    records = finished(model, save, NUM_ITERATIONS)
    assert records == undisturbed[: len(records)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["sigstop", "hang"])
def test_a_run_ends_within_the_deadline_where_a_rank_stops(tiny_models, undisturbed, tmp_path, kind):
    model, save = tiny_models["llama"], tmp_path / "run"
    for fault in ("rollout/1", "rollout_exchange/0", "update/1", "weight_sync/0", "save_commit/1"):
        ended = strike(model, save, f"{kind}@{fault}")
        write_result(tmp_path, ended)
        check(ended)
    stacks = "".join(path.read_text() for path in (save / "trace").glob("stacks*.txt"))
    assert "Thread 0x" in stacks, "where each rank was"
    records = finished(model, save, 6)
    assert records == undisturbed[: len(records)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_what_happens_to_the_drafter_does_not_happen_to_the_policy(tmp_path):
    """Its faults are survived in place; those that no process survives cost the current iteration."""
    for name in ("model", "head"):
        (tmp_path / name).mkdir()
    model = write_tiny_model("llama", tmp_path / "model", **PEAKED)
    drafting = {
        "spec_drafter": write_head(tmp_path / "head", model), "spec_strategy": "eagle:3", "spec_hidden_states_mib": 16,
        "drafter_starts_per_step": 32, "rollout_max_response_tokens": 60,
        "rl_prompts_per_iteration": 3, "rollout_max_num_seqs": 4,  # one rank has two groups, one after the other
        "spot_held_out_every": 64,  # a rank whose only group judges would have nothing to train on
    }  # fmt: skip
    save = tmp_path / "run"
    for fault in (
        "exception@drafter_step", "out-of-memory@drafter_step", "disk-full@drafter_step", "exception@spot_training",
        "sigkill@drafter_step", "exception@spot_publish", "sigkill@spot_publish",
    ):  # fmt: skip
        ended = strike(model, save, f"{fault}/0,1", **drafting, spot_training="on")
        write_result(tmp_path, ended)
        assert "injected fault at" in ended["output"], ended["output"][-3000:]
        is_survived = "sigkill" not in fault and ("drafter_step" in fault or "spot_training" in fault)
        assert (ended["status"] == 0) == is_survived, ended["output"][-3000:]
        assert ended["lost_iterations"] == (not is_survived)
        if is_survived:
            assert "training of the drafter failed on rank" in ended["output"]
    num_iterations = last_iteration(save) + 1
    on = finished(model, save, num_iterations, **drafting, spot_training="on")
    off = finished(model, tmp_path / "off", num_iterations, **drafting)
    for first, second in zip(off, on, strict=True):
        for name in first:
            if name.startswith(("rl/", "policy/")):
                assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-4), name
