"""The web page of a report: one HTML file that needs no network, with the result first, then charts, tables, settings.

Charts are in it twice: as SVG, which is what is seen without scripts and on paper, and as a Vega-Lite definition that a
script turns into the interactive chart, in the colours of the reader's light or dark scheme. The page's own policy
(Content-Security-Policy) forbids it to load anything.
"""

from __future__ import annotations

import html
import importlib.metadata
import json
from typing import Any

import vl_convert

from lethe.report.attacks import recovery_note
from lethe.report.layout import Table
from lethe.results import regimes
from lethe.results.format import percent, setting
from lethe.results.study import Attack, Study, Target, attack_tasks, judge, value_of
from lethe.runs.run import Run, now

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data: blob:"
DARK = {
    "background": "transparent",
    "title": {"color": "#e8e8e8"},
    "axis": {
        "labelColor": "#c4c4c4",
        "titleColor": "#d8d8d8",
        "gridColor": "#3a3d42",
        "domainColor": "#777",
        "tickColor": "#777",
    },
    "legend": {"labelColor": "#d8d8d8", "titleColor": "#d8d8d8"},
}
STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1d21; --soft: #5d636d; --line: #dcdfe4; --paper: #fff; --tint: #f5f6f8; --mark: #0060a0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a3a9b3; --line: #3a3d42; --paper: #17191c; --tint: #202328; --mark: #6db8ee; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 2rem 0 .6rem; }
.sub, .notes, figcaption { color: var(--soft); font-size: .86rem; }
header, .result, .tiles, .notes, figcaption { max-width: 62rem; }
.result { margin: 1.5rem 0 0; padding: 1.1rem 1.3rem; background: var(--tint);
  border-left: 4px solid var(--mark); border-radius: 4px; }
