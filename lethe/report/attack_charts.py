"""The charts of attacks: accuracy along each attack, and a map of the worst case of models (down) by attacks (across)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import altair as alt

from lethe.report import chart_style as style
from lethe.report.chart_style import Points
from lethe.results.attacks import Series, attack_tasks
from lethe.results.comparable import grouped
from lethe.results.recovery import Point, Worst, worst_case
from lethe.results.regimes import number
from lethe.results.study import Study

MAX_MODELS, MAX_ATTACKS = 16, 12
"""Charts with more models or attacks cannot be read; these are in the tables alone."""
LINES = "dotted: chance; long dashes: before unlearning; short dashes: controls"


def attack_charts(study: Study) -> dict[str, tuple[str, Any]]:
    """Caption and chart by name: one attack on each task; of several attacks a panel for each of them, and the map."""
    forget, general = attack_tasks(study.attacks)
    drawn, left_out = _drawn(study)
    one = not study.has_several_attacks
    bands = " Bands: the sampling of questions and, with several seeds, the spread of seeds." + left_out
    charts: dict[str, tuple[str, Any]] = {}
    attacks = grouped(drawn, lambda series: series.settings).values()
    shown = {"tamper": [forget, general]} if one else {"tamper": [forget], "tamper-general": [general]}
    for name, tasks in shown.items():
        panels = [panel for task in tasks if task for own in attacks if (panel := _panel(drawn, task, own, large=one))]
        if panels:
            caption = "Attacks: how fast the knowledge comes back, beside models that never had it."
            caption = caption if name == "tamper" else f"The same attacks: their cost in {general}."
            title = {"title": "Tampering attack"} if one else {"title": f"Attacks: {tasks[0]}", "subtitle": LINES}
            charts[name] = (caption + bands, style.joined(panels, 1 if one else 3, **title))
    if not one and forget and (cells := worst_cells(study, drawn, forget, general)):
        bound = f"at most {100 * study.general_bound:g} points of {general or 'general accuracy'}"
        caption = f"The highest {forget} that each attack reaches while it costs {bound}. "
        caption += "≥: not measured to its end, so it might reach more; grey: not measured." + left_out
        charts["worst-case"] = (caption, heat_map(cells))
    return charts


def _drawn(study: Study) -> tuple[list[Series], str]:
    """The series to draw (controls first, then the models and attacks with the most runs), and a note on what is left out."""
    models = Counter(series.model for series in study.series)
    models.update({series.model: len(study.series) for series in study.series if series.control})
    attacks = Counter(series.settings for series in study.series)
    some = {model for model, _ in models.most_common(MAX_MODELS)}
    usual = {attack for attack, _ in attacks.most_common(MAX_ATTACKS)}
    drawn = [series for series in study.series if series.model in some and series.settings in usual]
    kinds = ((some, models, "models"), (usual, attacks, "attacks"))
    fewer = [f"{len(shown)} of {len(every)} {what}" for shown, every, what in kinds if len(shown) < len(every)]
    return drawn, f" Shown: {' and '.join(fewer)}; the tables have all." if fewer else ""


def _panel(every: list[Series], task: str, own: list[Series], large: bool) -> alt.LayerChart | None:
    """One attack on several models, on the scale and in the colours of `every`. `large`: the reference lines have names."""
    names = _model_names(every)
    points = [_as_data(names[series.model], series, point) for series in own for point in series.points_of(task)]
    if not points:
        return None
    chances = {r["chance"] for series in own for a in series.attacks for _, r in a.results(task) if "chance" in r}
    before = {number(s.baseline.evals[task]) for s in own if s.baseline and task in s.baseline.evals}
    lines = {f"chance {style.per_cent(c)}": c for c in sorted(chances)} | {
        f"baseline {style.per_cent(b)}": b for b in sorted(before)
    }
    scale = style.accuracies(0, [*lines.values(), *(point.high for each in every for point in each.points_of(task))], parts=5)
    if any("place" in point for point in points):
        x: Any = alt.X("place:O", title="Strength", sort=None, axis=alt.Axis(labelAngle=0))
    else:
        few: dict[str, Any] = {} if large else {"tickCount": 4}
        x = alt.X("step:Q", title="Updates of the attack", axis=alt.Axis(**(style.STEPS | few), grid=False))
    layers = style.curves(points, list(dict.fromkeys(names.values())), "Attacked model", x, scale, large)
    panel: Any = alt.layer(*style.references(lines, scale, named=large), *layers)
    height, width = (style.HEIGHT * 3 // 4, style.WIDTH) if large else (style.HEIGHT // 2, (style.WIDTH - 2 * 50) // 3)
    title = alt.TitleParams(task if large else own[0].attack, frame="group")
    return panel.properties(title=title, width=width, height=height)


def _as_data(name: str, series: Series, point: Point) -> dict[str, Any]:
    """A point of a curve as the charts' data; of an attack without training with its strength as text."""
    facts = {"series": name, "step": point.step, "value": point.value, "low": point.low, "high": point.high}
    facts |= {"kind": "control" if series.control else "attacked", "tokens": point.tokens}
    return facts if point.strength is None else facts | {"place": f"{point.strength:g}" if point.strength else "none"}


