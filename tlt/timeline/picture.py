"""The PNG of a timeline: a bar per rank, and below it, on the same time axis, requests and accepted tokens."""

from pathlib import Path

from tlt.timeline import series
from tlt.timeline.phases import PHASES, TAIL, Timeline

COLOURS = {  # Okabe and Ito's eight, which colour-blind readers tell apart, and shades of two of them
    "rollout": "#56B4E9",
    TAIL: "#DDDDDD",
    "tail: drafter training": "#E69F00",
    "drafter publish": "#8A5A00",
    "reward": "#F0E442",
    "old logprobs": "#0072B2",
    "reference logprobs": "#004166",
    "update": "#D55E00",
    "weight sync": "#CC79A7",
    "evaluation": "#009E73",
    "checkpoint": "#000000",
}
assert set(COLOURS) == set(PHASES)
WIDTH_PX, DPI = 1200, 100
MIN_SHARE_IN_LEGEND = 5e-4


def rank_colours(num_ranks: int) -> list[str]:
    """Dark to light, so that they differ in print too."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](0.75 * index / max(num_ranks - 1, 1))) for index in range(num_ranks)]


def draw(timeline: Timeline, path: Path, *, title: str) -> None:
    """Write the PNG, `WIDTH_PX` pixels wide."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_ranks = len(timeline.ranks)
    gantt_in = 0.5 + 0.5 * num_ranks
    figure, (gantt, running, acceptance) = pyplot.subplots(
        3, 1, sharex=True, figsize=(WIDTH_PX / DPI, gantt_in + 4.6), layout="constrained",
        gridspec_kw={"height_ratios": (gantt_in, 1.5, 1.5)},
    )  # fmt: skip
    draw_phases(gantt, timeline)
    colours = dict(zip(timeline.ranks, rank_colours(num_ranks), strict=True))
    for rank in timeline.ranks:
        style = {"color": colours[rank], "label": f"rank {rank}", "linewidth": 1.6}
        if series.has_running_requests(timeline):
            times, values = series.running_requests(timeline, rank)
            running.step(since(timeline, times), values, where="post", **style)
        if series.has_drafts(timeline):
            times, values = series.acceptance_lengths(timeline, rank)
            acceptance.plot(since(timeline, times), values, marker=".", markersize=4, **style)
    running.set_ylabel("running\nrequests", fontsize=12)
    running.set_ylim(bottom=0)
    if not series.has_drafts(timeline):
        draw_iteration_lengths(acceptance, timeline)
    acceptance.set_ylabel("acceptance\nlength (tokens)", fontsize=12)
    acceptance.set_xlabel("seconds", fontsize=12)
    for axes, is_filled in (
        (running, series.has_running_requests(timeline)),
        (acceptance, series.has_drafts(timeline) or bool(series.iteration_lengths(timeline))),
    ):
        if is_filled:
            axes.grid(axis="y", alpha=0.3)
        else:
            axes.text(0.5, 0.5, "not in this run's trace", transform=axes.transAxes, ha="center", fontsize=12)
    if series.has_running_requests(timeline):  # the lines below are the same ranks'
        running.legend(fontsize=11, loc="upper right", ncols=min(num_ranks, 4), framealpha=0.85)
    for axes in (gantt, running, acceptance):
        axes.tick_params(labelsize=12)
        axes.spines[["top", "right"]].set_visible(False)
        for begin_s, _ in timeline.iterations.values():
            axes.axvline(begin_s - timeline.begin_s, color="black", linewidth=0.7, zorder=0)
    figure.suptitle(f"{title}, in % of its time", fontsize=13)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def since(timeline: Timeline, times: list[float]) -> list[float]:
    """Seconds since the picture's left edge."""
    return [time_s - timeline.begin_s for time_s in times]


def draw_phases(axes, timeline: Timeline) -> None:
    """One row a rank; the legend says each phase's share of the ranks' time."""
    rows = {rank: index for index, rank in enumerate(timeline.ranks)}
    for phase, by_rank in timeline.seconds().items():
        share = sum(by_rank.values()) / (len(rows) * sum(end - begin for begin, end in timeline.iterations.values()))
        bars = [bar for bar in timeline.bars if bar.phase == phase]
        axes.barh(
            [rows[bar.rank] for bar in bars], [bar.end_s - bar.begin_s for bar in bars],
            left=[bar.begin_s - timeline.begin_s for bar in bars], height=0.72, color=COLOURS[phase],
            hatch="///" if phase == TAIL else None, edgecolor="#999999" if phase == TAIL else COLOURS[phase],
            linewidth=0, label=f"{phase} {100 * share:.1f} %" if share >= MIN_SHARE_IN_LEGEND else None,
        )  # fmt: skip
    axes.set_yticks(list(rows.values()), [f"rank {rank}" for rank in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, timeline.end_s - timeline.begin_s)
    for iteration, (begin_s, _) in timeline.iterations.items():
        axes.annotate(
            f"iteration {iteration}", (begin_s - timeline.begin_s, 1), xycoords=("data", "axes fraction"),
            xytext=(3, 3), textcoords="offset points", fontsize=11,
        )  # fmt: skip
    axes.legend(fontsize=11, loc="lower left", bbox_to_anchor=(0, 1.14), ncols=4, frameon=False, borderaxespad=0)


def draw_iteration_lengths(axes, timeline: Timeline) -> None:
    """Means of iterations, which older traces have nothing but."""
    for begin_s, end_s, length in series.iteration_lengths(timeline):
        axes.plot(since(timeline, [begin_s, end_s]), [length, length], color="black", linewidth=2.5)
