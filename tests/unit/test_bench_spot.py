"""The bystander of tools/bench_spot.py, in a thread; whole measurements are in tests/e2e."""

import queue
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from tests.unit.drafter_cases import SAMPLES, make_target, make_trainer
from tools import bench_spot

LOAD_S = 0.2


class Process(threading.Thread):
    """That dies at once where it `fails`."""

    fails = False

    def __init__(self, *, target, args, daemon):
        super().__init__(target=(lambda *args: None) if self.fails else target, args=args, daemon=daemon)


@pytest.fixture
def bystander(monkeypatch):
    context = SimpleNamespace(Event=threading.Event, Queue=queue.Queue, Process=Process)
    monkeypatch.setattr(bench_spot.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    trainer, target = make_trainer(), make_target()

    def start():
        state = {
            "head": trainer.head, "config": trainer.config, "seed": 1, "temperature": 1.0,
            "target": (target.embedding, target.output_weight),
        }  # fmt: skip
        return bench_spot.Bystander(None, state)

    return start


def test_samples_are_with_the_bystander_before_the_clock_starts(bystander, monkeypatch):
    loaded_s, load = [], torch.load

    def slow_load(*args, **kwargs):
        time.sleep(LOAD_S)
        found = load(*args, **kwargs)
        loaded_s.append(time.perf_counter())
        return found

    monkeypatch.setattr(torch, "load", slow_load)
    beside = bystander()
    for count in (1, 2):
        beside.prepare(SAMPLES)
        assert len(loaded_s) == count
    beside.close()
    assert not beside.process.is_alive()


def test_a_bystander_that_died_is_not_waited_for(bystander, monkeypatch):
    monkeypatch.setattr(Process, "fails", True)
    with pytest.raises(RuntimeError, match="ended before"):
        bystander().prepare(SAMPLES)
