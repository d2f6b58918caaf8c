"""Problems of reasoning-gym: functions of (task, configuration, seed, index), so that any process can make them."""

import functools
import json
import random
from typing import Any

HASH_SEED = "has other problems in each process (PYTHONHASHSEED)"
REFUSED = {
    "isomorphic_strings": HASH_SEED,
    "polynomial_multiplication": HASH_SEED,
    "ransom_note": HASH_SEED,
    "codeio": "runs programs of its data file, and has the problems of the last codeio that was made in a process",
}
"""Tasks whose problems are no function of (task, configuration, seed, index), and why."""
KEPT_DATASETS = 16
"""Positions are asked for in order, so a mixture needs one of each source; some hold a file of megabytes."""


def make_dataset(task: str, config: dict[str, Any], seed: int):
    """reasoning-gym's dataset, kept: to be read only. Raises TypeError, AssertionError or ValueError where it refuses
    the configuration."""
    return _dataset(task, json.dumps(config, sort_keys=True), seed)


@functools.lru_cache(maxsize=KEPT_DATASETS)
def _dataset(task: str, config_json: str, seed: int):
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=seed, **json.loads(config_json))


def make_item(dataset: Any, index: int) -> dict[str, Any]:
    """The dataset's problem, answer included.

    A task that also draws from Python's own generator (list_functions) would be scored against another problem than
    was asked: the generator is set for the call and put back.
    """
    state = random.getstate()
    random.seed(f"{dataset.seed}/{index}")
    try:
        return dataset[index]
    finally:
        random.setstate(state)
