"""The HTML of a timeline: one file without network, zoomed in time by a slider, times shown under the pointer."""

import html
import math
from collections.abc import Sequence
from string import Template

from tlt.timeline import series
from tlt.timeline.phases import Timeline
from tlt.timeline.picture import COLOURS, rank_colours

STYLE = """
body { font: 14px sans-serif; margin: 16px; color: #222; background: #fff; }
h1 { font-size: 18px; }
table { border-collapse: collapse; margin: 12px 0; }
td, th { padding: 2px 12px 2px 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
.key { display: inline-block; width: 14px; height: 14px; margin-right: 6px; vertical-align: -2px; }
.view { overflow-x: auto; border: 1px solid #bbb; }
.time { position: relative; width: 100%; }
.row { position: relative; height: 36px; margin: 4px 0; }
.row div, .line { position: absolute; top: 0; height: 100%; }
.name { position: sticky; left: 4px; display: inline-block; background: #fffd; padding: 1px 4px; }
.line { width: 0; border-left: 1px solid #000; }
.line span { padding-left: 3px; font-size: 12px; }
.panel { margin-top: 4px; border-top: 1px solid #ccc; }
.panel svg { display: block; width: 100%; height: 110px; }
.panel polyline { fill: none; stroke-width: 1.5; stroke-linecap: round; vector-effect: non-scaling-stroke; }
.ticks { position: relative; overflow: hidden; height: 20px; border-top: 1px solid #222; font-size: 12px; }
.ticks span { position: absolute; border-left: 1px solid #222; padding-left: 2px; }
"""
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
GANTT = Template("""<section>
<p>Zoom in time:
<input type="range" min="0" max="8" step="0.1" value="0" style="width: 300px; vertical-align: middle"
 oninput="this.closest('section').querySelector('.time').style.width = 100 * 2 ** this.value + '%'">
The pointer on a bar shows its times.</p>
<div class="view"><div class="time">
<div style="height: 18px"></div>
$rows
$panels
<div class="ticks">$ticks</div>
$boundaries
</div></div>
<p>$rank_key</p>
<table>
<tr><th>seconds</th>$rank_heads</tr>
$table
</table>
</section>
""")
NUM_TICKS = 40
Point = tuple[float, float]
"""(wall-clock second, value)"""


def page(timeline: Timeline, *, title: str) -> str:
    """The whole file."""
    return PAGE.substitute(title=html.escape(title), style=STYLE, body=gantt(timeline))


def gantt(timeline: Timeline) -> str:
    """A section of a page that has STYLE."""
    colours = dict(zip(timeline.ranks, rank_colours(len(timeline.ranks)), strict=True))
    return GANTT.substitute(
        rows="\n".join(row(timeline, rank) for rank in timeline.ranks),
        panels="\n".join(panels(timeline, colours)),
        ticks=ticks(timeline),
        boundaries="\n".join(boundaries(timeline)),
        rank_key=" ".join(f"{key(colour)}rank {rank}" for rank, colour in colours.items()),
        rank_heads="".join(f"<th>rank {rank}</th>" for rank in timeline.ranks),
        table="\n".join(
            f"<tr><td>{key(COLOURS[phase])}{phase}</td>"
            + "".join(f"<td>{by_rank[rank]:.2f}</td>" for rank in timeline.ranks)
            + "</tr>"
            for phase, by_rank in timeline.seconds().items()
        ),
    )


def key(colour: str) -> str:
    """A coloured square."""
    return f'<span class="key" style="background: {colour}"></span>'


def percent(timeline: Timeline, seconds: float) -> str:
    """Of the picture's width."""
    return f"{100 * seconds / (timeline.end_s - timeline.begin_s):.4f}%"


def row(timeline: Timeline, rank: int) -> str:
    """The bars of a rank."""
    bars = []
    for bar in timeline.bars:
        if bar.rank == rank:
            begin_s, length_s = bar.begin_s - timeline.begin_s, bar.end_s - bar.begin_s
            bars.append(
                f'<div style="left: {percent(timeline, begin_s)}; width: {percent(timeline, length_s)}; '
                f'background: {COLOURS[bar.phase]}" title="rank {rank}, {bar.phase}: {length_s:.3f} s from '
                f'{begin_s:.3f} s"></div>'
            )
    return f'<div class="row">{"".join(bars)}<span class="name">rank {rank}</span></div>'


def panels(timeline: Timeline, colours: dict[int, str]) -> list[str]:
    """Running requests and acceptance lengths, as far as the trace has them."""
    found = []
    if series.has_running_requests(timeline):
        lines = {rank: [stairs(*series.running_requests(timeline, rank))] for rank in timeline.ranks}
        found.append(panel(timeline, "running requests", lines, colours, least=0))
    if series.has_drafts(timeline):
        lines = {rank: unbroken(*series.acceptance_lengths(timeline, rank)) for rank in timeline.ranks}
        found.append(panel(timeline, "acceptance length (tokens)", lines, colours, least=1))
    return found


def stairs(times: Sequence[float], values: Sequence[float]) -> list[Point]:
    """Points of a line that keeps each value until the next time."""
    corners = [(after, value) for after, value in zip(times[1:], values[:-1], strict=True)]
    starts = list(zip(times, values, strict=True))
    return [point for pair in zip(starts, [*corners, starts[-1]], strict=True) for point in pair]


def unbroken(times: Sequence[float], values: Sequence[float]) -> list[list[Point]]:
    """Pieces of a line between values that are NaN; a lone point is twice there, or it would not be seen."""
    pieces: list[list[Point]] = [[]]
    for time_s, value in zip(times, values, strict=True):
        if not math.isnan(value):
            pieces[-1].append((time_s, value))
        elif pieces[-1]:
            pieces.append([])
    return [piece if len(piece) > 1 else 2 * piece for piece in pieces if piece]


def panel(
    timeline: Timeline, label: str, lines: dict[int, list[list[Point]]], colours: dict[int, str], *, least: float
) -> str:
    """One line a rank, in pieces, from `least` to the largest value."""
    most = max((value for pieces in lines.values() for piece in pieces for _, value in piece), default=least)
    height = max(most - least, 1e-9) * 1.05
    drawn = []
    for rank, pieces in lines.items():
        for piece in pieces:
            text = " ".join(
                f"{1e3 * (time_s - timeline.begin_s):.0f},{1 - (value - least) / height:.4f}"
                for time_s, value in piece
            )
            drawn.append(f'<polyline stroke="{colours[rank]}" points="{text}"/>')
    width = 1e3 * (timeline.end_s - timeline.begin_s)
    return (
        f'<div class="panel"><span class="name">{label}, {least:g} to {most:.3g}</span>'
        f'<svg viewBox="0 0 {width:.0f} 1" preserveAspectRatio="none">{"".join(drawn)}</svg></div>'
    )


def ticks(timeline: Timeline) -> str:
    """Seconds at round distances."""
    rough = (timeline.end_s - timeline.begin_s) / NUM_TICKS
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    count = int((timeline.end_s - timeline.begin_s) / step) + 1
    return "".join(
        f'<span style="left: {percent(timeline, index * step)}">{index * step:g}{" s" if index == 0 else ""}</span>'
        for index in range(count)
    )


def boundaries(timeline: Timeline) -> list[str]:
    """Where iterations begin."""
    return [
        f'<div class="line" style="left: {percent(timeline, begin_s - timeline.begin_s)}">'
        f"<span>iteration&nbsp;{iteration}</span></div>"
        for iteration, (begin_s, _) in timeline.iterations.items()
    ]
