"""In what runs differ: flags, commit, versions, world."""

from collections.abc import Mapping, Sequence

from tlt.report.run import RunRecord

SETTINGS = ("commit", "world_size", "python", "machine")


def settings(start: Mapping) -> dict[str, str]:
    """Everything that run.json says of a start, one value each. A run's own folders are left out: they say nothing."""
    config = {
        f"{part} {name}": value
        for part, values in start.get("config", {}).items()
        for name, value in values.items()
        if (part, name) not in (("training", "save"), ("training", "load"))
    }
    packages = {f"package {name}": version for name, version in start.get("packages", {}).items()}
    patches = {"patches": " ".join(start["patches"])} if start.get("patches") else {}
    own = {name: start[name] for name in SETTINGS if name in start}
    return {name: text(value) for name, value in {**own, **packages, **patches, **config}.items()}


def text(value: object) -> str:
    """As a table shows it."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def differing(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Value of each run's newest start by setting, of those in which runs differ; of a single run all of them."""
    found = [settings(run.starts[-1]) if run.starts else {} for run in runs]
    names = list(dict.fromkeys(name for each in found for name in each))
    values = {name: [each.get(name, "-") for each in found] for name in names}
    return {name: row for name, row in values.items() if len(runs) == 1 or len(set(row)) > 1}
