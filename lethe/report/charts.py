"""The charts of a report, each one Altair definition, which gives the interactive chart of the page, its SVG and its PNG.

Study -> all_charts(): checkpoint sweeps, losses, forget against retain; attack_charts.py: attacks
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt

from lethe.report import chart_style as style
from lethe.report.attack_charts import attack_charts
from lethe.report.chart_style import Points
from lethe.results import regimes
from lethe.results.comparable import tasks_of
from lethe.results.study import Study
from lethe.results.targets import Target
from lethe.runs.run import Run

DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 4], [4, 1], [1, 3], [12, 3, 1, 3]]
KNOWN = ["#7F7F7F", "#A3A3A3"]
"""The baseline's colour and that of sources."""
MAX_POINTS, MAX_MARKS, MAX_BARS, MAX_CHARTS = 300, 1000, 60, 6
CHECKPOINTS = "checkpoints.svg"


def all_charts(study: Study) -> dict[str, tuple[str, Any]]:
    """Caption and chart by file name, as far as there is data."""
    charts: dict[str, tuple[str, Any]] = {}
    for number, run in enumerate(study.of_kind("checkpoints")[:MAX_CHARTS]):
        if any(row["evals"] for row in run.record.get("checkpoints") or []):
            caption = "Accuracy of each pretraining checkpoint. The source is the latest that is still at chance on the topic."
            charts[_name("checkpoints", number)] = (caption, checkpoint_chart(run))
    for number, target in enumerate(study.targets[:MAX_CHARTS]):
        if losses := _loss_points(target.runs):
            count, most = len(target.runs), len(style.PALETTE)
            shown = f" The first {most} of {count} runs." if count > most else ""
            caption = "Mean of each loss over the tokens of an optimizer update, without its coefficient." + shown
            charts[_name("losses", number)] = (caption, losses_chart(losses))
        if chart := tradeoff_chart(target):
            caption = "Forgotten against retained. The best place is the upper left: forget at chance, retain unchanged."
            charts[_name("forget-retain", number)] = (caption, chart)
    return charts | attack_charts(study)


def _name(kind: str, number: int) -> str:
    return kind if number == 0 else f"{kind}-{number + 1}"


def draw_checkpoints(run: Run) -> None:
    """Draw a checkpoint sweep into the run's folder, and record the chart as its artifact."""
    import vl_convert

    (run.path / CHECKPOINTS).write_bytes(vl_convert.vegalite_to_svg(checkpoint_chart(run).to_dict()).encode())
    run.update(artifacts={"chart": {"path": CHECKPOINTS}})


def checkpoint_chart(run: Run) -> alt.LayerChart:
    """Accuracy over pretraining steps, a line for each task; chance; the latest ignorant checkpoint."""
    rows = [row for row in run.record["checkpoints"] if row["evals"]]
    tasks = [task for task in tasks_of(row["evals"] for row in rows) if "acc" in rows[0]["evals"].get(task, {})]
    points = []
    for row in rows:
        for task in tasks:
            if found := row["evals"].get(task):
                interval = {key: found[key] for key in ("low", "high", "chance")}
                points.append({"series": task, "step": row["step"], "value": found["acc"], **interval})
    chances = {f"chance {style.per_cent(c)}": c for c in sorted({round(point["chance"], 6) for point in points})}
    scale = style.accuracies(0, [*chances.values(), *(point["high"] for point in points)], parts=5)
    x = alt.X("step:Q", title="Pretraining step", axis=alt.Axis(**style.STEPS, grid=False))
    layers = [*style.references(chances, scale), *style.curves(points, tasks, "Task", x, scale)]
    latest = [row for row in rows if "ref" in row and row["ref"] == run.record.get("latest_ignorant")]
    marks = {f"latest ignorant: {row['name']}": row["step"] for row in latest}
    return style.layered([*layers, *style.references(marks, axis="x")], "Accuracy over pretraining")


