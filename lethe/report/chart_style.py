"""What the charts of a report share: colours, scales, curves with their intervals, reference lines, fonts.

The colours are those of Okabe and Ito, which people with any colour vision tell apart. Each series also has its own shape or
dash. Bands are 95 % intervals. Reference lines (chance, baseline) have their names in the margin, where no data lies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import altair as alt

from lethe.errors import printable
from lethe.runs.run import Run

PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8B6BB1"]
SHAPES = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left"]
REFERENCE = "#808080"
DASHES_OF = {"chance": [2, 3], "baseline": [7, 4]}
"""Dashes of reference lines by how their names begin."""
LONGEST_LABEL = 80
WIDTH, HEIGHT = 740, 300
ACCURACY: dict[str, Any] = {"labelExpr": "format(100 * datum.value, '~g') + ' %'", "tickCount": 6}
STEPS: dict[str, Any] = {"format": "d", "tickMinStep": 1, "tickCount": 10}
SMALL: dict[str, Any] = {"color": REFERENCE, "fontSize": 11}
LEGEND = alt.Legend(symbolOpacity=1)
AXIS = {"labelFontSize": 11, "titleFontSize": 12, "titleFontWeight": "normal", "titlePadding": 10, "labelFlush": False}
CONFIG: dict[str, Any] = {
    "font": "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, 'DejaVu Sans', sans-serif",
    "background": "white",
    "padding": {"left": 8, "right": 12, "top": 8, "bottom": 8},
    "axis": {**AXIS, "gridColor": "#888", "gridOpacity": 0.2},
    "legend": {"orient": "bottom", "labelFontSize": 11, "titleFontSize": 11, "labelLimit": 360, "columns": 4, "offset": 16},
    "title": {"fontSize": 13, "anchor": "start", "fontWeight": "bold"},
    "view": {"stroke": None},
}
Points = list[dict[str, Any]]


def data(points: Points) -> alt.InlineData:
    """The data of a chart. Altair copies a list for every layer, but not a tuple."""
    return alt.InlineData(values=tuple(points))


def curves(points: Points, series: list[str], title: str, x: alt.X, scale: alt.Scale, large: bool = True) -> list[alt.Chart]:
    """Band, line and points of each series. Lines of points with the `kind` control are dashed."""
    base = alt.Chart(data(points))
    y, low = (alt.Y(field, title="Accuracy", axis=alt.Axis(**ACCURACY), scale=scale) for field in ("value:Q", "low:Q"))
    shade = colour(series, title)
    kinds = alt.Scale(domain=["attacked", "control"], range=[[1, 0], [4, 3]])
    dash = {"strokeDash": alt.StrokeDash("kind:N", scale=kinds, legend=None)} if "kind" in points[0] else {}
    tooltip = tips(series=title, step=("Step", "d"), value=("Accuracy", ".2%"), low=("95 % from", ".2%"), high=("to", ".2%"))
    dots = base.mark_point(filled=True, size=46 if large else 24, opacity=1)
    return [
        base.mark_area(opacity=0.13).encode(x=x, y=low, y2="high:Q", color=shade),
        base.mark_line(strokeWidth=2 if large else 1.6).encode(x=x, y=y, color=shade, **dash),
        dots.encode(x=x, y=y, color=shade, shape=shape(series, title), tooltip=tooltip),
    ]


def references(lines: dict[str, float], scale: Any = alt.Undefined, axis: str = "y", named: bool = True) -> list[alt.Chart]:
    """Lines at values of an axis, with their names in the margin beyond. Names on `y` that would overlap are moved apart."""
    ordered = sorted(lines.items(), key=lambda item: item[1])
    layers = []
    for i, (text, value) in enumerate(ordered):
        base = alt.Chart(data([{"at": value, "text": text}]))
        place: Any = alt.Y("at:Q", scale=scale) if axis == "y" else alt.X("at:Q", scale=scale)
        dash = next((dash for word, dash in DASHES_OF.items() if text.startswith(word)), [1, 0])
        layers.append(base.mark_rule(color=REFERENCE, strokeDash=dash, strokeWidth=1.2).encode(**{axis: place}))
        if named and axis == "y":
            span = scale["domain"][1] - scale["domain"][0]
            close = [j for j, (_, other) in enumerate(ordered) if j != i and abs(other - value) < 0.06 * span]
            shift = 0 if not close else 7 if i < close[0] else -7
            name = base.mark_text(align="left", baseline="middle", dx=6, dy=shift, **SMALL)
            layers.append(name.encode(y=place, x=alt.value("width"), text="text:N"))
        elif named:
            layers.append(base.mark_text(baseline="bottom", dy=-4, **SMALL).encode(x=place, y=alt.value(0), text="text:N"))
    return layers


def accuracies(bottom: float, values: Iterable[float], parts: int) -> alt.Scale:
    """A scale of accuracies from `bottom` to the next of `parts` equal parts above all values, at most 1."""
    return alt.Scale(domain=[bottom, min(1.0, math.ceil(parts * max(values) + 0.1) / parts)])


def colour(series: list[str], title: str, legend: Any = LEGEND) -> alt.Color:
    """A colour for each series."""
    return alt.Color("series:N", title=title, scale=cycled(series, PALETTE), legend=legend)


def shape(series: list[str], title: str) -> alt.Shape:
    """A shape for each series. Shapes shift by one when colours repeat, so that 64 series all look different."""
    shifted = [SHAPES[(i + i // len(SHAPES)) % len(SHAPES)] for i in range(len(series))]
    return alt.Shape("series:N", title=title, scale=cycled(series, shifted))


def cycled(series: list[str], values: list[Any]) -> alt.Scale:
    """One value for each series, from the start again when they run out."""
    return alt.Scale(domain=series, range=[values[i % len(values)] for i in range(len(series))])


def tips(**fields: str | tuple[str, str]) -> list[alt.Tooltip]:
    """What a point shows under the mouse: a title for each field, and for numbers their format."""
    return [
        alt.Tooltip(f"{name}:N", title=what)
        if isinstance(what, str)
        else alt.Tooltip(f"{name}:Q", title=what[0], format=what[1])
        for name, what in fields.items()
    ]


def per_cent(share: float) -> str:
    """A share for the name of a reference line: `25 %`, `33.3 %`."""
    return f"{100 * share:.1f} %".replace(".0 %", " %")


def heading(text: str, **more: Any) -> alt.TitleParams:
    """The title of a chart."""
    return alt.TitleParams(text, anchor="start", fontSize=15, offset=14, **more)


def layered(layers: list[alt.Chart], title: str, width: int = WIDTH, height: int = HEIGHT) -> alt.LayerChart:
    """Layers as one chart."""
    return alt.layer(*layers).properties(title=heading(title), width=width, height=height).configure(**CONFIG)


def joined(panels: list[Any], columns: int, title: str, **more: Any) -> alt.ConcatChart:
    """Charts side by side and below each other under one title."""
    return alt.concat(*panels, columns=columns, spacing=20, title=heading(title, **more)).configure(**CONFIG)


def labels(runs: Iterable[Run]) -> dict[str, str]:
    """A run's name by its id, with the id where runs share a name."""
    return short_names({run.id: (run.record["name"], f"{run.record['name']} ({run.id})") for run in runs})


def short_names(names: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Of a short and a long name by key: the short one where no other key has it."""
    times = Counter(short for short, _ in names.values())
    return {key: printable(short if times[short] == 1 else long, LONGEST_LABEL) for key, (short, long) in names.items()}
