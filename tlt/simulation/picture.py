"""Results as PNG."""

from collections.abc import Sequence
from pathlib import Path

from tlt.simulation.validation import Validation

AXES = (
    "ranks", "requests_per_replica", "max_response_tokens", "group_size", "max_running_requests", "idle_threshold_s"
)  # fmt: skip
"""What may be the horizontal axis: the first that has several values."""
NAMES = ("strategy", "consolidation", "training", *AXES)
PANELS = (
    ("rollout_s", "rollout (s)"), ("iteration_ratio", "iteration, times plain"), ("idle_frac", "idle share"),
)  # fmt: skip


def pyplot():
    """Without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def draw_sweep(path: Path, rows: Sequence[dict]) -> None:
    """A line for each combination of what varies beside the axis."""
    varying = [name for name in NAMES if len({row[name] for row in rows}) > 1]
    axis = next((name for name in AXES if name in varying), AXES[0])
    lines: dict[str, list[dict]] = {}
    for row in rows:
        names = [f"{row[name]}" if name == "strategy" else f"{name} {row[name]}" for name in varying if name != axis]
        lines.setdefault(", ".join(names), []).append(row)
    plots = pyplot()
    figure, panels = plots.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 4.5))
    for axes, (name, title) in zip(panels, PANELS, strict=True):
        for label, own in lines.items():
            points = sorted((row[axis], row[name]) for row in own)
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
        if all(row[axis] > 0 for row in rows):
            axes.set_xscale("log", base=2)
        axes.set_xlabel(axis.replace("_", " "))
        axes.set_title(title)
        axes.grid(alpha=0.3)
    if any(lines):
        panels[-1].legend(fontsize="small")
    save(plots, figure, path)


def draw_paper(path: Path, rows: Sequence[dict]) -> None:
    """A panel for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    plots = pyplot()
    figure, panels = plots.subplots(1, len(models), figsize=(5 * len(models), 4.5), squeeze=False)
    series = (("reported", "TLT, reported"), ("tlt", "TLT's policy, simulated"), ("ours", "ours, simulated"))
    for axes, model in zip(panels[0], models, strict=True):
        own = [row for row in rows if row["model"] == model]
        for name, label in series:
            points = [(row["nodes"], row[name]) for row in own if row[name] is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=label)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("nodes of 8 GPUs")
        axes.set_title(f"{model}: iteration, times plain")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save(plots, figure, path)


def draw_validation(path: Path, found: Validation) -> None:
    """Predicted over measured seconds; the grey band is 10 %."""
    plots = pyplot()
    figure, panels = plots.subplots(1, 2, figsize=(10, 4.5))
    for axes, title, name in zip(panels, ("rollout", "iteration"), ("rollout_s", "iteration_s"), strict=True):
        measured = [getattr(one, name) for one in found.comparisons]
        predicted = [getattr(one, f"predicted_{name}") for one in found.comparisons]
        ends = [0.0, 1.1 * max(*measured, *predicted)]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.fill_between(ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="grey", alpha=0.2)
        axes.scatter(measured, predicted)
        axes.set_xlabel("measured (s)")
        axes.set_ylabel("predicted (s)")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    save(plots, figure, path)


def save(plots, figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plots.close(figure)
