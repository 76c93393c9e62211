"""The web page of a report: one HTML file that needs no network, with the result first, then charts, tables and settings.

    headline, tables, charts -> render() fills page.html.j2

Each chart is in the page twice. Its SVG is what readers see without scripts and on paper. Its Vega-Lite definition is turned
into an interactive chart by a script, in the colours of the reader's light or dark scheme. The page's Content-Security-Policy
forbids it to load anything.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, FileSystemLoader

from lethe.report.headline import headline
from lethe.report.rendering import Table
from lethe.results.format import setting
from lethe.results.study import Study
from lethe.runs.run import Run, now

LONG = 44
"""Characters from which on a cell wraps."""


def render(study: Study, title: str, tables: list[Table], charts: dict[str, tuple[str, Any, str]]) -> str:
    """The page. `charts` holds caption, Vega-Lite definition and SVG by name."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html.j2").render(
        title=title,
        made_from=_made_from(study),
        sentences=headline(study),
        charts=charts,
        tables=tables,
        long=LONG,
        settings=[_settings(run) for run in [*study.runs, *study.imported]],
        version=importlib.metadata.version("lethe-lm"),
        time=now(),
        specs=_json({name: spec for name, (_, spec, _) in charts.items()}),
        # Vega, Vega-Lite and Vega-Embed as one script
        vega=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script") if charts else "",
    )


def _made_from(study: Study) -> str:
    runs = [*study.runs, *study.imported]
    kinds = Counter(run.record["kind"] for run in runs)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    targets = ", ".join(dict.fromkeys(target.ref for target in study.targets))
    return f"{len(runs)} run{'s' * (len(runs) != 1)} ({counted})" + (f" · model {targets}" if targets else "")


def _settings(run: Run) -> tuple[str, str]:
    """A run's title, and its settings and versions as text."""
    lines = "\n".join(f"{key}: {setting(value)}" for key, value in run.record["config"].items())
    environment = run.record.get("environment") or {}
    versions = ", ".join(f"{name} {version}" for name, version in (environment.get("versions") or {}).items())
    summary = f"{run.record['kind']} {run.record['name']} ({run.id}), {run.status}"
    return summary, f"{lines}\n\n# {versions}" if versions else lines


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
