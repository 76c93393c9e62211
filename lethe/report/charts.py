"""The charts of a report. Each is one Altair definition, which gives the interactive chart of the page and the SVG and PNG.

Colours are Okabe and Ito's, which people with any kind of colour vision tell apart, and each series has its own shape
or dash too. Bands and bars are 95 % intervals. Reference lines (chance, baseline) are named in the right margin, where
no data can lie under their names.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from lethe.errors import printable
from lethe.results import regimes
from lethe.results.recovery import Point, Worst, worst_case
from lethe.results.study import Series, Study, Target, attack_tasks, tasks_of, value_of
from lethe.runs.run import Run

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8B6BB1"]
SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left"]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 4], [4, 1], [1, 3], [12, 3, 1, 3]]
REFERENCE = "#808080"
MAX_POINTS, MAX_MARKS, MAX_BARS = 300, 1000, 60
CHECKPOINTS = "checkpoints.svg"
MAX_MODELS, MAX_ATTACKS, MAX_CHARTS = 16, 12, 6
"""What one can still read: more models and attacks than these are in the tables alone."""
LONGEST_LABEL = 80
WIDTH, HEIGHT = 740, 300
ACCURACY: dict[str, Any] = {"labelExpr": "format(100 * datum.value, '~g') + ' %'", "tickCount": 6}
STEPS: dict[str, Any] = {"format": "d", "tickMinStep": 1, "tickCount": 10}
SYMBOLS = alt.Legend(symbolOpacity=1)
KNOWN = ["#7F7F7F", "#A3A3A3"]
Chart = alt.LayerChart | alt.VConcatChart | alt.ConcatChart | alt.Chart


def all_charts(study: Study) -> dict[str, tuple[str, Chart]]:
    """Caption and chart by file name, as far as there is data."""
    charts: dict[str, tuple[str, Chart]] = {}
    for number, run in enumerate(study.of_kind("checkpoints")[:MAX_CHARTS]):
        if any(row["evals"] for row in run.record.get("checkpoints") or []):
            caption = "Accuracy of each pretraining checkpoint. The source is the latest that is still at chance on the topic."
            charts[_name("checkpoints", number)] = (caption, checkpoint_chart(run))
    for number, target in enumerate(study.targets[:MAX_CHARTS]):
        if losses := _loss_points(target.runs):
            shown = f" The first {len(PALETTE)} of {len(target.runs)} runs." if len(target.runs) > len(PALETTE) else ""
            caption = "Token means of the loss terms at each optimizer update, without their coefficients." + shown
            charts[_name("losses", number)] = (caption, losses_chart(losses))
        if chart := tradeoff_chart(target):
            caption = "Forgotten against retained. The best place is the upper left: forget at chance, retain kept."
            charts[_name("forget-retain", number)] = (caption, chart)
    return charts | attack_charts(study)


def checkpoint_chart(run: Run) -> alt.LayerChart:
    """Accuracy over pretraining steps, a line a task with its interval; chance; the latest ignorant checkpoint."""
    rows = [row for row in run.record["checkpoints"] if row["evals"]]
    tasks = [task for task in tasks_of(row["evals"] for row in rows) if "acc" in rows[0]["evals"].get(task, {})]
    points = [_point(task, row["step"], row["evals"][task]) for row in rows for task in tasks if task in row["evals"]]
    references = {f"chance {_per_cent(c)}": c for c in _chances(points)}
    layers = _curves(points, tasks, "Task", "Pretraining step", references)
    latest = [row for row in rows if row.get("ref") == run.record.get("latest_ignorant")] if rows[0].get("ref") else []
    if latest:
        layers += _marked_step(latest[0]["step"], f"latest ignorant: {latest[0]['name']}", rows[-1]["step"])
    return _layered(layers, "Accuracy over pretraining")


def losses_chart(points: list[dict[str, Any]]) -> alt.VConcatChart:
    """Each loss term over the updates, one panel a term (their sizes differ), a line a run."""
    runs = list(dict.fromkeys(point["series"] for point in points))
    panels = []
    for term in dict.fromkeys(point["term"] for point in points):
        those = [point for point in points if point["term"] == term]
        lines = alt.Chart(_data(those), width=WIDTH, height=HEIGHT // 2).mark_line(strokeWidth=1.8)
        panels.append(
            lines.encode(
                x=alt.X("step:Q", title="Optimizer update", axis=alt.Axis(**STEPS)),
                y=alt.Y("value:Q", title=term, axis=alt.Axis(tickCount=5)),
                color=_colour(runs, "Run", alt.Undefined),
                strokeDash=_dash(runs, "Run"),
                tooltip=[_tip("series", "Run"), _tip("step", "Update", "d"), _tip("value", term, ".4f")],
            )
        )
    return _config(alt.vconcat(*panels, spacing=22, title=_title("Losses during unlearning")))


def tradeoff_chart(target: Target) -> alt.LayerChart | None:
    """Forget accuracy (across) against retain accuracy (up) of baseline, source and runs; None without such tasks."""
    tasks = tasks_of(row.evals for row in target.rows)
    forget, retain = regimes.forget_task(tasks), regimes.retain_task(tasks)
    if forget is None or retain is None or not target.runs:
        return None
    labels = _labels(target.runs)
    many = len(target.runs) > len(PALETTE) - 2
    points = []
    for row in target.rows:
        if forget not in row.evals or retain not in row.evals:
            continue
        run = row.origin[forget] if row.origin[forget].record["kind"] == "unlearn" else None
        name = row.label if run is None else labels[run.id]
        f, r = row.evals[forget], row.evals[retain]
        point = {"series": "Runs" if many and run else name, "label": name, "known": run is None}
        point |= {"forget": f["acc"], "retain": r["acc"]}
        ends = {"f_low": f["low"], "f_high": f["high"], "r_low": r["low"], "r_high": r["high"]}
        points.append(point | ends | {"f_chance": f["chance"], "r_chance": r["chance"]})
    if not points:
        return None
    known = len([point for point in points if point["known"]])
    points = points[:known] + points[known:][-MAX_MARKS:]
    return _layered(_scatter(points, forget, retain, known), "Forget against retain")


def attack_charts(study: Study) -> dict[str, tuple[str, Chart]]:
    """Curves and, where there are several attacks, a small chart for each of them and the map of models by attacks."""
    forget, general = attack_tasks(study.attacks)
    drawn, left_out = _drawn(study)
    several = len({series.settings for series in study.series}) > 1
    over = " Bands: question sampling and, where an attack was run with several seeds, seeds." + left_out
    caption = "Attacks: how fast the knowledge comes back, beside models that never had it." + over
    charts: dict[str, tuple[str, Chart]] = {}
    if not several and (curves := tamper_chart(drawn, [task for task in (forget, general) if task])):
        charts["tamper"] = (caption, curves)
    for name, task in (("tamper", forget), ("tamper-general", general)) if several else ():
        if task and (panels := tamper_panels(drawn, task)):
            charts[name] = (caption if task == forget else f"The same attacks: what they cost in {task}.{over}", panels)
    if several and forget and (cells := worst_cells(study, drawn, forget, general)):
        bound = f"at most {100 * study.general_bound:g} points of {general or 'general accuracy'}"
        caption = f"The highest {forget} that each attack reaches where it has cost {bound}. "
        caption += "≥: not measured to its end, so it may reach more; grey: not measured." + left_out
        charts["worst-case"] = (caption, heat_map(cells))
    return charts


def _drawn(study: Study) -> tuple[list[Series], str]:
    """The series that charts show, and a sentence about those that they do not: controls, then the models and the attacks that
    most runs are about."""
    models = Counter(series.model for series in study.series)
    models.update({series.model: len(study.series) for series in study.series if series.control})
    attacks = Counter(series.settings for series in study.series)
    some = {model for model, _ in models.most_common(MAX_MODELS)}
    usual = {attack for attack, _ in attacks.most_common(MAX_ATTACKS)}
    drawn = [series for series in study.series if series.model in some and series.settings in usual]
    kinds = ((some, models, "models"), (usual, attacks, "attacks"))
    fewer = [f"{len(shown)} of {len(every)} {what}" for shown, every, what in kinds if len(shown) < len(every)]
    return drawn, f" Shown: {' and '.join(fewer)}; the tables have all." if fewer else ""


def tamper_chart(series: list[Series], tasks: list[str]) -> alt.VConcatChart | None:
    """One attack: accuracy over its course, a line an attacked model; the forget task above, the general task below."""
    panels = []
    for task in tasks:
        if panel := _attack_panel(series, task, series, HEIGHT * 3 // 4, WIDTH, named=True):
            panels.append(panel.properties(title=alt.TitleParams(task, frame="group")))
    return _config(alt.vconcat(*panels, spacing=22, title=_title("Tampering attack"))) if panels else None


def tamper_panels(series: list[Series], task: str) -> alt.ConcatChart | None:
    """Several attacks: a small chart for each, a line an attacked model, the same colour everywhere; controls are dashed."""
    panels = []
    for settings in dict.fromkeys(each.settings for each in series):
        own = [each for each in series if each.settings == settings]
        if panel := _attack_panel(series, task, own, HEIGHT // 2, (WIDTH - 2 * 50) // 3, named=False):
            panels.append(panel.properties(title=alt.TitleParams(own[0].attack, frame="group")))
    if not panels:
        return None
    title = alt.TitleParams(
        f"Attacks: {task}",
        anchor="start",
        fontSize=15,
        offset=14,
        subtitle="dotted: chance; long dashes: before unlearning; short dashes: controls",
    )
    return _config(alt.concat(*panels, columns=3, spacing=18, title=title))


def _attack_panel(
    every: list[Series], task: str, own: list[Series], height: int, width: int, named: bool
) -> alt.LayerChart | None:
    """Curves of one attack on several models, on the scale of `every`; `named`: reference lines carry their names."""
    names = _model_names(every)
    points = [_reached(names[series.model], series, point) for series in own for point in series.points_of(task)]
    if not points:
        return None
    chances = {r["chance"] for series in own for a in series.attacks for _, r in a.points(task) if "chance" in r}
    before = {value_of(s.baseline.evals[task]) for s in own if s.baseline and task in s.baseline.evals}
    references = {f"chance {_per_cent(c)}": c for c in sorted(chances)}
    references |= {f"baseline {_per_cent(b)}": b for b in sorted(before)}
    scale = _accuracies(0, [*references.values(), *(point.high for each in every for point in each.points_of(task))], parts=5)
    untrained = any("place" in point for point in points)
    if untrained:
        x: Any = alt.X("place:O", title="Strength", sort=None, axis=alt.Axis(labelAngle=0))
    else:
        few: dict[str, Any] = {} if named else {"tickCount": 4}
        x = alt.X("step:Q", title="Updates of the attack", axis=alt.Axis(**(STEPS | few), grid=False))
    layers = _lines(points, list(dict.fromkeys(names.values())), "Attacked model", x, scale, named)
    panel: Any = alt.layer(*_reference(references, scale, named), *layers)
    return panel.properties(width=width, height=height)


def _reached(name: str, series: Series, point: Point) -> dict[str, Any]:
    """A point of a curve as the charts take it; of an attack without training with its strength as text."""
    facts = {"series": name, "step": point.step, "value": point.value, "low": point.low, "high": point.high}
    facts |= {"kind": "control" if series.control else "attacked", "tokens": point.tokens}
    return facts if point.strength is None else facts | {"place": f"{point.strength:g}" if point.strength else "none"}


def worst_cells(study: Study, drawn: list[Series], forget: str, general: str | None) -> list[dict[str, Any]]:
    """The worst case of each attack on each model that is drawn, and over all attacks; as far as measured."""
    names = _model_names(drawn)
    own = {(series.model, series.settings): series for series in drawn}
    attacks = dict.fromkeys((series.settings, series.attack) for series in drawn)
    cells = []
    for model in names:
        worst = study.worst_cases[model][1]
        for settings, attack in attacks:
            series = own.get((model, settings))
            trials = study.trials(series, forget, general) if series else []
            known = any(len(trial.forget) > 1 and trial.general for trial in trials)
            found = worst_case(trials, study.general_bound) if known else None
            cells.append(_cell(names[model], attack, found))
        cells.append(_cell(names[model], "worst case", worst))
    return cells


def _cell(model: str, attack: str, worst: Worst | None) -> dict[str, Any]:
    if worst is None:
        return {"model": model, "attack": attack, "text": "–", "value": None, "why": "not measured"}
    least = "≥ " if worst.not_measured else ""
    why = "; ".join(f"{name}: {reason}" for name, reason in worst.not_measured.items())
    text = f"{least}{100 * worst.point.value:.0f}"
    return {"model": model, "attack": attack, "text": text, "value": worst.point.value, "why": why or worst.point.place}


def heat_map(cells: list[dict[str, Any]]) -> alt.LayerChart:
    """Models (down) by attacks (across), with the numbers in per cent; the last column is the worst case."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    attacks = list(dict.fromkeys(cell["attack"] for cell in cells))
    values = [cell["value"] for cell in cells if cell["value"] is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    bare: dict[str, Any] = {"ticks": False, "domain": False}
    base = alt.Chart(_data(cells)).encode(
        x=alt.X("attack:N", sort=attacks, title=None, axis=alt.Axis(orient="top", labelAngle=-40, **bare)),
        y=alt.Y("model:N", sort=models, title=None, axis=alt.Axis(labelLimit=320, **bare)),
        tooltip=[_tip("model", "Model"), _tip("attack", "Attack"), _tip("value", "Highest", ".2%"), _tip("why", "At")],
    )
    colour = alt.Color("value:Q", scale=alt.Scale(scheme="blues", domain=[low, high]), legend=None)
    boxes: dict[str, Any] = {"stroke": "white", "strokeWidth": 1.5}
    ink = alt.condition(f"datum.value > {(low + 2 * high) / 3}", alt.value("white"), alt.value("#222"))
    number = base.encode(text="text:N", color=ink)
    layers = [
        base.transform_filter("datum.value === null").mark_rect(color="#e4e4e4", **boxes),
        base.transform_filter("datum.value !== null").mark_rect(**boxes).encode(color=colour),
        number.transform_filter("datum.attack !== 'worst case'").mark_text(fontSize=12),
        number.transform_filter("datum.attack === 'worst case'").mark_text(fontSize=12, fontWeight="bold"),
    ]
    size = {"width": max(220, 48 * len(attacks)), "height": 34 * len(models)}
    return _config(alt.layer(*layers).properties(title=_title("Models by attacks: forget accuracy, %"), **size))


def _curves(
    points: list[dict[str, Any]], series: list[str], title: str, x_title: str, references: dict[str, float]
) -> list[alt.Chart]:
    """Band, line and points of each series, and the reference lines."""
    scale = _accuracies(0, [*references.values(), *(point["high"] for point in points)], parts=5)
    x = alt.X("step:Q", title=x_title, axis=alt.Axis(**STEPS, grid=False))
    return [*_reference(references, scale), *_lines(points, series, title, x, scale)]


def _lines(
    points: list[dict[str, Any]], series: list[str], title: str, x: alt.X, scale: alt.Scale, large: bool = True
) -> list[alt.Chart]:
    """Band, line and points of each series; lines of `kind` control are dashed."""
    base = alt.Chart(_data(points))
    y = alt.Y("value:Q", title="Accuracy", axis=alt.Axis(**ACCURACY), scale=scale)
    colour = _colour(series, title)
    band = base.mark_area(opacity=0.13).encode(x=x, y=alt.Y("low:Q", title="Accuracy", scale=scale), y2="high:Q", color=colour)
    kinds = alt.Scale(domain=["attacked", "control"], range=[[1, 0], [4, 3]])
    dash = {"strokeDash": alt.StrokeDash("kind:N", scale=kinds, legend=None)} if "kind" in points[0] else {}
    line = base.mark_line(strokeWidth=2 if large else 1.6).encode(x=x, y=y, color=colour, **dash)
    dots = base.mark_point(filled=True, size=46 if large else 24, opacity=1).encode(
        x=x,
        y=y,
        color=colour,
        shape=_shape(series, title),
        tooltip=[
            _tip("series", title),
            _tip("step", "Step", "d"),
            _tip("value", "Accuracy", ".2%"),
            _tip("low", "95 % from", ".2%"),
            _tip("high", "to", ".2%"),
        ],
    )
    return [band, line, dots]


def _scatter(points: list[dict[str, Any]], forget: str, retain: str, known: int) -> list[alt.Chart]:
    """Interval bars both ways, points, and the two chance lines. The first `known` series are baseline and sources, in grey."""
    series = list(dict.fromkeys(point["series"] for point in points))
    colours = [*(KNOWN[min(i, 1)] for i in range(known)), *PALETTE]
    base = alt.Chart(_data(points))
    across, up = (_around(points, letter) for letter in ("f", "r"))
    x_title, y_title = f"Forget accuracy ({forget})", f"Retain accuracy ({retain})"
    x = alt.X("forget:Q", title=x_title, axis=alt.Axis(**ACCURACY), scale=across)
    y = alt.Y("retain:Q", title=y_title, axis=alt.Axis(**ACCURACY), scale=up)
    x_low, y_low = alt.X("f_low:Q", title=x_title, scale=across), alt.Y("r_low:Q", title=y_title, scale=up)
    colour = alt.Color("series:N", title="Model", scale=_scale(series, colours), legend=SYMBOLS)
    shape = _shape(series, "Model")
    bar: dict[str, Any] = {"strokeWidth": 1.3, "opacity": 0.7}
    tips = [_tip("label", "Model"), _tip("forget", forget, ".2%"), _tip("retain", retain, ".2%")]
    f_chance, r_chance = points[0]["f_chance"], points[0]["r_chance"]
    upright = alt.Chart(_data([{"x": f_chance, "text": f"chance {_per_cent(f_chance)}"}]))
    upright_x = alt.X("x:Q", scale=across, title=x_title)
    bars = [
        base.mark_rule(**bar).encode(x=x_low, x2="f_high:Q", y=y, color=colour),
        base.mark_rule(**bar).encode(x=x, y=y_low, y2="r_high:Q", color=colour),
    ]
    return [
        upright.mark_rule(color=REFERENCE, strokeDash=[2, 3]).encode(x=upright_x),
        upright.mark_text(color=REFERENCE, baseline="bottom", dy=-4, fontSize=11).encode(
            x=upright_x, y=alt.value(0), text="text:N"
        ),
        *_reference({f"chance {_per_cent(r_chance)}": r_chance}, up),
        *([] if len(points) > MAX_BARS else bars),
        base.mark_point(filled=True, size=90 if len(points) <= MAX_BARS else 30, opacity=1).encode(
            x=x, y=y, color=colour, shape=shape, tooltip=tips
        ),
    ]


def _around(points: list[dict[str, Any]], letter: str) -> alt.Scale:
    """A scale that holds chance and every interval, from one tenth to another."""
    lows = [point[f"{letter}_{end}"] for point in points for end in ("low", "chance")]
    bottom = max(0.0, math.floor(10 * min(lows) - 0.1) / 10)
    return _accuracies(bottom, [point[f"{letter}_high"] for point in points], parts=10)


def _accuracies(bottom: float, values: list[float], parts: int) -> alt.Scale:
    """A scale of accuracies from `bottom` to a whole number of `parts` of 1 above all values, at most 1."""
    return alt.Scale(domain=[bottom, min(1.0, math.ceil(parts * max(values) + 0.1) / parts)])


def _reference(lines: dict[str, float], scale: alt.Scale, named: bool = True) -> list[alt.Chart]:
    """Horizontal reference lines, named in the right margin unless told; names of lines that lie close are moved apart."""
    ordered = sorted(lines.items(), key=lambda item: item[1])
    span = scale["domain"][1] - scale["domain"][0]
    layers = []
    for i, (text, value) in enumerate(ordered):
        close = [j for j, (_, other) in enumerate(ordered) if j != i and abs(other - value) < 0.06 * span]
        shift = 0 if not close else 7 if i < close[0] else -7
        base = alt.Chart(_data([{"y": value, "text": text}]))
        y = alt.Y("y:Q", scale=scale)
        dash = [2, 3] if text.startswith("chance") else [7, 4]
        layers.append(base.mark_rule(color=REFERENCE, strokeDash=dash, strokeWidth=1.2).encode(y=y))
        if not named:
            continue
        layers.append(
            base.mark_text(color=REFERENCE, align="left", baseline="middle", dx=6, dy=shift, fontSize=11).encode(
                y=y, x=alt.value("width"), text="text:N"
            )
        )
    return layers


def _marked_step(step: int, text: str, last: int) -> list[alt.Chart]:
    """An upright line at a step, named at the top on the side with more room."""
    base = alt.Chart(_data([{"x": step, "text": text}]))
    left = step > last / 2
    rule = base.mark_rule(color=REFERENCE, strokeWidth=1.2).encode(x="x:Q")
    name = base.mark_text(
        color=REFERENCE, align="right" if left else "left", baseline="top", dx=-6 if left else 6, dy=4, fontSize=11
    ).encode(x="x:Q", y=alt.value(0), text="text:N")
    return [rule, name]


def _loss_points(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The logged loss terms of runs, at most 300 updates of each run (evenly spaced); what is not finite is left out."""
    labels = _labels(runs[: len(PALETTE)])
    points = []
    for run in runs[: len(PALETTE)]:
        rows = run.rows("metrics.jsonl")
        stride = math.ceil(len(rows) / MAX_POINTS) or 1
        for row in rows[::stride]:
            terms = {key: value for key, value in row.items() if key.endswith("_loss") and isinstance(value, float | int)}
            points += [
                {"series": labels[run.id], "step": row["step"], "term": term, "value": value}
                for term, value in terms.items()
                if math.isfinite(value)
            ]
    return points


def _labels(runs: Iterable[Run]) -> dict[str, str]:
    """A run's name by its id; with the id where runs share a name."""
    listed = list(runs)
    times = Counter(run.record["name"] for run in listed)
    names = {run.id: run.record["name"] + ("" if times[run.record["name"]] == 1 else f" ({run.id})") for run in listed}
    return {run_id: printable(name, LONGEST_LABEL) for run_id, name in names.items()}


def _model_names(series: list[Series]) -> dict[str, str]:
    """A short name for each attacked model: what kind of control it is, or its run's name, where that tells it apart."""
    short = {each.model: each.control or each.model.rsplit(" (", 1)[0] for each in series}
    times = Counter(short.values())
    return {model: printable(name if times[name] == 1 else model, LONGEST_LABEL) for model, name in short.items()}


def _data(points: list[dict[str, Any]]) -> alt.InlineData:
    """Data of a chart, which holds them once for all of its layers. Altair copies a list with every layer, but not a tuple."""
    return alt.InlineData(values=tuple(points))


def _point(series: str, step: int, result: dict[str, Any]) -> dict[str, Any]:
    return {"series": series, "step": step, "value": result["acc"]} | {key: result[key] for key in ("low", "high", "chance")}


def _chances(points: list[dict[str, Any]]) -> list[float]:
    return sorted({round(point["chance"], 6) for point in points})


def _per_cent(share: float) -> str:
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def _colour(series: list[str], title: str, legend: Any = SYMBOLS) -> alt.Color:
    return alt.Color("series:N", title=title, scale=_scale(series, PALETTE), legend=legend)


def _dash(series: list[str], title: str) -> alt.StrokeDash:
    return alt.StrokeDash("series:N", title=title, scale=_scale(series, DASHES))


def _shape(series: list[str], title: str) -> alt.Shape:
    """Shapes turn by one when colours start again, so that no two of 64 series look the same."""
    turned = [SHAPES[(i + i // len(SHAPES)) % len(SHAPES)] for i in range(len(series))]
    return alt.Shape("series:N", title=title, scale=_scale(series, turned))


def _scale(series: list[str], values: list[Any]) -> alt.Scale:
    return alt.Scale(domain=series, range=[values[i % len(values)] for i in range(len(series))])


def _tip(field: str, title: str, number: str | None = None) -> alt.Tooltip:
    if number is None:
        return alt.Tooltip(f"{field}:N", title=title)
    return alt.Tooltip(f"{field}:Q", title=title, format=number)


def _layered(layers: list[alt.Chart], title: str) -> alt.LayerChart:
    return _config(alt.layer(*layers).properties(title=_title(title), width=WIDTH, height=HEIGHT))


def _title(text: str) -> alt.TitleParams:
    return alt.TitleParams(text, anchor="start", fontSize=15, offset=14)


def _config(chart: Any) -> Any:
    """Type, legend and grid of every chart."""
    font = "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, 'DejaVu Sans', sans-serif"
    return (
        chart.configure(font=font, background="white", padding={"left": 8, "right": 12, "top": 8, "bottom": 8})
        .configure_axis(
            labelFontSize=11, titleFontSize=12, titleFontWeight="normal", titlePadding=10, labelFlush=False, gridColor="#e6e6e6"
        )
        .configure_legend(orient="bottom", labelFontSize=11, titleFontSize=11, labelLimit=360, columns=4, offset=16)
        .configure_title(fontSize=13, anchor="start", fontWeight="bold")
        .configure_view(stroke=None)
    )


def _name(kind: str, number: int) -> str:
    return kind if number == 0 else f"{kind}-{number + 1}"


def draw_checkpoints(run: Run) -> None:
    """The chart of a checkpoint sweep, drawn into the run's folder and recorded as its artifact."""
    import vl_convert

    (run.path / CHECKPOINTS).write_bytes(vl_convert.vegalite_to_svg(checkpoint_chart(run).to_dict()).encode())
    run.update(artifacts={"chart": {"path": CHECKPOINTS}})
