"""Where the simulator's costs come from: a named GPU's roofline, a recording of rollouts, or a run's checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tlt.drafter.calibration import NUM_CONFIDENCES, Calibration
from tlt.drafter.router import NUM_DEPTHS
from tlt.simulation.roofline import gpu_model, roofline
from tlt.spec.cost_model import CostModel
from tlt.spec.recording import read_recording
from tlt.spec.step_model import DrafterModel, StepModel, fit_model
from tlt.spec.strategy import HEADS


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one replica."""

    name: str
    origin: str
    """`assumed` or `measured`."""
    model: StepModel
    context_s: float = 0.0
    """Seconds that each token of context adds to a step; 0 where the measured steps hold it already."""
    kv_room: float | None = None
    """Tokens of context that fit into a replica."""
    update_s: Callable[[float, int], float] | None = None
    """Seconds of old log-probabilities and update for (response tokens, GPUs)."""


def gpu_costs(
    gpu: str, model: str, *, tp_size: int, stands: tuple[float, ...], suffix: tuple[float, float]
) -> Costs:  # fmt: skip
    """Assumed: see tlt/simulation/roofline.py; acceptance is the caller's."""
    times = roofline(gpu, model, tp_size=tp_size)
    return Costs(
        name=f"{model} on {gpu}, TP {tp_size}", origin="assumed", model=gpu_model(times, stands=stands, suffix=suffix),
        context_s=times.context_s, kv_room=times.kv_room(),
        update_s=lambda num_tokens, num_gpus: times.update_s(num_tokens, num_gpus=num_gpus),
    )  # fmt: skip


def recorded_costs(path: Path, flag: str) -> Costs:
    """Measured by tools/bench_rollout.py --record. Raises ValueError naming the flag."""
    return Costs(name=path.name, origin="measured", model=fit_model(read_recording(path, flag)))


def learned_costs(state: Mapping, name: str) -> Costs:
    """Measured: what a checkpoint's speculation.json holds, prices by verified tokens, passes of heads, and how often
    their tokens stood at each depth of sampled text. Suffix drafts are left out: how many requests had one is not
    kept."""
    prices = CostModel()
    prices.load_state_dict(state["costs"])
    drafters = {}
    for row in state["router"]["tables"]:
        if row["drafter"] in HEADS and row["is_random"] and row["drafter"] in prices.passes:
            depths = Calibration(np.full((NUM_DEPTHS, NUM_CONFIDENCES), 0.0))
            depths.load_state_dict(row["depths"])
            drafters[row["drafter"]] = DrafterModel(
                covers=(1.0,), stands=stood_by_depth(depths), passes=prices.passes[row["drafter"]]
            )  # fmt: skip
    return Costs(
        name=name, origin="measured", model=StepModel(steps=prices.steps, drafters=drafters, noise=np.ones(1))
    )  # fmt: skip


def stood_by_depth(depths: Calibration) -> tuple[float, ...]:
    """Share of the tokens that stood of those decided on, at each depth that was reached; (0,) where none was."""
    decided, stood = (np.array(table).sum(1) for table in (depths.decided, depths.stood))
    return tuple((stood[decided > 0] / decided[decided > 0]).tolist()) or (0.0,)
