"""Faults are read from flags, strike once where and when they are told to, and are not there otherwise."""

import pytest

from tlt.faults import KINDS, POINTS, FaultyTrace, parse_faults
from tlt.trace import Trace


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("point", POINTS)
def test_every_kind_at_every_point_is_understood(kind, point):
    (everywhere,) = parse_faults([f"{kind}@{point}/3"], world_size=3)
    assert (everywhere.kind, everywhere.point, everywhere.iteration, everywhere.ranks) == (kind, point, 3, (0, 1, 2))
    (alone,) = parse_faults([f"{kind}@{point}/12/2"], world_size=3)
    assert (alone.iteration, alone.ranks) == (12, (2,))


@pytest.mark.parametrize(
    "spec",
    ["", "sigkill", "sigkill@update", "sigkill@update/", "sigkill@update/x", "sigkill@update/1/2/3", "kill@update/1",
     "sigkill@lunch/1", "sigkill@update/-1", "sigkill@update/1/7", "sigkill@update/\u0663", "@/", "sigkill/1@update"],
)  # fmt: skip
def test_what_is_no_fault_is_refused_naming_the_flag(spec):
    with pytest.raises(ValueError, match="--fault"):
        parse_faults([spec], world_size=2)


@pytest.mark.parametrize(
    ("kind", "error"), [("exception", RuntimeError), ("out-of-memory", MemoryError), ("disk-full", OSError)]
)
def test_a_fault_strikes_once_at_its_place(tmp_path, kind, error):
    trace = FaultyTrace(tmp_path, 1, parse_faults([f"{kind}@update/2/1", f"{kind}@save/2/0"], world_size=2))
    strikes = []
    for iteration in (1, 2, 2, 3):
        try:
            with trace.span("iteration", iteration=iteration):
                with trace.span("save"):
                    pass  # of another rank
                with trace.span("update"):
                    strikes.append("inside")
        except error as struck:
            strikes.append(struck.__notes__)
    assert strikes == ["inside", ["update of iteration 2"], "inside", "inside"]
    assert '"name": "update"' in (tmp_path / "rank1.jsonl").read_text()


def test_an_error_says_in_which_phase_it_came_up_and_only_there(tmp_path):
    trace = Trace(tmp_path, 0)
    assert trace.where() == "no phase"
    with trace.span("iteration", iteration=7), trace.span("rollout"):
        assert trace.where() == "rollout of iteration 7"
    with pytest.raises(ValueError, match="deep") as got, trace.span("update"), trace.span("reward"):
        raise ValueError("deep")
    assert got.value.__notes__ == ["reward of iteration 7"]
    assert trace.where() == "no phase of iteration 7"
