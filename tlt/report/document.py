"""The report on runs: one HTML file that needs no network."""

import html
from collections.abc import Mapping, Sequence

from tlt.report.chart import Line, legend, line_chart, shade_grid
from tlt.report.differences import differing
from tlt.report.mode_picture import MODE_COLOURS
from tlt.report.run import RunRecord
from tlt.report.speculation import (
    DECISIONS,
    draft_lengths,
    drafted_shares,
    drafter_row,
    drafters,
    position_rates,
    shares,
    spot_row,
)
from tlt.timeline.breakdown import PHASES
from tlt.timeline.page import PAGE, STYLE, gantt

CURVES = {
    "rl/reward": "reward",
    "eval/greedy_accuracy": "held-out accuracy, greedy",
    "eval/sampled_accuracy": "held-out accuracy, mean of samples",
    "spec/acceptance_length": "acceptance length (tokens per verification)",
    "rollout/duration_s": "rollout (seconds)",
    "rollout/tail_s": "longest wait of a rank in the tail (seconds)",
    "rollout/response_tokens_mean": "response length, mean (tokens)",
    "rollout/entropy": "token entropy of responses (nats)",
}
DASHES = ("", "6 3", "2 3", "8 3 2 3")
CHART_STYLE = """
.chart { display: inline-block; margin: 8px 16px 8px 0; vertical-align: top; }
.chart svg { overflow: visible; font-size: 11px; }
.chart polyline { fill: none; stroke-width: 1.5; }
figcaption { font-weight: bold; }
h2 { font-size: 16px; border-top: 2px solid #222; padding-top: 8px; margin-top: 28px; }
td.long { max-width: 360px; overflow-wrap: anywhere; text-align: left; }
"""
Cell = str | float | None


def document(runs: Sequence[RunRecord], *, title: str, last_iterations: int) -> str:
    """The whole file; the Gantt of each run shows its last iterations."""
    colours = dict(zip([run.name for run in runs], colour_cycle(len(runs)), strict=True))
    body = "\n".join(
        [
            legend(colours),
            heading("Runs"),
            summary_table(runs),
            heading("Curves"),
            curves(runs, colours),
            heading("Seconds of an iteration, mean over those after a start's first"),
            phase_table(runs),
            heading("Drafters"),
            drafter_table(runs),
            heading("Decisions of controller and router"),
            *(decisions(run, colours[run.name]) for run in runs),
            heading("What each rank did"),
            *(gantt_of(run, last_iterations) for run in runs),
            heading("Settings in which the runs differ" if len(runs) > 1 else "Settings"),
            settings_table(runs),
        ]
    )
    return PAGE.substitute(title=html.escape(title), style=STYLE + CHART_STYLE, body=body)


def colour_cycle(count: int) -> list[str]:
    return [MODE_COLOURS[index % len(MODE_COLOURS)] for index in range(count)]


def heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Numbers with four digits; a dash where there is nothing; long texts wrap."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = [f"<tr>{''.join(map(cell, row))}</tr>" for row in rows]
    return f"<table>\n<tr>{head}</tr>\n{''.join(line + chr(10) for line in lines)}</table>"


def cell(value: Cell) -> str:
    if value is None:
        return "<td>-</td>"
    if isinstance(value, str):
        return f'<td class="long">{html.escape(value)}</td>' if len(value) > 40 else f"<td>{html.escape(value)}</td>"
    return f"<td>{value:.0f}</td>" if value == int(value) else f"<td>{value:.4g}</td>"


def summary_table(runs: Sequence[RunRecord]) -> str:
    """A line a run; entropy and ceiling stand beside every figure of speed."""
    rows = []
    for run in runs:
        start: Mapping = run.starts[-1] if run.starts else {}
        config = start.get("config", {})
        accuracy = run.series("eval/greedy_accuracy")
        rows.append(
            [
                run.name, config.get("spec", {}).get("strategy"), config.get("spot", {}).get("training"),
                config.get("training", {}).get("seed"), start.get("commit"), len(run.traces),
                max((record["iteration"] for record in run.metrics), default=0), len(run.starts),
                accuracy[0][1] if accuracy else None, accuracy[-1][1] if accuracy else None,
                run.mean("rollout/entropy"), run.mean("rollout/max_prob"),
            ]
        )  # fmt: skip
    return table(
        [
            "run", "strategy", "spot training", "seed", "commit", "ranks", "iterations", "starts", "accuracy, first",
            "accuracy, last", "entropy, nats", "E[max p]",
        ],
        rows,
    )  # fmt: skip


