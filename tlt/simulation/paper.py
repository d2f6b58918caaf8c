"""TLT's end-to-end table, and its speculation as a table of measured speed-ups by batch size.

Facts of arXiv 2511.16665 from secondary sources (the paper's full text was not read). Its figures are of trees that a
GPU verified; nothing here was measured by us.
"""

from dataclasses import dataclass, replace

import numpy as np

from tlt.simulation.step_table import StepTable

SPEED_UP_BY_BATCH = {1: 3.62, 2: 3.39, 4: 3.13, 8: 2.73, 16: 2.67, 32: 2.48}
"""Table 4, the best strategy of each batch size: Qwen2.5-32B, TP 4, H100, depth 10."""
SHARE_BY_MODEL = {"7B": 2.61 / 3.62, "32B": 1.0}
"""Of these that another model gets: table 2 has 2.61 for Qwen2.5-7B at batch 1 on an H100."""
THRESHOLD = 32
"""Running requests of an engine above which it does not speculate."""


@dataclass(frozen=True, kw_only=True)
class Reported:
    """A row of table 3: speed-up over VeRL, end to end."""

    model: str
    num_nodes: int
    speed_up: float | None
    """None where it ran out of memory."""


REPORTED = (
    Reported(model="7B", num_nodes=1, speed_up=1.21), Reported(model="7B", num_nodes=2, speed_up=1.45),
    Reported(model="7B", num_nodes=4, speed_up=1.62), Reported(model="7B", num_nodes=8, speed_up=1.76),
    Reported(model="32B", num_nodes=1, speed_up=None), Reported(model="32B", num_nodes=2, speed_up=None),
    Reported(model="32B", num_nodes=4, speed_up=1.83), Reported(model="32B", num_nodes=8, speed_up=2.12),
)  # fmt: skip


def tlt_table(plain: StepTable, model: str) -> StepTable:
    """TLT's engine: as many tokens in a plain step's time as its table says, linear in the logarithm of the batch."""
    sizes = list(SPEED_UP_BY_BATCH)
    speed_ups = [max(SHARE_BY_MODEL[model] * speed_up, 1.0) for speed_up in SPEED_UP_BY_BATCH.values()]
    at = np.arange(1, plain.max_running + 1)
    tokens = np.where(at <= THRESHOLD, np.interp(np.log(at), np.log(sizes), speed_ups), 1.0)
    names = tuple("tree" if size <= THRESHOLD else "off" for size in at)
    return replace(plain, tokens=[1.0, *tokens.tolist()], choices=("", *names))
