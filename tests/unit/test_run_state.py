"""A run's folder belongs to one run at a time; the history of responses goes with its checkpoints."""

import errno
import json
import socket

import pytest
import torch

from tlt.arguments import parse
from tlt.build import check_saved_head, fingerprint
from tlt.drafter.history import SuffixHistory
from tlt.run_state import ADDED_LATER, FORMAT, STATE, claim, read_history, read_state, shared_folder, write_history


def test_a_folder_is_claimed_until_its_holder_ends(tmp_path):
    held = claim(tmp_path / "run")
    with pytest.raises(RuntimeError, match="in use by another run"):
        claim(tmp_path / "run")
    held.close()
    claim(tmp_path / "run").close()


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    claim(tmp_path / "run").close()
    assert "has no locks" in caplog.text


class Node:
    """The second of two ranks, whose folder is rank 0's or one of its own."""

    rank = 1

    def __init__(self, folder):
        self.folder = folder

    def all_gather_objects(self, value):
        return [".shared-of-rank-0", value] if isinstance(value, str) else [(True, "node0"), value]

    def barrier(self):
        self.folder.mkdir(exist_ok=True)
        (self.folder / ".shared-of-rank-0").touch()


def test_a_folder_that_nodes_do_not_share_is_refused(tmp_path):
    assert shared_folder(tmp_path / "run", Node(tmp_path / "run")) == tmp_path / "run"
    with pytest.raises(RuntimeError, match=f"must be a folder that all nodes share; on {socket.gethostname()} it is"):
        shared_folder(tmp_path / "own", Node(tmp_path / "run"), patience_s=0.3)


@pytest.mark.parametrize("num_responses", [0, 7])
def test_the_history_of_responses_is_saved_and_read(tmp_path, num_responses):
    history = SuffixHistory(10_000, max_age=5)
    for index in range(num_responses):
        history.add(f"source/{index % 3}", list(range(index, 2 * index + 1)), policy_version=index)
    write_history(tmp_path, history)
    found = SuffixHistory(10_000, max_age=5)
    read_history(tmp_path, found)
    assert found.num_bytes == history.num_bytes
    for key in ("source/0", "source/1", "source/2", "other"):
        assert found.expected_length(key) == history.expected_length(key)
        assert [(response.policy_version, response.token_ids.tolist()) for response in found.responses(key)] == [
            (response.policy_version, response.token_ids.tolist()) for response in history.responses(key)
        ]
    for each in (history, found):  # both go on alike
        each.add("source/1", [1, 2], policy_version=99)
    assert found.expected_length("source/1") == history.expected_length("source/1")


def test_a_saved_head_of_another_shape_is_refused():
    head = torch.nn.Linear(2, 3)
    state = {"live": {name: tensor.detach() for name, tensor in head.named_parameters()}, "version": 1}
    check_saved_head(state, {"eagle": head}, load="run")
    check_saved_head({}, {}, load="run")
    with pytest.raises(ValueError, match=r"--spec-drafter must be of the shape of the head that --load run holds"):
        check_saved_head(state, {"eagle": torch.nn.Linear(2, 4)}, load="run")


def settings(*flags: str) -> dict:
    required = ["--hf-model", "m", "--save", "s", "--data-train", "reasoning-gym:gcd"]
    return fingerprint(parse([*required, *flags], ""))


def saved_under(found: dict, folder):
    (folder / STATE).write_text(json.dumps({"format": FORMAT, "iteration": 3, "fingerprint": found}))
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "7"],
        ["--data-train", "reasoning-gym:lcm"],
        ["--data-weights", "2"],
        ["--data-instruction", "Think."],
        ["--data-exclude", "cold.jsonl"],
        ["--data-max-rejected", "1"],
        ["--no-data-chat-template"],
        ["--eval-sources", "reasoning-gym:lcm"],
        ["--eval-num-prompts", "8"],
    ],
)
def test_a_run_is_not_resumed_on_other_data(tmp_path, flags):
    checkpoint = saved_under(settings(), tmp_path)
    with pytest.raises(ValueError, match=f"other settings: {flags[0].replace('--no-', '--')} was "):
        read_state(checkpoint, settings(*flags))


def test_a_run_is_resumed_with_another_evaluation_and_from_earlier_code(tmp_path):
    checkpoint = saved_under(settings(), tmp_path)
    assert read_state(checkpoint, settings("--eval-interval", "2", "--eval-num-samples", "4")).iteration == 3
    earlier = {name: value for name, value in settings().items() if name not in ADDED_LATER}
    assert len(earlier) == len(settings()) - 3
    checkpoint = saved_under(earlier, tmp_path)
    assert read_state(checkpoint, settings("--no-data-chat-template", "--data-max-rejected", "1")).iteration == 3
    with pytest.raises(ValueError, match="--seed was 1234, is 7"):
        read_state(checkpoint, settings("--seed", "7"))