.result p { margin: .3rem 0; }
.result p:first-child { font-size: 1.16rem; margin-top: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .8rem; margin: 1rem 0 0; }
.tile { border: 1px solid var(--line); border-radius: 4px; padding: .75rem .95rem; }
.tile b { display: block; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile span { color: var(--soft); font-size: .82rem; }
figure { margin: 1.6rem 0 2.2rem; }
.chart { overflow-x: auto; }
.chart svg { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { .chart > svg { background: #fff; } }
.table { overflow-x: auto; content-visibility: auto; contain-intrinsic-size: auto 30rem; }
table { border-collapse: collapse; font-size: .79rem; line-height: 1.35; min-width: 50%; }
th, td { padding: .36rem .65rem .36rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; }
.number + :not(.number) { padding-left: .8rem; }
td.long { white-space: normal; min-width: 17rem; }
th { font-weight: 600; vertical-align: bottom; border-bottom-color: var(--soft); }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
.notes { margin: .6rem 0 0; padding-left: 1.1rem; }
details { content-visibility: auto; contain-intrinsic-size: auto 1.6rem; }
details { border-bottom: 1px solid var(--line); padding: .45rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--tint); padding: .8rem 1rem; font-size: .8rem; border-radius: 4px; }
footer { margin-top: 3rem; color: var(--soft); font-size: .82rem; }
"""
SCRIPT = """
const specs = JSON.parse(document.getElementById("specs").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const darkConfig = JSON.parse(document.getElementById("dark").textContent);
const merged = (a, b) => Object.fromEntries([...new Set([...Object.keys(a), ...Object.keys(b)])].map(k =>
  [k, k in b ? (typeof b[k] === "object" && typeof a[k] === "object" ? merged(a[k], b[k]) : b[k]) : a[k]]));
function draw(name) {
  const config = merged(specs[name].config || {}, dark.matches ? darkConfig : { background: "transparent" });
  const tooltip = { theme: dark.matches ? "dark" : "light" };
  return vegaEmbed("#chart-" + name, { ...specs[name], config }, { renderer: "svg", actions: false, tooltip });
}
// Until its turn, once the page stands, each chart is its drawing from the report.
async function drawAll() {
  for (const name of Object.keys(specs)) {
    await new Promise(resolve => setTimeout(resolve));
    await draw(name);
  }
}
addEventListener("load", drawAll);
dark.addEventListener("change", drawAll);
"""


def headline(study: Study) -> list[str]:
    """The result in a few sentences; the first is about the unlearned model that did best."""
    sentences = []
    for target in study.targets:
        best = target.best
        if best is None or target.baseline is None:
            continue
        sentences.append(_unlearning_sentence(best, target, len(target.runs)))
        attacks = [attack for attack in study.attacks if study.attacked(attack) is best]
        worst = _worst_sentence(attacks[0].model, study) if len({attack.settings for attack in attacks}) > 1 else ""
        sentences += [worst] if worst else [_attack_sentence(attack, study) for attack in attacks]
    several = len({series.settings for series in study.series}) > 1
    sentences += [_control_sentence(study)] if not several and any(attack.control for attack in study.attacks) else []
    done = len([run for run in study.runs if run.status == "complete"])
    left = f"{done} of {len(study.runs)} runs are complete."
    found = [sentence for sentence in sentences if sentence]
    if not found and (study.runs or not study.imported):
        found = [f"No unlearning result with a baseline yet: {left}"]
    if study.apart:
        count = len({each.run.id for each in study.apart})
        found.append(
            f"Of {count} run{'s' * (count != 1)} numbers were measured in another way, and stand in a table of their own."
        )
    if study.imported:
        files = ", ".join(dict.fromkeys(run.record["imported"]["file"] for run in study.imported))
        found.append(f"{len(study.imported)} runs are imported from {files}, and stand in tables of their own.")
    return found


def render(study: Study, title: str, tables: list[Table], charts: dict[str, tuple[str, Any, str]]) -> str:
    """The page. `charts` holds caption, Vega-Lite definition and SVG by name."""
    sentences = headline(study)
    figures = "".join(
        f'<figure><div class="chart" id="chart-{name}">{svg}</div><figcaption>{html.escape(caption)}</figcaption></figure>\n'
        for name, (caption, _, svg) in charts.items()
    )
    body = [
        f'<header><h1>{html.escape(title)}</h1><div class="sub">{html.escape(_made_from(study))}</div></header>',
        '<section class="result">' + "".join(f"<p>{html.escape(s)}</p>" for s in sentences) + "</section>",
        _tiles(study),
        f"<h2>Charts</h2>\n{figures}" if charts else "",
        "<h2>Tables</h2>",
        *(f"<h3>{html.escape(table.title)}</h3>\n{table.html()}" for table in tables),
        "<h2>Settings of the runs</h2>",
        *(_settings(run) for run in [*study.runs, *study.imported]),
        f"<footer>Made by Lethe {importlib.metadata.version('lethe-lm')} from the runs themselves, {now()}.</footer>",
    ]
    specs = {name: spec for name, (_, spec, _) in charts.items()}
    scripts = [
        f'<script type="application/json" id="specs">{_json(specs)}</script>',
        f'<script type="application/json" id="dark">{_json(DARK)}</script>',
        f"<script>{_vega()}</script>",
        f"<script>{SCRIPT}</script>",
    ]
    head = (
        f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>"
    )
    content = "\n".join([*body, *(scripts if charts else [])])
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{content}\n</body>\n</html>\n'


def _unlearning_sentence(run: Run, target: Target, of: int) -> str:
    evals, before = run.record["evals"], target.baseline.evals if target.baseline else {}
    tasks = [task for task in target.judged if task and task in evals]
    changes = ", ".join(
        f"{task} {percent(value_of(before[task]), 1)} → {percent(value_of(evals[task]), 1)}"
        + (" (degenerate)" if evals[task].get("degenerate") else "")
        for task in tasks
    )
    judged = judge(evals, target)
    verdict = f"; regime {judged[0]}, selectivity {judged[1].value:.2f} (95 % interval {_range(judged[1])})" if judged else ""
    which = f"{run.record['name']} ({run.id}), best of {of} unlearning runs" if of > 1 else f"{run.record['name']} ({run.id})"
    return f"{changes}{verdict}: {which}." if changes else ""


def _attack_sentence(attack: Attack, study: Study) -> str:
    ends = _ends(attack)
    if ends is None:
        return ""
    task, start, final, steps = ends
    found = attack.recovery(task)
    share = found.recovered if found else None
    gap = f", {percent(share, 0)} of what unlearning had removed" if share is not None else ""
    note = recovery_note(attack, task)
    full = f". {note}" if note.startswith("Full") else ""
    status = attack.run.status
    what = f"An attack of {steps} steps" if status == "complete" else f"An attack, {status} after step {steps}, so far"
    return f"{what} brought {task} from {percent(start, 1)} to {percent(final, 1)}{gap}{full}."


def _worst_sentence(model: str, study: Study) -> str:
    """The worst case of a model that several attacks were on, beside the controls'."""
    cases = {name: worst for name, (_, worst) in study.worst_cases.items() if worst}
    own = cases.get(model)
    if own is None:
        return ""
    task, general = attack_tasks(study.attacks)
    cost = f"{general or 'general'} {-100 * own.general_lost:+.1f} points"
    by = f" (by {own.attack}, {own.point.place}, {cost})" if own.attack else ""
    open_ones = f"; {len(own.not_measured)} are not measured to their end" if own.not_measured else ""
    controls = dict.fromkeys((s.model, s.control) for s in study.series if s.control and s.model in cases)
    scores = {(control or "").removeprefix("Control: "): percent(cases[name].point.value, 1) for name, control in controls}
    beside = ", ".join(f"{name} {score}" for name, score in scores.items())
    return (
        f"Worst case over {len(own.counted) + len(own.not_measured)} attacks: {task} {percent(own.start.value, 1)} → "
        f"{percent(own.point.value, 1)}{by}{open_ones}" + (f"; controls: {beside}." if beside else ".")
    )


def _control_sentence(study: Study) -> str:
    parts = []
    for attack in study.attacks:
        ends = _ends(attack) if attack.control else None
        if ends:
            what = attack.control.removeprefix("Control: ") if attack.control else ""
            status = "" if attack.run.status == "complete" else f" ({attack.run.status})"
            parts.append(f"{what} {percent(ends[1], 1)} → {percent(ends[2], 1)} in {ends[3]} steps{status}")
    return f"Attacks on the controls, for comparison: {'; '.join(parts)}." if parts else ""


def _ends(attack: Attack) -> tuple[str, float, float, int] | None:
    """Forget task, its value before the attack and at the last evaluated step, and that step."""
    tasks = [task for line in attack.curve for task in line["evals"]]
    task = regimes.forget_task(tasks) or next(iter(tasks), None)
    points = attack.points(task) if task else []
    return (task, value_of(points[0][1]), value_of(points[-1][1]), points[-1][0]) if task and points else None


def _tiles(study: Study) -> str:
    """The best run's main numbers, large."""
    for target in study.targets:
        run = target.best
        if run is None or target.baseline is None:
            continue
        evals, before = run.record["evals"], target.baseline.evals
        tiles = [
            (f"{percent(value_of(before[task]), 1)} → {percent(value_of(evals[task]), 1)}", f"{what}: {task}")
            for what, task in zip(("forget", "retain"), target.judged, strict=True)
            if task and task in evals
        ]
        judged = judge(evals, target)
        tiles += [(f"{judged[1].value:.2f}", f"selectivity, regime {judged[0]}")] if judged else []
        attacks = [a for a in study.attacks if study.attacked(a) is run and _ends(a) and a.run.status == "complete"]
        attack = next(iter(attacks), None)
        worst = study.worst_cases[attacks[0].model][1] if len({a.settings for a in attacks}) > 1 else None
        if worst:
            tiles.append((percent(worst.point.value, 1), "forget, worst case over the attacks"))
        elif attack and (ends := _ends(attack)):
            tiles.append((percent(ends[2], 1), f"forget after {ends[3]} steps of attack"))
        cells = "".join(f'<div class="tile"><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>' for b, s in tiles)
        return f'<div class="tiles">{cells}</div>' if tiles else ""
    return ""


def _range(estimate: regimes.Estimate) -> str:
    return f"{estimate.low:.2f} to {estimate.high:.2f}"


def _made_from(study: Study) -> str:
    kinds: dict[str, int] = {}
    for run in [*study.runs, *study.imported]:
        kinds[run.record["kind"]] = kinds.get(run.record["kind"], 0) + 1
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    targets = ", ".join(dict.fromkeys(target.ref for target in study.targets))
    count = len(study.runs) + len(study.imported)
    return f"{count} run{'s' * (count != 1)} ({counted})" + (f" · model {targets}" if targets else "")


def _settings(run: Run) -> str:
    lines = "\n".join(f"{key}: {setting(value)}" for key, value in run.record["config"].items())
    environment = run.record.get("environment") or {}
    versions = ", ".join(f"{name} {version}" for name, version in (environment.get("versions") or {}).items())
    summary = f"{run.record['kind']} {run.record['name']} ({run.id}), {run.status}"
    text = f"{lines}\n\n# {versions}" if versions else lines
    return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"


def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that needs nothing else."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