def losses_chart(points: Points) -> alt.ConcatChart:
    """Each loss over the updates: a panel for each loss, since their sizes differ, and a line for each run."""
    runs = list(dict.fromkeys(point["series"] for point in points))
    panels = []
    for name in dict.fromkeys(point["loss"] for point in points):
        own = [point for point in points if point["loss"] == name]
        lines = alt.Chart(style.data(own), width=style.WIDTH, height=style.HEIGHT // 2).mark_line(strokeWidth=1.8)
        panels.append(
            lines.encode(
                x=alt.X("step:Q", title="Optimizer update", axis=alt.Axis(**style.STEPS)),
                y=alt.Y("value:Q", title=name, axis=alt.Axis(tickCount=5)),
                color=style.colour(runs, "Run", alt.Undefined),
                strokeDash=alt.StrokeDash("series:N", title="Run", scale=style.cycled(runs, DASHES)),
                tooltip=style.tips(series="Run", step=("Update", "d"), value=(name, ".4f")),
            )
        )
    return style.joined(panels, 1, "Losses during unlearning")


def _loss_points(runs: Sequence[Run]) -> Points:
    """The logged losses of runs, each at up to 300 evenly spaced updates, without values that are not finite."""
    names = style.labels(runs[: len(style.PALETTE)])
    points = []
    for run in runs[: len(style.PALETTE)]:
        rows = run.rows("metrics.jsonl")
        stride = math.ceil(len(rows) / MAX_POINTS) or 1
        for row in rows[::stride]:
            for key, value in row.items():
                if key.endswith("_loss") and isinstance(value, float | int) and math.isfinite(value):
                    points.append({"series": names[run.id], "step": row["step"], "loss": key, "value": value})
    return points


def tradeoff_chart(target: Target) -> alt.LayerChart | None:
    """Forget accuracy (across) against retain accuracy (up) of baseline, sources and runs; None without such tasks."""
    tasks = tasks_of(row.evals for row in target.rows)
    forget, retain = regimes.forget_task(tasks), regimes.retain_task(tasks)
    if forget is None or retain is None or not target.runs:
        return None
    names = style.labels(target.runs)
    many = len(target.runs) > len(style.PALETTE) - 2
    known: Points = []
    made: Points = []
    for row in target.rows:
        if forget not in row.evals or retain not in row.evals:
            continue
        run = row.runs[0] if row.runs[0].record["kind"] == "unlearn" else None
        label = names[run.id] if run else row.label
        point = {"series": "Runs" if many and run else label, "label": label}
        for axis, task in (("forget", forget), ("retain", retain)):
            found = row.evals[task]
            point |= {axis: found["acc"], **{f"{axis}_{key}": found[key] for key in ("low", "high", "chance")}}
        (made if run else known).append(point)
    points = known + made[-MAX_MARKS:]
    return style.layered(_scatter(points, forget, retain, len(known)), "Forget against retain") if points else None


def _scatter(points: Points, forget: str, retain: str, known: int) -> list[alt.Chart]:
    """Points, their intervals both ways, and the two chance lines. The first `known` series are grey."""
    series = list(dict.fromkeys(point["series"] for point in points))
    colours = [*(KNOWN[min(i, 1)] for i in range(known)), *style.PALETTE]
    shade = alt.Color("series:N", title="Model", scale=style.cycled(series, colours), legend=style.LEGEND)
    few = len(points) <= MAX_BARS
    base = alt.Chart(style.data(points))
    scales = {axis: _around(points, axis) for axis in ("forget", "retain")}
    x, x_low = (alt.X(f, **_axis("Forget", forget), scale=scales["forget"]) for f in ("forget:Q", "forget_low:Q"))
    y, y_low = (alt.Y(f, **_axis("Retain", retain), scale=scales["retain"]) for f in ("retain:Q", "retain_low:Q"))
    bar = base.mark_rule(strokeWidth=1.3, opacity=0.7)
    bars = [
        bar.encode(x=x_low, x2="forget_high:Q", y=y, color=shade),
        bar.encode(x=x, y=y_low, y2="retain_high:Q", color=shade),
    ]
    dots = base.mark_point(filled=True, size=90 if few else 30, opacity=1)
    tooltip = style.tips(label="Model", forget=(forget, ".2%"), retain=(retain, ".2%"))
    chances = {axis: points[0][f"{axis}_chance"] for axis in scales}
    lines = {axis: {f"chance {style.per_cent(chance)}": chance} for axis, chance in chances.items()}
    return [
        *style.references(lines["forget"], scales["forget"], axis="x"),
        *style.references(lines["retain"], scales["retain"]),
        *(bars if few else []),
        dots.encode(x=x, y=y, color=shade, shape=style.shape(series, "Model"), tooltip=tooltip),
    ]


def _axis(what: str, task: str) -> dict[str, Any]:
    return {"title": f"{what} accuracy ({task})", "axis": alt.Axis(**style.ACCURACY)}


def _around(points: Points, axis: str) -> alt.Scale:
    """A scale in tenths around chance and all intervals."""
    lows = [point[f"{axis}_{end}"] for point in points for end in ("low", "chance")]
    bottom = max(0.0, math.floor(10 * min(lows) - 0.1) / 10)
    return style.accuracies(bottom, [point[f"{axis}_high"] for point in points], parts=10)
