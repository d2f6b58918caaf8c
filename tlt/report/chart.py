"""Charts as SVG for a page: lines over iterations, and a grid of shades. Static, so that a page needs no script."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tlt.report.run import Point

WIDTH, HEIGHT = 420, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 30
CELL_WIDTH, CELL_HEIGHT, LABEL_WIDTH = 26, 18, 60


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart."""

    name: str
    colour: str
    points: Sequence[Point]
    dash: str = ""
    """SVG's stroke-dasharray, for a second quantity in a run's colour."""


def ticks(least: float, most: float, count: int = 5) -> list[float]:
    """Round numbers, about `count` of them, that cover the values; equal values have room around them."""
    if most - least <= 1e-6 * max(abs(most), abs(least)):
        least, most = least - 0.1 * abs(least), most + (0.1 * abs(most) or 1.0)
    rough = (most - least) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= 0.999 * rough)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def line_chart(lines: Sequence[Line], *, label: str) -> str:
    """A figure with its caption; "" where no line has a point. The pointer on a mark shows its value."""
    points = [point for line in lines for point in line.points]
    if not points:
        return ""
    across = ticks(min(x for x, _ in points), max(x for x, _ in points))
    across = [each for each in across if each == int(each)]  # iterations
    up = ticks(min(y for _, y in points), max(y for _, y in points))
    left, right = min(across + [min(x for x, _ in points)]), max(across + [max(x for x, _ in points)])

    def place(point: Point) -> tuple[float, float]:
        x = LEFT + (point[0] - left) / max(right - left, 1e-12) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - up[0]) / (up[-1] - up[0]) * (HEIGHT - TOP - BOTTOM)
        return x, y

    drawn = [*grid(across, up, left, place)]
    for line in lines:
        places = [place(point) for point in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        drawn.append(f'<polyline stroke="{line.colour}" stroke-dasharray="{line.dash}" points="{path}"/>')
        drawn += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{line.colour}"><title>'
            f"{html.escape(line.name)}, iteration {iteration:g}: {value:.4g}</title></circle>"
            for (x, y), (iteration, value) in zip(places, line.points, strict=True)
        ]
    return (
        f'<figure class="chart"><figcaption>{html.escape(label)}</figcaption>'
        f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{html.escape(label)}">{"".join(drawn)}</svg>'
        "</figure>"
    )


def grid(across: Sequence[float], up: Sequence[float], left: float, place) -> list[str]:
    """Ticks and their numbers; `place` maps (iteration, value) to pixels."""
    drawn = []
    for value in up:
        _, y = place((left, value))
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
    for value in across:
        x, _ = place((value, up[0]))
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    return drawn


def legend(lines: Mapping[str, str]) -> str:
    """Names and their colours."""
    keys = [
        f'<span class="key" style="background: {colour}"></span>{html.escape(name)}' for name, colour in lines.items()
    ]
    return f'<p class="legend">{" &nbsp; ".join(keys)}</p>'


def shade_grid(
    rows: Mapping[str, Mapping[int, float]], *, label: str, colour: tuple[int, int, int] = (0, 114, 178)
) -> str:
    """Shares from 0 to 1 as shades: a row by name, a column an iteration; the pointer shows a cell's value. "" where
    there is none."""
    columns = sorted({column for cells in rows.values() for column in cells})
    if not columns:
        return ""
    drawn = []
    for down, (name, cells) in enumerate(rows.items()):
        y = down * CELL_HEIGHT
        drawn.append(f'<text x="{LABEL_WIDTH - 6}" y="{y + 13}" text-anchor="end">{html.escape(name)}</text>')
        for column, value in cells.items():
            x = LABEL_WIDTH + columns.index(column) * CELL_WIDTH
            drawn.append(
                f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}" stroke="#ccc" '
                f'fill="rgb{colour}" fill-opacity="{value:.3f}"><title>{html.escape(name)}, iteration {column}: '
                f"{value:.2f}</title></rect>"
            )
    bottom = len(rows) * CELL_HEIGHT
    drawn += [
        f'<text x="{LABEL_WIDTH + (index + 0.5) * CELL_WIDTH:.0f}" y="{bottom + 14}" text-anchor="middle">{column}'
        "</text>"
        for index, column in enumerate(columns)
        if index % max(1, len(columns) // 20) == 0
    ]
    width, height = LABEL_WIDTH + len(columns) * CELL_WIDTH, bottom + 20
    return (
        f'<figure class="chart"><figcaption>{html.escape(label)}</figcaption>'
        f'<svg width="{width}" height="{height}" role="img" aria-label="{html.escape(label)}">{"".join(drawn)}</svg>'
        "</figure>"
    )
