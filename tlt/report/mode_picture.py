"""The PNG of a comparison: where each mode's time goes, and whether all of them learn the same."""

from collections.abc import Sequence
from pathlib import Path

from tlt.report.pairs import MeasuredRun, of_mode, rows, spread
from tlt.timeline.breakdown import OTHER, PHASES, TAIL_OF_ROLLOUT
from tlt.timeline.picture import COLOURS, DPI

PHASE_COLOURS = {
    "rollout": COLOURS["rollout"], TAIL_OF_ROLLOUT: "#9AD2F0", "reward": COLOURS["reward"],
    "publish": COLOURS["drafter publish"], "logprobs": COLOURS["old logprobs"], "update": COLOURS["update"],
    "sync": COLOURS["weight sync"], OTHER: "#BBBBBB",
}  # fmt: skip
MODE_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A5A00")
"""Of lines, first the one of plain; from Okabe and Ito, as those of phases."""
PANELS = {
    "reward": "reward", "greedy_accuracy": "held-out accuracy, greedy", "acceptance_length": "acceptance length",
    "rollout_s": "rollout, seconds",
}  # fmt: skip
ROW_IN, WIDTH_IN = 3.4, 22.0


def draw(runs: Sequence[MeasuredRun], path: Path, *, title: str) -> None:
    """Write the PNG, a row of panels for each number of requests."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    all_requests = list(dict.fromkeys(run.requests_per_rank for run in runs))
    figure, axes = pyplot.subplots(
        len(all_requests), 1 + len(PANELS), figsize=(WIDTH_IN, ROW_IN * len(all_requests) + 0.6), squeeze=False,
        layout="constrained", gridspec_kw={"width_ratios": (1.5, *[1] * len(PANELS))},
    )  # fmt: skip
    for requests, (bars, *panels) in zip(all_requests, axes, strict=True):
        chosen = [run for run in runs if run.requests_per_rank == requests]
        draw_phases(bars, chosen)
        bars.set_title(f"{requests} requests a rank: seconds of an iteration")
        for (name, label), panel in zip(PANELS.items(), panels, strict=True):
            draw_curves(panel, chosen, requests, name)
            panel.set_title(label)
            panel.set_xlabel("iteration")
        panels[0].legend(fontsize=8)
    figure.suptitle(f"{title}; lines: mean over seeds, bands: their spread")
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def draw_phases(axes, runs: Sequence[MeasuredRun]) -> None:
    """A bar a mode, of medians over its runs; the tail is drawn as the end of the rollout that it is."""
    found = rows(runs)
    modes = list(dict.fromkeys(row["mode"] for row in found))
    seconds = {(row["mode"], row["phase"]): row["median_s"] for row in found}
    ratios = {row["mode"]: row["ratio_vs_plain"] for row in found if row["phase"] == "iteration"}
    left = dict.fromkeys(modes, 0.0)
    for phase in PHASES[:-1]:
        tails = {mode: seconds[mode, TAIL_OF_ROLLOUT] if phase == "rollout" else 0.0 for mode in modes}
        widths = [max(seconds[mode, phase] - tails[mode], 0.0) for mode in modes]
        axes.barh(modes, widths, left=list(left.values()), color=PHASE_COLOURS[phase], label=phase, height=0.7)
        left = {mode: left[mode] + width for mode, width in zip(modes, widths, strict=True)}
    for mode in modes:
        if ratios[mode] is not None:
            axes.annotate(f" {ratios[mode]:.2f} x", (left[mode], mode), va="center", fontsize=9)
    axes.set_xlim(0, 1.15 * max(left.values()))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False)


def draw_curves(axes, runs: Sequence[MeasuredRun], requests: int, name: str) -> None:
    """A line and a band a mode."""
    for index, mode in enumerate(dict.fromkeys(run.mode for run in runs)):
        points = spread([run.curves[name] for run in of_mode(runs, requests, mode).values()])
        if points:
            iterations, means, least, most = zip(*points, strict=True)
            colour = MODE_COLOURS[index % len(MODE_COLOURS)]
            axes.plot(iterations, means, color=colour, label=mode, marker=".", linewidth=1.4)
            axes.fill_between(iterations, least, most, color=colour, alpha=0.12, linewidth=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