def _model_names(series: list[Series]) -> dict[str, str]:
    """A short name for each attacked model: its kind of control or its run's name, if no other model has it."""
    return style.short_names({each.model: (each.control or each.model.rsplit(" (", 1)[0], each.model) for each in series})


def worst_cells(study: Study, drawn: list[Series], forget: str, general: str | None) -> Points:
    """The worst case of each attack on each drawn model and, in the last column, over all attacks; as far as measured."""
    names = _model_names(drawn)
    own = {(series.model, series.settings): series for series in drawn}
    attacks = dict.fromkeys((series.settings, series.attack) for series in drawn)
    cells = []
    for model in names:
        for settings, attack in attacks:
            series = own.get((model, settings))
            curves = study.curves_of(series, forget, general) if series else []
            known = any(len(each.forget) > 1 and each.general for each in curves)
            cells.append(_cell(names[model], attack, worst_case(curves, study.general_bound) if known else None))
        cells.append(_cell(names[model], "worst case", study.worst_cases[model]))
    return cells


def _cell(model: str, attack: str, worst: Worst | None) -> dict[str, Any]:
    if worst is None:
        return {"model": model, "attack": attack, "text": "–", "value": None, "why": "not measured"}
    why = "; ".join(f"{name}: {reason}" for name, reason in worst.not_measured.items())
    text = f"{'≥ ' if worst.not_measured else ''}{100 * worst.point.value:.0f}"
    return {"model": model, "attack": attack, "text": text, "value": worst.point.value, "why": why or worst.point.place}


def heat_map(cells: Points) -> alt.LayerChart:
    """Models by attacks, with the numbers in per cent; the darker, the more the attack recovered."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    attacks = list(dict.fromkeys(cell["attack"] for cell in cells))
    values = [cell["value"] for cell in cells if cell["value"] is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    bare: dict[str, Any] = {"ticks": False, "domain": False}
    base = alt.Chart(style.data(cells)).encode(
        x=alt.X("attack:N", sort=attacks, title=None, axis=alt.Axis(orient="top", labelAngle=-40, **bare)),
        y=alt.Y("model:N", sort=models, title=None, axis=alt.Axis(labelLimit=320, **bare)),
        tooltip=style.tips(model="Model", attack="Attack", value=("Highest", ".2%"), why="At"),
    )
    colour = alt.Color("value:Q", scale=alt.Scale(scheme="blues", domain=[low, high]), legend=None)
    border: dict[str, Any] = {"stroke": "white", "strokeWidth": 1.5}
    ink = alt.condition(f"datum.value > {(low + 2 * high) / 3}", alt.value("white"), alt.value("#222"))
    text = base.encode(text="text:N", color=ink)
    layers = [
        base.transform_filter("datum.value === null").mark_rect(color="#e4e4e4", **border),
        base.transform_filter("datum.value !== null").mark_rect(**border).encode(color=colour),
        text.transform_filter("datum.attack !== 'worst case'").mark_text(fontSize=12),
        text.transform_filter("datum.attack === 'worst case'").mark_text(fontSize=12, fontWeight="bold"),
    ]
    title = "Models by attacks: forget accuracy, %"
    return style.layered(layers, title, width=max(220, 48 * len(attacks)), height=34 * len(models))
