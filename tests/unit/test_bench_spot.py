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


def test_a_step_belongs_to_the_turn_that_it_lies_in():
    windows = [("rests", 0.0, 1.0), ("trains", 1.0, 2.0), ("bystander", 2.0, 3.0), ("rests", 3.0, 4.0)]
    stats = SimpleNamespace(step_begin_s=[0.5, 1.1, 1.4, 1.9, 2.2, 3.5], step_s=[0.1, 0.3, 0.1, 0.2, 0.5, 0.1])
    assert bench_spot.turn_steps(windows, stats) == [("trains", 2, pytest.approx(0.2)), ("bystander", 1, 0.5)]
    assert bench_spot.turn_steps([], stats) == []


def test_a_turn_is_compared_with_those_around_it():
    turns = [("trains", 1, 2.0), ("rests", 1, 1.0), ("bystander", 1, 4.0), ("trains", 1, 6.0), ("trains", 1, 1.0)]
    assert bench_spot.turn_ratios(turns, "trains", "bystander") == [0.5, 1.5, 0.25]
    assert bench_spot.turn_ratios(turns, "trains", "rests") == [2.0, 6.0]
    assert bench_spot.turn_ratios(turns[:1], "trains", "rests") == []
