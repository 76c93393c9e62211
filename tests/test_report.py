"""Reports: every number in them is one of run.json, numbers that cannot be compared stand apart, and names break nothing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from rich.console import Console
from studies import CLOZE, FORGET, RETAIN, TARGET, Folder, accuracy, evals, grid, whole_study

from lethe.config import ReportConfig
from lethe.errors import LetheError
from lethe.report import tables
from lethe.report.charts import all_charts
from lethe.report.folder import _write, report
from lethe.report.headline import headline
from lethe.results.format import MISSING
from lethe.results.listing import entries


@pytest.fixture
def study(tmp_path: Path) -> Folder:
    return whole_study(tmp_path / "runs")


def made(runs: Folder | Path, out: Path, **settings: Any) -> dict[str, Path]:
    return report(ReportConfig([str(runs.path if isinstance(runs, Folder) else runs)], str(out), **settings))


# --- tables -----------------------------------------------------------------------------------------------------------


def test_every_number_of_the_runs_table_is_the_one_of_run_json(study: Folder) -> None:
    rows = study.table("Runs")
    for path in study.path.glob("unlearn-*/run.json"):
        record = json.loads(path.read_text())
        row, config = rows[record["id"]], record["config"]
        assert {name: float(row[name]) for name in ("retain_coef", "remove_coef", "lr")}.items() <= config.items()
        assert row["lora_r"] == ("16" if config["lora"] else "full")
        assert int(row["Steps"]) == record["plan"]["steps"]
        for loss in ("cb_loss", "retain_kl_loss"):
            assert row[loss] == f"{record['losses'][loss]:.4f}"
        for task in (FORGET, RETAIN):
            assert row[task] == f"{100 * record['evals'][task]['acc']:.2f} %"
        assert row[CLOZE] == ("0.2124" if CLOZE in record["evals"] else "-")


def test_baseline_and_source_stand_first_whatever_the_order_of_the_runs(study: Folder) -> None:
    header, baseline, source, *rest = grid(study.tables(), "Runs")
    at = {name: header.index(name) for name in (FORGET, "retain_coef", "Steps", "name")}
    assert (baseline[0], baseline[at[FORGET]], baseline[at["retain_coef"]]) == ("Baseline", "95.25 %", "-")
    assert (source[0], source[at[FORGET]], source[at["Steps"]]) == ("Source (global_step900)", "26.00 %", "-")
    assert [row[at["name"]] for row in rest] == ["lora", "full"]
    assert "layers" not in header and "lr" in header


def test_regime_and_selectivity_follow_the_formula_and_the_thresholds_of_sweeps(study: Folder) -> None:
    """Of retain 0.8325 a run retains 0.72, that is (0.72 − 0.25) / (0.8325 − 0.25) = 0.81."""
    lora, run = study.named("lora"), study.unlearn("less", evals(0.26, 0.72))
    forget, retain = (0.2625 - 0.25) / (0.9525 - 0.25), (0.7975 - 0.25) / (0.8325 - 0.25)
    rows = study.table("Runs")
    assert (rows[lora.id]["regime"], rows[lora.id]["selectivity"]) == ("selective", f"{retain - forget:.2f}")
    assert rows[run.id]["regime"] == "partial"
    study.add("sweep", "old", {"kept_threshold": 0.75, "chance_threshold": 0.1})  # the setting's name in old runs
    assert study.table("Runs")[run.id]["regime"] == "selective" and "reaches 0.75" in study.tables()
    study.add("sweep", "strict", {"retained_threshold": 0.95, "chance_threshold": 0.1})  # two that differ: the defaults
    assert "reaches 0.9," in study.tables()


def test_columns_of_losses_and_settings_are_those_that_the_runs_have(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs")
    for beta in (0.1, 0.5):
        config = {"model": "lab:final", "method": "npo", "beta": beta, "retain_coef": 1.0, "lora": None}
        losses = {"npo_loss": beta, "retain_kl_loss": 0.01}
        folder.add("unlearn", "npo", config, parents={"model": TARGET}, losses=losses, evals=evals(0.3, 0.8))
    running = folder.add("unlearn", "npo", {"model": "lab:final"}, "failed", parents={"model": TARGET})
    running.append("metrics.jsonl", {"step": 1, "loss": 1.0, "other_loss": 0.5})
    header, first, *_ = grid(folder.tables(), "Runs")
    assert header[:7] == ["Job ID", "retain_coef", "lora_r", "beta", "Steps", "retain_kl_loss", "npo_loss"]
    assert header[7] == "other_loss" and first[5:7] == ["0.0100", "0.1000"]
    assert "other_loss" in json.dumps(all_charts(folder.load())["losses"][1].to_dict())


def test_checkpoint_and_affine_tables(study: Folder) -> None:
    expected = {"Checkpoint": "global_step900", FORGET: "26.00 %", RETAIN: "60.00 %", "Notes": "~Random (latest viable)"}
    assert study.table("Checkpoint sweep")["global_step900"] == expected
    maps = study.table("Affine maps")
    assert list(maps) == ["0", "2"]
    assert (maps["2"]["R²"], maps["2"]["R² without map"], maps["2"]["MSE"]) == ("0.7000", "0.2000", "0.1")


def test_a_run_that_is_not_complete_shows_its_status_where_numbers_are_missing(study: Folder) -> None:
    run = study.unlearn("wild", None, "diverged", lr=1.0)
    run.update(reason="the loss was nan at step 3; lower lr")
    lost = study.unlearn("gone", None, "running")
    os.utime(lost.path / "run.json", (0, 0))
    rows = study.table("Runs")
    row = rows[f"{run.id} (diverged)"]
    assert {row[c] for c in ("cb_loss", FORGET, RETAIN, "regime", "selectivity")} == {"diverged"}
    assert row["Steps"] == "128"
    assert rows[f"{lost.id} (lost)"]["cb_loss"] == "lost"
    assert f"wild ({run.id}) diverged: the loss was nan at step 3; lower lr." in study.tables()


def test_degenerate_results_are_marked(study: Folder) -> None:
    run = study.unlearn("letter", evals(0.26, 0.8, degenerate=True))
    row = study.table("Runs")[run.id]
    assert (row[FORGET], row["regime"]) == ("26.00 %†", "selective†")
    assert "† degenerate" in study.tables()


@pytest.mark.parametrize(
    "change", [{"fingerprint": "other"}, {"version": 2}, {"num_fewshot": 5}, {"n": 100}], ids=lambda c: next(iter(c))
)
def test_numbers_measured_differently_stand_in_a_table_of_their_own(study: Folder, change: dict[str, Any]) -> None:
    run = study.unlearn("odd", evals(0.31, 0.8, **change))
    text, row = study.tables(), study.table("Runs")[run.id]
    assert (row[FORGET], row["regime"], row[RETAIN]) == (MISSING, MISSING, "80.00 %")
    (apart,) = grid(text, "Measured in another way")[1:]
    assert apart[:4] == [f"unlearn odd ({run.id})", "", FORGET, "31.00 %"]
    key, value = next(iter(change.items()))
    assert apart[4].startswith(f"{key} {value}, not ")
    assert "of odd: measured in another way" in text and "31.00 %" not in text.split("## Measured")[0]
    assert "Numbers of 1 run were measured in another way" in " ".join(headline(study.load()))


def test_of_two_ways_that_stays_in_which_more_models_were_measured(study: Folder) -> None:
    """Many evaluations of the baseline with few questions do not displace the study's; nor does an attack's curve."""
    for number in range(5):
        quick = {"parents": {"model": TARGET}, "evals": evals(0.9, 0.8, n=50)}
        study.add("evaluate", f"quick{number}", {"model": "lab:final"}, **quick)
    before = study.tables()
    assert study.table("Runs")["Baseline"][FORGET] == "95.25 %"
    assert len(grid(before, "Measured in another way")) == 1 + 5 and "## Evaluations" not in before
    run = study.attack("odd", "lab:filtered", [0.3, 0.9])
    lines = [json.dumps({"step": 10 * i, "evals": evals(value, 0.8, n=50)}) for i, value in enumerate((0.3, 0.9))]
    (run.path / "curve.jsonl").write_text("\n".join(lines))
    assert "90.00 %" not in grid(study.tables(), "Tampering")[-1]
    apart = [row for row in grid(study.tables(), "Measured in another way") if run.id in row[0] and row[2] == FORGET]
    assert [(row[1], row[3]) for row in apart] == [("step 0", "30.00 %"), ("step 10", "90.00 %")]


def test_evaluations_of_the_baseline_are_one_row_and_others_have_a_table(study: Folder) -> None:
    more = {"lab_retain_stem": accuracy("lab_retain_stem", 0.7)}
    study.add("evaluate", "more", {"model": "lab:final"}, parents={"model": TARGET}, evals=more)
    baseline = study.table("Runs")["Baseline"]
    assert (baseline[FORGET], baseline["lab_retain_stem"]) == ("95.25 %", "70.00 %")
    assert "## Evaluations" not in study.tables()
    other = {"model": {"ref": "org/other", "sha256": "c" * 64}}
    run = study.add("evaluate", "other", {"model": "org/other"}, parents=other, evals=evals(0.4, 0.5))
    header, row = grid(study.tables(), "Evaluations")
    assert (row[0], row[header.index("Job ID")], row[header.index(RETAIN)]) == ("org/other", run.id, "50.00 %")


def test_terminal_tables_are_the_same_ones(study: Folder) -> None:
    console = Console(width=240, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    runs = study.load().runs
    console.print(*tables.terminal(runs), tables.runs_table(entries(runs)), tables.evals_table(evals(0.5, 0.6)))
    text = console.export_text()
    for expected in ("26.25 %", "Full recovery by step 30", "latest ignorant: lab:global_step900", "48.00 to 52.00 %"):
        assert expected in text


def test_the_plan_table_has_a_row_for_each_part() -> None:
    plan = {"steps": 1280, "memory": {"weights": 2_000_000}, "layers": {"0": "output of block 0"}, "no_gradient": []}
    assert tables.plan_table(plan).rows == [
        ["steps", "", "1,280"],
        ["memory", "weights", "2 MB"],
        ["layers", "0", "output of block 0"],
        ["no_gradient", "", "[]"],
    ]


def test_the_lab_table_marks_the_onset_and_the_twin(tmp_path: Path) -> None:
    rows = [{"name": f"step{s}", "step": s, "tokens": 100 * s, "evals": evals(f, 0.5)} for s, f in ((10, 0.25), (20, 0.7))]
    twin = {"name": "filtered", "step": 20, "tokens": 2000, "evals": evals(0.25, 0.5)}
    folder = Folder(tmp_path)
    folder.add("lab", "nano", {"onset": 10}, checkpoints=rows, filtered=twin)
    cells = folder.table("Lab")
    assert "onset" in cells["step10"]["Notes"] and "onset" not in cells["filtered"]["Notes"]
    assert (cells["step20"][FORGET], cells["step20"]["Tokens"]) == ("70.00 %", "2,000")
    assert "twin" in cells["filtered"]["Notes"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_refusals_come_before_anything_is_written(study: Folder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    a_run = study.named("lora").path
    before = sorted(path.name for path in a_run.iterdir())
    for runs, out in ((tmp_path / "empty", tmp_path / "x"), (tmp_path / "none", tmp_path / "x"), (study.path, a_run)):
        with pytest.raises(LetheError) as refusal:
            made(runs, out)
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "x").exists()
    assert sorted(path.name for path in a_run.iterdir()) == before


def test_a_second_report_replaces_the_first(study: Folder, tmp_path: Path) -> None:
    first = made(study, tmp_path / "out")
    names = {"checkpoints", "losses", "forget-retain", "tamper"}
    assert first["tables"].read_text().endswith(study.tables())
    assert {path.name for path in first["charts"].iterdir()} == {f"{n}.{kind}" for n in names for kind in ("svg", "png")}
    (first["charts"] / "my-figure.png").write_bytes(b"mine")
    second = made(study.named("base").path, tmp_path / "out")
    assert [path.name for path in second["charts"].iterdir()] == ["my-figure.png"]
    assert "Runs\n" not in second["tables"].read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tables.md", "index.html", "charts", ".report.json"}


@pytest.mark.parametrize(
    "written",
    [
        '["../victim.txt"]',
        '{"files": {"../victim.txt": ["SHA"], "mine.txt": ["SHA"], "/tmp/x": ["SHA"], "charts/../../victim.txt": ["SHA"]}}',
        '{"files": {"charts/victim.svg": ["SHA"], "charts/other.svg": [7], "charts/linked.svg": ["SHA"]}}',
        '{"files": {"charts/other.svg": 5, "tables.md": null}}',
        "{",
    ],
)
def test_a_report_removes_nothing_but_what_a_report_has_written(study: Folder, tmp_path: Path, written: str) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim.txt"
    (out / "charts").mkdir(parents=True)
    for path in (victim, out / "mine.txt", out / "charts" / "other.svg"):
        path.write_text("mine")
    (out / "charts" / "linked.svg").symlink_to(victim)
    (out / ".report.json").write_text(written.replace("SHA", hashlib.sha256(b"mine").hexdigest()))
    made(study.named("base").path, out)
    assert (out / "tables.md").exists()
    for path in (victim, out / "mine.txt", out / "charts" / "other.svg", out / "charts" / "linked.svg"):
        assert path.read_text() == "mine"


def test_what_somebody_else_wrote_or_changed_stays(study: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, single = tmp_path / "out", study.named("base").path
    files = {"index.html": b"page", "tables.md": b"tables", "charts/losses.svg": b"<svg/>", "charts/losses.png": b"png"}
    _write(out, files, {})
    (out / "charts" / "losses.svg").write_text("<svg>my words</svg>")
    made(single, out)
    assert [path.name for path in (out / "charts").iterdir()] == ["losses.svg"]
    assert "losses.svg has changed since a report wrote it" in caplog.text
    (out / "tables.md").write_text("my tables")
    with pytest.raises(LetheError, match=r"tables\.md that has changed since a report wrote it"):
        made(single, out)
    assert (out / "tables.md").read_text() == "my tables"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("my own page")
    with pytest.raises(LetheError, match=r"holds a file index\.html that this version of Lethe has not written"):
        made(single, tmp_path / "site")
    assert [path.read_text() for path in (tmp_path / "site").iterdir()] == ["my own page"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "charts").symlink_to(tmp_path / "site")
    with pytest.raises(LetheError, match="is a link"):
        made(single, tmp_path / "linked")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_leads_with_the_result(study: Folder, tmp_path: Path) -> None:
    study.unlearn("<script>alert(1)</script>", evals(0.5, 0.6))
    text = made(study, tmp_path / "out", title="A & B")["page"].read_text()
    markup = re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", text, flags=re.S)
    assert not re.search(r"<(script|img|iframe|link|source|embed|object|image|use)\b[^>]*\b(src|href|data|srcset)\s*=", markup)
    assert not re.search(r"@import|url\(\s*['\"]?(https?:|//)", markup)
    assert "default-src 'none'" in text
    assert "<script>alert(1)" not in text
    assert "<h1>A &amp; B</h1>" in text
    result = text.split('<section class="result">')[1].split("</section>")[0]
    assert f"{FORGET} 95.2 % → 26.2 %" in result and f"{RETAIN} 83.2 % → 79.8 %" in result
    assert "An attack of 30 steps" in result and "Full recovery by step 30" in result
    assert markup.count("<table>") == study.tables().count("## ")


@pytest.mark.slow
def test_the_page_draws_its_charts_in_a_browser(study: Folder, tmp_path: Path) -> None:
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    page = made(study, tmp_path / "out")["page"]
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} --virtual-time-budget=8000"
    done = subprocess.run(
        [browser, *flags.split(), "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    for name in ("checkpoints", "losses", "forget-retain", "tamper"):
        figure = re.search(rf'<div class="chart[^"]*vega-embed[^"]*" id="chart-{name}"[^>]*>(.*?)</figure>', done.stdout, re.S)
        assert figure, f"chart {name} was not drawn by its script"
        assert re.search(r"<(svg|canvas)[^>]*class=\"marks\"", figure[1])


def test_importing_reports_leaves_torch_out() -> None:
    heavy = "{'torch', 'transformers', 'lm_eval'}"
    modules = "sys, lethe.report.folder, lethe.report.page, lethe.report.tables, lethe.results.regimes"
    code = f"import {modules}; print(*{heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


# --- other people's names and numbers ---------------------------------------------------------------------------------

HOSTILE = "\x1b]0;x\x07\x00\x1b[31m\ud800\ufffe\n# H <b>i</b> </script><script>alert(1)</script> [l](http://e.x) `a|b` *c* \"'>"


def test_names_and_reasons_that_are_no_plain_text_are_shown_and_break_nothing(study: Folder, tmp_path: Path) -> None:
    """In tables, page and charts. The library that draws charts would end the process at such a character."""
    run = study.unlearn("hostile", evals(0.5, 0.6), "diverged")
    attack = study.attack("bad", f"run:{run.id}", [0.5, 0.6])
    for each in (run, attack):
        record = json.loads((each.path / "run.json").read_text())
        record |= {"name": HOSTILE, "reason": HOSTILE, "config": record["config"] | {"lr": HOSTILE}}
        (each.path / "run.json").write_text(json.dumps(record))
    files = made(study, tmp_path / "out", title="".join(filter(str.isprintable, HOSTILE)))
    text, markup = files["tables"].read_text(), files["page"].read_text()
    for content in [text, markup, *(path.read_text() for path in files["charts"].glob("*.svg"))]:
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\ufffe\ud800]", content)
    assert "alert(1)" in markup and "<script>alert" not in markup and "<b>i</b>" not in markup
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inside = {child.type for token in tokens for child in token.children or []}
    assert inside <= {"text", "text_special"}  # no link, HTML, code or emphasis
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == 1 + study.tables().count("\n## ") + 1 and not any(title.startswith("H ") for title in headings)
    assert len({len(row) for row in grid(text, "Runs")}) == 1


@pytest.mark.parametrize("number", [-5, 1.5, 1e18])
def test_numbers_that_are_no_accuracy_stand_apart_and_break_no_chart(study: Folder, number: float) -> None:
    run = study.unlearn("wild", evals(0.5, 0.6), lr=number)
    record = json.loads((run.path / "run.json").read_text())
    record["evals"][FORGET]["acc"] = number
    record["losses"]["cb_loss"] = math.inf
    (run.path / "run.json").write_text(json.dumps(record))
    text = study.tables()
    assert any(run.id in row[0] and row[4] == "no number from 0 to 1" for row in grid(text, "Measured in another way"))
    assert len(text) < 40_000
    json.dumps({name: chart.to_dict() for name, (_, chart) in all_charts(study.load()).items()}, allow_nan=False)