def curves(runs: Sequence[RunRecord], colours: Mapping[str, str]) -> str:
    """All runs' in one chart each."""
    return "\n".join(
        line_chart(
            [Line(name=run.name, colour=colours[run.name], points=run.series(metric)) for run in runs], label=label
        )
        for metric, label in CURVES.items()
    )


def phase_table(runs: Sequence[RunRecord]) -> str:
    """A line a run; of a run that has only cold iterations those."""
    rows = []
    for run in runs:
        found = run.breakdowns()
        chosen = [found[each] for each in sorted(run.warm_iterations() or found)]
        if not chosen:
            rows.append([run.name, 0.0, *[None] * (len(PHASES) + 2)])
            continue
        means = [sum(each.seconds[phase] for each in chosen) / len(chosen) for phase in PHASES]
        fracs = [
            sum(values) / len(chosen)
            for values in ([each.idle_frac for each in chosen], [each.training_frac for each in chosen])
        ]
        rows.append([run.name, len(chosen), *means, *fracs])
    return table(["run", "iterations", *PHASES, "share of rank time idle", "training the drafter"], rows)


def drafter_table(runs: Sequence[RunRecord]) -> str:
    """A line for each drafter of each run, and what training on idle ranks did."""
    names = {
        "num_drafts": "verifications", "num_draft_tokens": "drafted", "num_accepted_tokens": "accepted",
        "acceptance_length": "acceptance length", "first_length": "first iteration", "last_length": "last iteration",
        "acceptance_rate": "acceptance rate", "acceptance_ceiling": "one-hot ceiling", "draft_s": "drafting, s",
    }  # fmt: skip
    rows: list[list[Cell]] = []
    for run in runs:
        for name in drafters(run):
            found = drafter_row(run, name)
            rates = " ".join(f"{rate:.2f}" for rate in position_rates(run, name))
            rows.append([run.name, name, *(found[each] for each in names), rates])
    if not rows:
        return "<p>Nothing was drafted.</p>"
    text = table(["run", "drafter", *names.values(), "rate by position"], rows)
    trained = {run.name: spot_row(run) for run in runs}
    found = {name: row for name, row in trained.items() if row}
    if not found:
        return text
    columns = {
        "steps": "optimizer steps in tails", "train_s": "rank seconds", "published": "heads published",
        "idle_rank_s_used_frac": "share of idle time used", "gain": "gain, tokens a draft",
    }  # fmt: skip
    return text + table(
        ["run", *columns.values()], [[name, *(row.get(each) for each in columns)] for name, row in found.items()]
    )


def decisions(run: RunRecord, colour: str) -> str:
    """Charts of one run; a drafter has a dash of its own."""
    names = drafters(run)
    if not names:
        return f"<h3>{html.escape(run.name)}</h3><p>No speculation.</p>"
    dashes = {name: DASHES[index % len(DASHES)] for index, name in enumerate(names)}
    by_drafter = [
        line_chart(
            [Line(name=name, colour=colour, points=points, dash=dashes[name]) for name, points in found.items()],
            label=label,
        )
        for found, label in (
            (shares(run), "share of drafts"),
            (draft_lengths(run), "draft tokens a verification"),
        )
    ]
    whole = [
        line_chart([Line(name=run.name, colour=colour, points=run.series(metric))], label=label)
        for metric, label in DECISIONS.items()
    ]
    grid = shade_grid(drafted_shares(run), label="share of requests drafted for, by running requests and iteration")
    key = ", ".join(f"{name} {'dashed ' + dash if dash else 'solid'}" for name, dash in dashes.items())
    return "\n".join([f"<h3>{html.escape(run.name)}: {html.escape(key)}</h3>", grid, *by_drafter, *whole])


def gantt_of(run: RunRecord, last_iterations: int) -> str:
    """Of the last iterations."""
    chosen = run.complete_iterations()[-last_iterations:]
    if not chosen:
        return f"<h3>{html.escape(run.name)}</h3><p>No iteration is complete.</p>"
    return f"<h3>{html.escape(run.name)}, iterations {chosen[0]} to {chosen[-1]}</h3>{gantt(run.timeline(chosen))}"


def settings_table(runs: Sequence[RunRecord]) -> str:
    """Of run.json's newest start."""
    found = differing(runs)
    if not found:
        return "<p>None.</p>"
    return table(["setting", *(run.name for run in runs)], [[name, *values] for name, values in found.items()])
