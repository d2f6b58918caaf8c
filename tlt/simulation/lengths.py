"""How long simulated responses are: drawn from a file, a run's own rollouts or a named distribution, in groups whose
responses resemble each other.

A group's lengths share a normal variable with weight `icc` (a Gaussian copula), so that any distribution keeps its
shape and the logarithms of a group correlate by about `icc`. Shapes: G groups, S responses of a group, N lengths.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

NUM_QUANTILES = 20_000
"""Points that a distribution is kept as."""
ROLLOUTS = "rollouts"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A distribution of response lengths, in tokens."""

    name: str
    quantiles: np.ndarray  # [N] ascending, before any limit
    icc: float = 0.0
    """Correlation of the normal variables of a group's responses."""

    def effects(self, rng: np.random.Generator, num_groups: int) -> np.ndarray:
        """[G] what the responses of each group share."""
        return rng.standard_normal(num_groups)

    def draw(
        self, rng: np.random.Generator, effects: np.ndarray, *, group_size: int, longest: int
    ) -> np.ndarray:  # fmt: skip
        """[G, S] lengths of at least 1, cut at the response limit as rollouts are."""
        own = rng.standard_normal((len(effects), group_size))
        normal = np.sqrt(self.icc) * effects[:, None] + np.sqrt(1 - self.icc) * own
        return self.at(normal_share(normal), longest=longest)

    def at(self, share: np.ndarray, *, longest: int) -> np.ndarray:
        """Lengths below which so large a share of all are; shares in [0, 1], any shape."""
        index = np.minimum((share * len(self.quantiles)).astype(int), len(self.quantiles) - 1)
        return np.clip(self.quantiles[index], 1, longest).astype(int)


def normal_share(values: np.ndarray) -> np.ndarray:
    """Share of a standard normal variable below each value; an interpolated table, exact to 1e-5."""
    grid = np.linspace(-6.0, 6.0, 4001)
    return np.interp(values, grid, _SHARES)


_SHARES = np.array([NormalDist().cdf(value) for value in np.linspace(-6.0, 6.0, 4001)])


def named_lengths(text: str, flag: str, *, icc: float = 0.0) -> Lengths:
    """`constant:N`, `lognormal:MEDIAN:SIGMA` (of the natural logarithm) or `pareto:SHORTEST:ALPHA`; or else a file.

    Raises ValueError naming the flag.
    """
    name, *numbers = text.split(":")
    counts = {"constant": 1, "lognormal": 2, "pareto": 2}
    if name not in counts:
        return read_lengths(Path(text), flag, icc=icc)
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if len(values) != counts[name] or min(values) <= 0:
        raise ValueError(
            f"{flag} must be constant:N, lognormal:MEDIAN:SIGMA, pareto:SHORTEST:ALPHA with numbers above 0, or a "
            f"file, got {text!r}"
        )
    share = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    if name == "constant":
        quantiles = np.full(1, values[0])
    elif name == "lognormal":
        normal = np.array([NormalDist().inv_cdf(each) for each in share.tolist()])
        quantiles = values[0] * np.exp(values[1] * normal)
    else:
        quantiles = values[0] * (1 - share) ** (-1 / values[1])
    return Lengths(name=text, quantiles=np.maximum(np.round(quantiles), 1), icc=icc)


def read_lengths(path: Path, flag: str, *, icc: float = 0.0) -> Lengths:
    """Of a JSON file with a list of lengths or with weights by length (an object, or one under `output_tokens`), or of
    a run's folder, from its logged responses. Raises ValueError naming the flag."""
    if path.is_dir():
        return Lengths(name=path.name, quantiles=np.sort(np.array(rollout_lengths(path, flag))), icc=icc)
    if not path.is_file():
        raise ValueError(f"{flag} must be a distribution, a JSON file or a run's folder, {path} is none of them")
    try:
        found = json.loads(path.read_text())
        found = found.get("output_tokens", found) if isinstance(found, dict) else found
        pairs = sorted((int(n), float(w)) for n, w in (found.items() if isinstance(found, dict) else counted(found)))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{flag} {path} holds no lengths: {error}") from None
    if not pairs or pairs[0][0] < 1 or min(weight for _, weight in pairs) < 0:
        raise ValueError(f"{flag} {path} must hold lengths of at least 1 with weights of at least 0")
    lengths, weights = np.array(pairs).T
    share = (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES
    reached = np.searchsorted(np.cumsum(weights) / weights.sum(), share)
    return Lengths(name=path.stem, quantiles=lengths[np.minimum(reached, len(lengths) - 1)], icc=icc)


def counted(values: Sequence[int]) -> list[tuple[int, float]]:
    """Each length with weight 1."""
    return [(value, 1.0) for value in values]


def rollout_lengths(run: Path, flag: str) -> list[int]:
    """Response tokens of all training rollouts that a run logged (--rollout-save-interval). Raises ValueError naming
    the flag."""
    files = sorted((run / ROLLOUTS).glob("train_*.jsonl"))
    found = [len(json.loads(line)["token_ids"]) for file in files for line in file.read_text().splitlines()]
    if not found:
        raise ValueError(f"{flag} {run} has no logged responses ({ROLLOUTS}/train_*.jsonl of --rollout-save-interval)")
    return found
