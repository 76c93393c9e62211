"""Reports: every number in them is one of run.json, and numbers that cannot be compared stand apart."""

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
from types import SimpleNamespace
from typing import Any

import pytest
from markdown_it import MarkdownIt

from lethe.config import ReportConfig
from lethe.errors import LetheError
from lethe.report import _write, headline, report, tables
from lethe.report.attacks import attack_tables, recovery_note
from lethe.report.attack_charts import worst_cells
from lethe.report.charts import all_charts
from lethe.report.layout import Table
from lethe.results import regimes
from lethe.results.format import MISSING
from lethe.results.listing import entries
from lethe.results.study import Study
from lethe.runs.run import Run

FORGET, RETAIN, CLOZE = "lab_forget_robust", "lab_retain", "lab_forget_cloze"
TARGET = {"ref": "lab:final", "sha256": "a" * 64}
SOURCE = {"ref": "lab:global_step900", "sha256": "b" * 64}


def accuracy(task: str, acc: float, half: float = 0.02, **changes: Any) -> dict[str, Any]:
    facts = {"n": 400, "chance": 0.25, "num_fewshot": 0, "version": 1, "fingerprint": f"of-{task}", "degenerate": False}
    return {"acc": acc, "stderr": half / 2, "low": acc - half, "high": acc + half} | facts | changes


def evals(forget: float, retain: float, **changes: Any) -> dict[str, Any]:
    return {FORGET: accuracy(FORGET, forget, **changes), RETAIN: accuracy(RETAIN, retain)}


def cloze(value: float) -> dict[str, Any]:
    result = accuracy(CLOZE, value)
    result["correct_prob"] = result.pop("acc")
    del result["chance"]
    return {CLOZE: result}


class Folder:
    """A folder of runs, each a second younger than the one before."""

    def __init__(self, path: Path):
        self.path = path
        self.count = 0

    def add(self, kind: str, name: str, config: dict[str, Any], status: str = "complete", **fields: Any) -> Run:
        run = Run.create(kind, name, {"name": name, "out": str(self.path)} | config, self.path)
        self.count += 1
        run.update(status=status, created=f"2026-01-01T{self.count // 60:02d}:{self.count % 60:02d}:00+00:00", **fields)
        return run

    def unlearn(self, name: str, results: dict[str, Any] | None, status: str = "complete", **config: Any) -> Run:
        settings = {"model": "lab:final", "source": SOURCE["ref"], "retain_loss": "kl", "retain_coef": 5.0, "remove_coef": 20.0}
        settings |= {"lora": {"r": 16, "alpha": 16.0, "dropout": 0.05}, "lr": 1e-3, "layers": [0, 2]}
        fields: dict[str, Any] = {"parents": {"model": TARGET, "source": SOURCE}, "plan": {"steps": 128}}
        if results is not None:
            fields |= {"losses": {"cb_loss": 0.73456, "retain_kl_loss": 0.01239}, "evals": results}
        run = self.add("unlearn", name, settings | config, status, **fields)
        for step in range(1, 6):
            run.append("metrics.jsonl", {"step": step, "loss": 1.0, "cb_loss": 1 / step, "retain_kl_loss": 0.01 * step})
        return run

    def attack(self, name: str, ref: str, values: list[float], status: str = "complete", sha: str = "f" * 64) -> Run:
        run = self.add("tamper", name, {"model": ref, "lr": 3e-4}, status, parents={"model": {"ref": ref, "sha256": sha}})
        for i, value in enumerate(values):
            run.append("curve.jsonl", {"step": 10 * i, "evals": evals(value, 0.8)})
        if status == "complete":
            run.update(losses={"attack_loss": 0.5, "lost_updates": 0.125}, evals=evals(values[-1], 0.8), plan={"steps": 60})
        return run


@pytest.fixture
def study(tmp_path: Path) -> Folder:
    """A whole study: sweep, baseline, source, maps, a LoRA and a full-rank run, an attack and two controls."""
    folder = Folder(tmp_path / "runs")
    curve = [(700, 0.24, 0.5, "~Random"), (900, 0.26, 0.6, "~Random (latest viable)"), (1000, 0.5, 0.7, "Learning starts")]
    rows = [
        {"name": f"global_step{step}", "ref": f"lab:global_step{step}", "step": step, "evals": evals(f, r), "note": note}
        for step, f, r, note in curve
    ]
    folder.add("checkpoints", "sweep", {"model": "lab:final"}, checkpoints=rows, latest_ignorant=SOURCE["ref"])
    lora = folder.unlearn("lora", evals(0.2625, 0.7975) | cloze(0.21236))
    folder.unlearn("full", evals(0.3, 0.81), lora=None, lr=2e-4)
    scores = {str(n): {"r2": 0.9 - n / 10, "mse": 0.1, "no_map_r2": 0.2, "no_map_mse": 0.5} for n in (0, 2)}
    folder.add("affine", "maps", {"source": SOURCE["ref"]}, parents={"model": TARGET, "source": SOURCE}, scores=scores)
    folder.add("evaluate", "src", {"model": SOURCE["ref"]}, parents={"model": SOURCE}, evals=evals(0.26, 0.6))
    folder.add("evaluate", "base", {"model": "lab:final"}, parents={"model": TARGET}, evals=evals(0.9525, 0.8325) | cloze(0.8))
    folder.attack("hit", f"run:{lora.id}", [0.2625, 0.5, 0.9, 0.94])
    folder.attack("twin", "lab:filtered", [0.25, 0.26, 0.3, 0.4])
    folder.attack("fresh", "random:lab:final", [0.25, 0.25, 0.25, 0.24])
    return folder


def grid(markdown: str, title: str) -> list[list[str]]:
    """The cells of a markdown table, header first."""
    part = re.split(r"^## ", markdown, flags=re.M)
    body = next(p for p in part if p.startswith(title))
    lines = [line for line in body.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in cells}) == 1
    assert all(re.fullmatch(r"-{3,}[-:]", cell) for cell in cells[1])
    return [cells[0], *cells[2:]]


def rows_by_name(markdown: str, title: str) -> dict[str, dict[str, str]]:
    header, *rows = grid(markdown, title)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def markdown(folder: Folder) -> str:
    """What tables.md holds below its summary."""
    return "\n".join(table.markdown() for table in tables.all_tables(Study.load([str(folder.path)])))


def test_every_number_of_the_runs_table_is_the_one_of_run_json(study: Folder) -> None:
    rows = rows_by_name(markdown(study), "Runs")
    for path in study.path.glob("unlearn-*/run.json"):
        record = json.loads(path.read_text())
        row = rows[record["id"]]
        assert float(row["retain_coef"]) == record["config"]["retain_coef"]
        assert float(row["remove_coef"]) == record["config"]["remove_coef"]
        assert float(row["lr"]) == record["config"]["lr"]
        assert row["lora_r"] == ("16" if record["config"]["lora"] else "full")
        assert int(row["Steps"]) == record["plan"]["steps"]
        assert row["cb_loss"] == f"{record['losses']['cb_loss']:.4f}"
        assert row["retain_kl_loss"] == f"{record['losses']['retain_kl_loss']:.4f}"
        for task in (FORGET, RETAIN):
            assert row[task] == f"{100 * record['evals'][task]['acc']:.2f} %"
        assert row[CLOZE] == ("0.2124" if CLOZE in record["evals"] else "-")


def test_baseline_and_source_stand_first_whatever_the_order_of_the_runs(study: Folder) -> None:
    header, baseline, source, *rest = grid(markdown(study), "Runs")
    at = {name: header.index(name) for name in (FORGET, "retain_coef", "Steps", "regime")}
    assert (baseline[0], baseline[at[FORGET]], baseline[at["retain_coef"]]) == ("Baseline", "95.25 %", "-")
    assert (source[0], source[at[FORGET]], source[at["Steps"]]) == ("Source (global_step900)", "26.00 %", "-")
    assert [row[header.index("name")] for row in rest] == ["lora", "full"]
    assert "layers" not in header and "lr" in header


def test_regime_and_selectivity_of_a_run_follow_the_formula(study: Folder) -> None:
    rows = rows_by_name(markdown(study), "Runs")
    lora = next(row for row in rows.values() if row.get("name") == "lora")
    kept_forget, kept_retain = (0.2625 - 0.25) / (0.9525 - 0.25), (0.7975 - 0.25) / (0.8325 - 0.25)
    assert lora["selectivity"] == f"{kept_retain - kept_forget:.2f}"
    assert lora["regime"] == "selective"


def test_checkpoint_and_affine_tables(study: Folder) -> None:
    text = markdown(study)
    sweep = rows_by_name(text, "Checkpoint sweep")
    expected = {"Checkpoint": "global_step900", FORGET: "26.00 %", RETAIN: "60.00 %", "Notes": "~Random (latest viable)"}
    assert sweep["global_step900"] == expected
    maps = rows_by_name(text, "Affine maps")
    assert list(maps) == ["0", "2"]
    assert (maps["2"]["R²"], maps["2"]["R² without map"], maps["2"]["MSE"]) == ("0.7000", "0.2000", "0.1")


def test_tampering_table_reads_the_curve(study: Folder) -> None:
    rows = rows_by_name(markdown(study), "Tampering")
    attacked, twin, fresh = rows.values()
    assert attacked["Model"].startswith("lora (")
    assert twin["Model"] == "Control: filtered twin (lab:filtered)"
    assert fresh["Model"] == "Control: random weights (random:lab:final)"
    numbers = [attacked[c] for c in (f"Starting {FORGET}", "After 10 steps", "Highest", "Final (30 steps)", f"Final {RETAIN}")]
    assert numbers == ["26.25 %", "50.00 %", "94.00 %", "94.00 %", "80.00 %"]
    assert attacked["Lost updates"] == "12.5000 %"
    assert attacked["Notes"] == "Full recovery by step 30"
    share = round(100 * (0.4 - 0.25) / (0.9525 - 0.25))
    assert twin["Notes"] == f"{share} % of the gap recovered in 30 steps; full recovery not within 30 steps"


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ([0.25, 0.94, 0.3], "Full recovery by step 10"),
        ([0.25, 0.93, 0.3], "7 % of the gap recovered in 20 steps; full recovery not within 20 steps"),
        ([0.94, 0.95, 0.95], "no gap to recover: the start's interval holds the baseline"),
        ([], "not evaluated"),
    ],
)
def test_recovery_is_told_by_the_interval(study: Folder, values: list[float], note: str) -> None:
    run = study.attack("again", "lab:filtered", values or [0.3])
    if not values:
        (run.path / "curve.jsonl").unlink()
    attack = next(a for a in Study.load([str(study.path)]).attacks if a.run.id == run.id)
    assert recovery_note(attack, FORGET) == note


def test_source_under_attack_is_named_a_control(study: Folder) -> None:
    study.attack("early", SOURCE["ref"], [0.25, 0.3], sha=SOURCE["sha256"])
    assert Study.load([str(study.path)]).attacks[-1].label == f"Control: source ({SOURCE['ref']})"


def test_a_run_that_is_not_complete_shows_its_status_where_numbers_are_missing(study: Folder) -> None:
    run = study.unlearn("wild", None, "diverged", lr=1.0)
    run.update(reason="the loss was nan at step 3; lower lr")
    lost = study.unlearn("gone", None, "running")
    os.utime(lost.path / "run.json", (0, 0))
    text = markdown(study)
    rows = rows_by_name(text, "Runs")
    row = rows[f"{run.id} (diverged)"]
    assert {row[c] for c in ("cb_loss", FORGET, RETAIN, "regime", "selectivity")} == {"diverged"}
    assert row["Steps"] == "128"
    assert rows[f"{lost.id} (lost)"]["cb_loss"] == "lost"
    assert f"wild ({run.id}) diverged: the loss was nan at step 3; lower lr." in text


def test_an_attack_that_runs_has_no_final_result_yet(study: Folder) -> None:
    run = study.attack("now", "lab:filtered", [0.25, 0.3], status="failed")
    run.update(reason="out of memory")
    header, *rows = grid(markdown(study), "Tampering")
    row = dict(zip(header, rows[-1], strict=True))
    assert (row["After 10 steps"], row["Final"], row["Lost updates"]) == ("30.00 %", "failed", "failed")


def test_degenerate_results_are_marked(study: Folder) -> None:
    run = study.unlearn("letter", evals(0.26, 0.8, degenerate=True))
    text = markdown(study)
    row = rows_by_name(text, "Runs")[run.id]
    assert (row[FORGET], row["regime"]) == ("26.00 %†", "selective†")
    assert "† degenerate" in text


@pytest.mark.parametrize(
    "change", [{"fingerprint": "other"}, {"version": 2}, {"num_fewshot": 5}, {"n": 100}], ids=lambda c: next(iter(c))
)
def test_numbers_measured_differently_stand_in_a_table_of_their_own(
    study: Folder, tmp_path: Path, change: dict[str, Any]
) -> None:
    run = study.unlearn("odd", evals(0.31, 0.8, **change))
    text = markdown(study)
    row = rows_by_name(text, "Runs")[run.id]
    assert (row[FORGET], row["regime"], row[RETAIN]) == (MISSING, MISSING, "80.00 %")
    (apart,) = grid(text, "Measured in another way")[1:]
    assert apart[:4] == [f"unlearn odd ({run.id})", "", FORGET, "31.00 %"]
    key, value = next(iter(change.items()))
    assert apart[4].startswith(f"{key} {value}, not ")
    assert "of odd: measured in another way" in text and "31.00 %" not in text.split("## Measured")[0]
    assert "Of 1 run numbers were measured in another way" in " ".join(headline.headline(Study.load([str(study.path)])))


def test_of_two_ways_that_stays_in_which_more_models_were_measured(study: Folder) -> None:
    """Quick looks at the baseline, however many, do not push out the numbers of the study; nor does an attack's curve."""
    for number in range(5):
        quick = {"parents": {"model": TARGET}, "evals": evals(0.9, 0.8, n=50)}
        study.add("evaluate", f"quick{number}", {"model": "lab:final"}, **quick)
    before = markdown(study)
    assert rows_by_name(before, "Runs")["Baseline"][FORGET] == "95.25 %"
    assert len(grid(before, "Measured in another way")) == 1 + 5 and "## Evaluations" not in before
    run = study.attack("odd", "lab:filtered", [0.3, 0.9])
    lines = [json.dumps({"step": 10 * i, "evals": evals(value, 0.8, n=50)}) for i, value in enumerate((0.3, 0.9))]
    (run.path / "curve.jsonl").write_text("\n".join(lines))
    header, *rows = grid(markdown(study), "Tampering")
    assert "90.00 %" not in dict(zip(header, rows[-1], strict=True)).values()
    apart = [row for row in grid(markdown(study), "Measured in another way") if run.id in row[0] and row[2] == FORGET]
    assert [(row[1], row[3]) for row in apart] == [("step 0", "30.00 %"), ("step 10", "90.00 %")]


def test_a_baseline_evaluated_twice_gives_one_row_with_all_tasks(study: Folder) -> None:
    more = {"lab_retain_stem": accuracy("lab_retain_stem", 0.7)}
    study.add("evaluate", "more", {"model": "lab:final"}, parents={"model": TARGET}, evals=more)
    text = markdown(study)
    baseline = rows_by_name(text, "Runs")["Baseline"]
    assert (baseline[FORGET], baseline["lab_retain_stem"]) == ("95.25 %", "70.00 %")
    assert "## Evaluations" not in text


def test_other_evaluations_have_their_own_table(study: Folder) -> None:
    other = {"model": {"ref": "org/other", "sha256": "c" * 64}}
    run = study.add("evaluate", "other", {"model": "org/other"}, parents=other, evals=evals(0.4, 0.5))
    header, row = grid(markdown(study), "Evaluations")
    assert (row[0], row[header.index("Job ID")], row[header.index(RETAIN)]) == ("org/other", run.id, "50.00 %")


def test_refusals_come_before_anything_is_written(study: Folder, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    a_run = next(study.path.glob("unlearn-*"))
    before = sorted(path.name for path in a_run.iterdir())
    for runs, out in ((tmp_path / "empty", tmp_path / "x"), (tmp_path / "none", tmp_path / "x"), (study.path, a_run)):
        with pytest.raises(LetheError) as refusal:
            report(ReportConfig([str(runs)], str(out)))
        assert "\n" not in str(refusal.value)
    assert not (tmp_path / "x").exists()
    assert sorted(path.name for path in a_run.iterdir()) == before


def test_a_second_report_replaces_the_first(study: Folder, tmp_path: Path) -> None:
    made = report(ReportConfig([str(study.path)], str(tmp_path / "out")))
    names = {"checkpoints", "losses", "forget-retain", "tamper"}
    assert made["tables"].read_text().endswith(markdown(study))
    assert {path.name for path in made["charts"].iterdir()} == {f"{n}.{kind}" for n in names for kind in ("svg", "png")}
    (made["charts"] / "my-figure.png").write_bytes(b"mine")
    single = next(study.path.glob("evaluate-base-*"))
    made = report(ReportConfig([str(single)], str(tmp_path / "out")))
    assert [path.name for path in made["charts"].iterdir()] == ["my-figure.png"]
    assert "Runs\n" not in made["tables"].read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"tables.md", "index.html", "charts", ".report.json"}


def test_a_page_that_is_no_reports_is_not_replaced(study: Folder, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("my own page")
    with pytest.raises(LetheError, match=r"holds a file index\.html that this version of Lethe has not written"):
        report(ReportConfig([str(study.path)], str(tmp_path / "site")))
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["index.html"]
    assert (tmp_path / "site" / "index.html").read_text() == "my own page"


def test_regimes_are_told_by_the_thresholds_of_the_sweep(study: Folder) -> None:
    """Of retain 0.8325 a run keeps 0.72, that is (0.72 − 0.25) / (0.8325 − 0.25) = 0.81."""
    run = study.unlearn("less", evals(0.26, 0.72))
    assert rows_by_name(markdown(study), "Runs")[run.id]["regime"] == "partial"
    study.add("sweep", "loose", {"kept_threshold": 0.75, "chance_threshold": 0.1})
    text = markdown(study)
    assert rows_by_name(text, "Runs")[run.id]["regime"] == "selective" and "reaches 0.75" in text
    study.add("sweep", "strict", {"kept_threshold": 0.95, "chance_threshold": 0.1})  # two that differ: the usual ones
    assert "reaches 0.9," in markdown(study)


def test_the_page_loads_nothing_and_leads_with_the_result(study: Folder, tmp_path: Path) -> None:
    study.unlearn("<script>alert(1)</script>", evals(0.5, 0.6))
    text = report(ReportConfig([str(study.path)], str(tmp_path / "out"), title="A & B"))["page"].read_text()
    markup = re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", text, flags=re.S)
    assert not re.search(r"<(script|img|iframe|link|source|embed|object|image|use)\b[^>]*\b(src|href|data|srcset)\s*=", markup)
    assert not re.search(r"@import|url\(\s*['\"]?(https?:|//)", markup)
    assert "default-src 'none'" in text
    assert "<script>alert(1)" not in text
    assert "<h1>A &amp; B</h1>" in text
    result = text.split('<section class="result">')[1].split("</section>")[0]
    assert f"{FORGET} 95.2 % → 26.2 %" in result and f"{RETAIN} 83.2 % → 79.8 %" in result
    assert "An attack of 30 steps" in result and "Full recovery by step 30" in result
    assert markup.count("<table>") == markdown(study).count("## ")


def test_a_table_escapes_what_would_break_it() -> None:
    table = Table("T", ["a", "b"], [["x|y", "1\n2"]], ["a note"])
    assert grid(table.markdown(), "T")[1] == ["x\\|y", "1 2"]
    assert "<td>&lt;b&gt;</td>" in Table("T", ["a"], [["<b>"]]).html()


def test_terminal_tables_are_the_same_ones(study: Folder) -> None:
    from rich.console import Console

    console = Console(width=240, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    runs = Study.load([str(study.path)]).runs
    for table in [*tables.terminal(runs), tables.runs_table(entries(runs)), tables.evals_table(evals(0.5, 0.6))]:
        console.print(table)
    text = console.export_text()
    for expected in ("26.25 %", "Full recovery by step 30", "latest ignorant: lab:global_step900", "48.00 to 52.00 %"):
        assert expected in text


def test_plan_table_has_a_row_for_each_part() -> None:
    plan = {"steps": 1280, "memory": {"weights": 2_000_000}, "layers": {"0": "output of block 0"}, "no_gradient": []}
    assert tables.plan_table(plan).rows == [
        ["steps", "", "1,280"],
        ["memory", "weights", "2 MB"],
        ["layers", "0", "output of block 0"],
        ["no_gradient", "", "[]"],
    ]


def test_lab_table_marks_the_onset_and_the_twin(tmp_path: Path) -> None:
    rows = [
        {"name": f"global_step{s}", "step": s, "tokens": 100 * s, "evals": evals(f, 0.5)} for s, f in ((10, 0.25), (20, 0.7))
    ]
    twin = {"name": "filtered", "step": 20, "tokens": 2000, "evals": evals(0.25, 0.5)}
    run = Folder(tmp_path).add("lab", "nano", {"onset": 10}, checkpoints=rows, filtered=twin)
    cells = rows_by_name(tables.lab_table(run).markdown(), "Lab")
    assert "onset" in cells["global_step10"]["Notes"] and "onset" not in cells["filtered"]["Notes"]
    assert (cells["global_step20"][FORGET], cells["global_step20"]["Tokens"]) == ("70.00 %", "2,000")
    assert "twin" in cells["filtered"]["Notes"]


BEFORE = {"forget": accuracy(FORGET, 0.85), "retain": accuracy(RETAIN, 0.75)}


@pytest.mark.parametrize(
    ("forget", "retain", "half", "expected"),
    [
        (0.84, 0.74, 0.02, "neither"),  # kept 0.98 and 0.98
        (0.26, 0.25, 0.02, "both"),  # 0.02 and 0
        (0.26, 0.74, 0.02, "selective"),  # 0.02 and 0.98
        (0.84, 0.30, 0.02, "inverted"),  # 0.98 and 0.1
        (0.70, 0.40, 0.02, "inverted"),  # 0.75 and 0.3
        (0.55, 0.70, 0.02, "partial"),  # 0.5 and 0.9
        (0.26, 0.65, 0.02, "partial"),  # retain 0.8, its interval ends at 0.84
        (0.26, 0.65, 0.06, "selective"),  # retain 0.8, its interval ends at 0.92
        (0.20, 0.74, 0.02, "selective"),  # below chance is ignorant too
        (0.55, 0.65, 0.36, "partial"),  # intervals hold both thresholds: nothing can be told
        (0.55, 0.49, 0.02, "partial"),  # 0.5 and 0.48: the difference is within the noise
    ],
)
def test_regimes(forget: float, retain: float, half: float, expected: str) -> None:
    kept_forget = regimes.retained_share(accuracy(FORGET, forget, half), BEFORE["forget"])
    kept_retain = regimes.retained_share(accuracy(RETAIN, retain, half), BEFORE["retain"])
    assert kept_forget is not None and kept_retain is not None
    assert kept_forget.value == pytest.approx((forget - 0.25) / 0.6)
    assert regimes.regime(kept_forget, kept_retain) == expected


def test_selectivity_and_its_interval() -> None:
    forget, retain = regimes.Estimate(0.1, 0.06, 0.13), regimes.Estimate(0.9, 0.86, 0.93)
    found = regimes.selectivity(forget, retain)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.8 - 0.05, 0.8 + 0.05))


def test_thresholds_are_settings_and_a_baseline_at_chance_keeps_nothing() -> None:
    forget, retain = regimes.Estimate(0.3, 0.28, 0.32), regimes.Estimate(0.7, 0.68, 0.72)
    assert regimes.regime(forget, retain) == "partial"
    assert regimes.regime(forget, retain, retained_threshold=0.7, chance_threshold=0.3) == "selective"
    assert regimes.retained_share(accuracy(FORGET, 0.5), accuracy(FORGET, 0.26)) is None


def test_tasks_are_told_by_name() -> None:
    assert regimes.forget_task(["lab_forget", "lab_forget_robust", "wmdp_bio"]) == "lab_forget_robust"
    assert regimes.forget_task(["wmdp_bio", "wmdp_bio_robust"]) == "wmdp_bio_robust"
    assert (regimes.retain_task(["lab_retain", "mmlu"]), regimes.retain_task(["mmlu_stem"])) == ("mmlu", None)


def test_importing_reports_leaves_torch_out() -> None:
    heavy = "{'torch', 'transformers', 'lm_eval'}"
    modules = "sys, lethe.report, lethe.report.page, lethe.report.tables, lethe.results.regimes"
    code = f"import {modules}; print(*{heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.mark.slow
def test_the_page_draws_its_charts_in_a_browser(study: Folder, tmp_path: Path) -> None:
    browser = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    page = report(ReportConfig([str(study.path)], str(tmp_path / "out")))["page"]
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'} --virtual-time-budget=8000"
    done = subprocess.run(
        [browser, *flags.split(), "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    for name in ("checkpoints", "losses", "forget-retain", "tamper"):
        figure = re.search(rf'<div class="chart[^"]*vega-embed[^"]*" id="chart-{name}"[^>]*>(.*?)</figure>', done.stdout, re.S)
        assert figure, f"chart {name} was not drawn by its script"
        assert re.search(r"<(svg|canvas)[^>]*class=\"marks\"", figure[1])


def test_attacks_on_one_model_stand_in_a_table_of_their_own_with_the_steps_of_the_longest():
    short = SimpleNamespace(
        label="m", run=run_of("AdamW (short)", "adamw", "complete"), points=lambda task: POINTS[:2], curve=CURVE[:2]
    )
    long = SimpleNamespace(label="m", run=run_of("Muon", "muon", "running"), points=lambda task: POINTS, curve=CURVE)
    (table,) = attack_tables([short, long])
    assert table.title == "Attacks on m"
    assert table.columns[:5] == ["Attack", "Optimizer", "Step 0", "Step 100", "Step 500"]
    assert table.rows[0] == ["AdamW (short)", "adamw", "26.50 %", "26.60 %", "-", "26.60 % (step 100)", "complete"]
    assert table.rows[1] == ["Muon", "muon", "26.50 %", "26.60 %", "28.90 %", "-", "running"]
    assert table.notes[0] == "Starting wmdp_bio_robust: 26.50 %"


POINTS = [(step, {"acc": acc}) for step, acc in ((0, 0.265), (100, 0.266), (500, 0.289))]
CURVE = [{"step": step, "evals": {"wmdp_bio_robust": evaluated}} for step, evaluated in POINTS]


def run_of(name: str, optimizer: str, status: str) -> SimpleNamespace:
    """A run as the table reads it."""
    record = {"name": name, "config": {"optimizer": optimizer}}
    return SimpleNamespace(id=name, status=status, record=record)


def test_an_attack_named_after_its_model_is_not_taken_for_it_and_attacks_on_attacked_models_lead_back(study):
    """`run:unlearn-lora` is a part of the folder's name of an attack that is called run-unlearn-lora, too."""
    lora = next(run for run in Study.load([str(study.path)]).runs if run.record["name"] == "lora")
    first = study.attack("run-unlearn-lora", "run:unlearn-lora", [0.26, 0.9])
    study.attack("again", f"run:{first.id}", [0.9, 0.95])
    loaded = Study.load([str(study.path)])
    found = {attack.run.record["name"]: attack for attack in loaded.attacks}
    assert found["run-unlearn-lora"].unlearned.id == lora.id
    assert found["again"].before[-1].id == first.id
    assert found["again"].baseline is not None and found["again"].control is None


def suite(folder: Folder, ref: str, name: str, rows: list[tuple[float, float]], status: str = "complete", **config: Any) -> Run:
    """An attack of a suite on a model, its curve as pairs of forget and retain accuracy."""
    sha = {"lab:filtered": "e" * 64}.get(ref, "f" * 64)
    strengths = config.get("strengths", [])
    settings = {"model": ref, "seed": 0} | config
    run = folder.add("tamper", name, settings, status, parents={"model": {"ref": ref, "sha256": sha}})
    for i, (forget, retain) in enumerate(rows):
        facts = {"strength": [0, *strengths][i], "tokens": 0} if strengths else {}
        run.append("curve.jsonl", {"step": i if strengths else 10 * i} | facts | {"evals": evals(forget, retain)})
        if i and not strengths:
            run.append("metrics.jsonl", {"step": 10 * i, "attack_tokens": 1000})
    return run


@pytest.fixture
def suites(study: Folder) -> Folder:
    """Three attacks on an unlearned model and two of them on the filtered twin; one of those is cut short."""
    for path in study.path.glob("tamper-*"):
        shutil.rmtree(path)
    ref = f"run:{next(study.path.glob('unlearn-lora-*')).name.rsplit('-', 1)[1]}"
    suite(study, ref, "full", [(0.26, 0.80), (0.5, 0.79), (0.9, 0.6)], lr=1e-3)
    suite(study, ref, "low", [(0.26, 0.80), (0.4, 0.80), (0.45, 0.76)], lr=1e-5)
    suite(study, ref, "noise", [(0.26, 0.80), (0.3, 0.7)], attack="noise", strengths=[0.4])
    suite(study, "lab:filtered", "full", [(0.25, 0.78), (0.27, 0.78), (0.3, 0.78)], lr=1e-3)
    suite(study, "lab:filtered", "low", [(0.25, 0.78)], "failed", lr=1e-5).update(reason="out of memory")
    return study


def test_worst_case_table_names_the_attack_and_what_is_not_measured(suites: Folder) -> None:
    text = markdown(suites)
    attacked, twin = rows_by_name(text, "Worst case").values()
    assert attacked["Model"].startswith("lora (") and twin["Model"] == "Control: filtered twin (lab:filtered)"
    picked = ["Worst case", "Worst attack", "At", "Measured", "Above filtered twin, points"]
    assert [attacked[name] for name in picked[:4]] == ["50.00 %", "full", "step 10, 1,000 tokens", "3 of 3"]
    assert attacked["lab_retain lost"] == "+1.0 points" and attacked["Recovered"] == f"{100 * 0.24 / (0.9525 - 0.26):.0f} %"
    assert attacked[picked[4]].startswith("+23.0 (")
    assert [twin[name] for name in picked[:4]] == ["30.00 %", "full", "step 20, 2,000 tokens", "1 of 3"]
    assert "low is not measured to its end: failed: out of memory." in text
    assert "noise is not measured to its end: not run on this model." in text
    assert "no evaluation within the bound under noise." in text
    assert "0.4: 30.00 %" in text


def test_a_suites_own_bound_decides(suites: Folder) -> None:
    for path in suites.path.glob("tamper-*"):
        Run.open(path).update(suite={"name": "standard", "general_bound": 0.25})
    attacked, _ = rows_by_name(markdown(suites), "Worst case").values()
    assert (attacked["Worst case"], attacked["lab_retain lost"]) == ("90.00 %", "+20.0 points")


def test_attacks_equal_but_for_the_seed_are_one_row_and_one_curve(suites: Folder) -> None:
    ref = f"run:{next(suites.path.glob('unlearn-lora-*')).name.rsplit('-', 1)[1]}"
    suite(suites, ref, "full", [(0.26, 0.80), (0.6, 0.79), (0.9, 0.6)], lr=1e-3, seed=1)
    suite(suites, ref, "full", [(0.26, 0.80), (0.9, 0.79)], "failed", lr=1e-3, seed=2).update(reason="killed")
    loaded = Study.load([str(suites.path)])
    full = next(s for s in loaded.series if s.attack == "full" and s.control is None)
    assert len(full.attacks) == 3 and full.reason == "seed 2 failed: killed"
    assert [point.value for point in full.points_of(FORGET)] == pytest.approx([0.26, 0.55, 0.9])  # of the two that are whole
    attacked, _ = rows_by_name(markdown(suites), "Worst case").values()
    assert (attacked["Worst case"], attacked["Worst attack"]) == ("90.00 %", "full, seed 2")  # what it reached, it reached
    assert attacked["Measured"] == "3 of 4" and "full, seed 2 is not measured to its end: failed: killed." in markdown(suites)
    suite(suites, ref, "full", [(0.26, 0.80), (0.7, 0.79), (0.9, 0.6)], lr=1e-3, seed=2)
    again = next(s for s in Study.load([str(suites.path)]).series if s.attack == "full" and s.control is None)
    assert again.reason is None and again.points_of(FORGET)[1].value == pytest.approx(0.6)  # done again: the failed one is out
    header, *rows = grid(markdown(suites), "Recovery")
    assert [row[header.index("Seeds")] for row in rows if row[header.index("Attack")] == "full"] == ["3", "1"]


def above_the_twin(text: str) -> str:
    """What the recovery table says of the first attack `full`."""
    header, *rows = grid(text, "Recovery")
    row = next(row for row in rows if row[header.index("Attack")] == "full")
    return row[header.index("Above filtered twin, points")]


def test_only_a_filtered_model_is_the_twin_and_of_two_none_is_chosen(suites: Folder) -> None:
    curve = [(0.9, 0.80), (0.9, 0.79), (0.92, 0.79)]
    suite(suites, "EleutherAI/deep-ignorance-unfiltered", "full", curve, lr=1e-3)
    assert above_the_twin(markdown(suites)).startswith("+60.0 (")  # 0.9 − 0.3, and not 0.9 − 0.92
    suite(suites, "EleutherAI/deep-ignorance-e2e-strong-filter", "full", curve, lr=1e-3)
    text = markdown(suites)
    assert above_the_twin(text) == MISSING
    assert "Above none of several filtered twins" in text
    controls = {series.model: series.control for series in Study.load([str(suites.path)]).series}
    assert controls["EleutherAI/deep-ignorance-unfiltered"] is None
    assert controls["Control: filtered twin (EleutherAI/deep-ignorance-e2e-strong-filter)"]


def test_a_twin_that_was_not_measured_so_far_gives_no_number_beside_the_worst_case(suites: Folder) -> None:
    for path in suites.path.glob("tamper-full-*"):
        run = Run.open(path)
        if run.record["config"]["model"] == "lab:filtered":
            run.update(status="failed", reason="killed")
            lines = (path / "curve.jsonl").read_text().splitlines(keepends=True)
            (path / "curve.jsonl").write_text("".join(lines[:2]))
        run.update(suite={"name": "standard", "general_bound": 0.25})
    text = markdown(suites)
    attacked, _ = rows_by_name(text, "Worst case").values()
    assert (attacked["Worst case"], attacked["Above filtered twin, points"]) == ("90.00 %", MISSING)
    assert above_the_twin(text).endswith(", at 1,000 tokens")


def test_models_of_one_name_and_different_weights_are_different_models(suites: Folder) -> None:
    again = suite(suites, "lab:filtered", "full", [(0.25, 0.78), (0.9, 0.78)], lr=1e-3, seed=1)
    again.update(parents={"model": {"ref": "lab:filtered", "sha256": "7" * 64}})
    models = [series.model for series in Study.load([str(suites.path)]).series if series.control]
    assert sorted(set(models)) == [f"Control: filtered twin (lab:filtered), weights {letter * 8}" for letter in "7e"]


def test_a_run_that_an_attack_names_is_that_of_its_own_folder(study: Folder, tmp_path: Path) -> None:
    other = Folder(tmp_path / "other")
    runs = {}
    for folder in (study, other):
        runs[folder] = (
            next(iter(folder.path.glob("unlearn-lora-*")), None) or folder.add("unlearn", "lora", {"model": "m"}).path
        )
        folder.attack("here", "run:unlearn-lora", [0.3])
    loaded = Study.load([str(study.path), str(other.path)])
    for attack in loaded.attacks:
        if attack.run.record["name"] == "here":
            assert attack.unlearned.path.parent.resolve() == attack.run.path.parent.resolve()


def test_an_attack_that_did_not_end_is_not_told_as_one_that_did(study: Folder) -> None:
    for path in study.path.glob("tamper-*"):
        Run.open(path).update(status="failed", reason="killed")
    text = " ".join(headline.headline(Study.load([str(study.path)])))
    assert "failed after step" in text and "An attack of" not in text


def test_an_attack_on_an_attacked_model_counts_from_the_model_before_both(suites: Folder) -> None:
    benign = suite(suites, "lab:filtered", "benign", [(0.25, 0.78), (0.26, 0.79)], forget="lab:retain")
    suite(suites, f"run:{benign.id}", "then", [(0.26, 0.79), (0.4, 0.70)], lr=2e-3)
    (then,) = (series for series in Study.load([str(suites.path)]).series if series.attack == "then")
    assert then.model == "Control: filtered twin (lab:filtered)" and then.control
    places = [(point.step, point.tokens, point.value) for point in then.points_of(FORGET)]
    assert places == [(0, 0, 0.25), (10, 1000, 0.26), (20, 2000, 0.4)]
    attack = next(a for a in Study.load([str(suites.path)]).attacks if a.run.record["name"] == "then")
    assert attack.label == "Control: filtered twin (lab:filtered), after benign"


def test_charts_of_a_suite_show_every_cell_and_the_page_leads_with_the_worst_case(suites: Folder, tmp_path: Path) -> None:
    loaded = Study.load([str(suites.path)])
    cells = {(c["model"], c["attack"]): c["text"] for c in worst_cells(loaded, loaded.series, FORGET, RETAIN)}
    twin = "Control: filtered twin"
    assert [cells["lora", name] for name in ("full", "low", "noise", "worst case")] == ["50", "45", "26", "50"]
    assert [cells[twin, name] for name in ("full", "low", "noise", "worst case")] == ["30", "–", "–", "≥ 30"]
    made = report(ReportConfig([str(suites.path)], str(tmp_path / "out")))
    names = {path.stem for path in made["charts"].iterdir()}
    assert {"tamper", "tamper-general", "worst-case"} <= names
    assert "Worst case over 3 attacks: lab_forget_robust 26.0 % → 50.0 % (by full, step 10" in made["page"].read_text()


# --- other people's files and names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        '["../victim.txt", "mine.txt", "charts"]',  # a list of names alone, as of old
        '{"files": {"../victim.txt": ["SHA"], "mine.txt": ["SHA"], "/tmp/x": ["SHA"], "charts/../../victim.txt": ["SHA"]}}',
        '{"files": {"charts/victim.svg": ["SHA"], "charts/other.svg": [7], "charts/linked.svg": ["SHA"]}}',
        '{"files": {"charts/other.svg": 5, "tables.md": null}}',
        "{",
        "7",
        '"\\ud800"',
        "[" * 100_000,
    ],
)
def test_a_report_removes_nothing_but_what_a_report_has_written(study: Folder, tmp_path: Path, written: str) -> None:
    out = tmp_path / "out"
    (out / "charts").mkdir(parents=True)
    victim = tmp_path / "victim.txt"
    for path in (victim, out / "mine.txt", out / "charts" / "other.svg"):
        path.write_text("mine")
    (out / "charts" / "linked.svg").symlink_to(victim)
    (out / ".report.json").write_text(written.replace("SHA", hashlib.sha256(b"mine").hexdigest()))
    single = next(study.path.glob("evaluate-base-*"))
    report(ReportConfig([str(single)], str(out)))
    assert (out / "tables.md").exists()
    for path in (victim, out / "mine.txt", out / "charts" / "other.svg", out / "charts" / "linked.svg"):
        assert path.read_text() == "mine"


def test_what_somebody_has_changed_in_a_report_stays_and_is_named(
    study: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, single = tmp_path / "out", next(study.path.glob("evaluate-base-*"))
    files = {"index.html": b"page", "tables.md": b"tables", "charts/losses.svg": b"<svg/>", "charts/losses.png": b"png"}
    _write(out, files, {})
    (out / "charts" / "losses.svg").write_text("<svg>my words</svg>")
    report(ReportConfig([str(single)], str(out)))
    assert [path.name for path in (out / "charts").iterdir()] == ["losses.svg"]
    assert "losses.svg is not as a report has written it" in caplog.text
    (out / "tables.md").write_text("my tables")
    with pytest.raises(LetheError, match=r"tables\.md that is not as a report has written it"):
        report(ReportConfig([str(single)], str(out)))
    assert (out / "tables.md").read_text() == "my tables"


def test_a_report_does_not_write_through_a_link(study: Folder, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "charts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LetheError, match="is a link"):
        report(ReportConfig([str(study.path)], str(tmp_path / "out")))
    assert not list((tmp_path / "elsewhere").iterdir())


HOSTILE = "\x1b]0;x\x07\x00\x1b[31m\ud800\ufffe\n# H <b>i</b> </script><script>alert(1)</script> [l](http://e.x) `a|b` *c* \"'>"


def test_names_and_reasons_that_are_no_plain_text_are_shown_and_break_nothing(study: Folder, tmp_path: Path) -> None:
    """Tables, page and charts of them; the library that draws charts ends the process where it is given such a character."""
    run = study.unlearn("hostile", evals(0.5, 0.6), "diverged")
    attack = study.attack("hit", f"run:{run.id}", [0.5, 0.6])
    for each in (run, attack):
        record = json.loads((each.path / "run.json").read_text())
        record |= {"name": HOSTILE, "reason": HOSTILE, "config": record["config"] | {"lr": HOSTILE}}
        (each.path / "run.json").write_text(json.dumps(record))
    made = report(ReportConfig([str(study.path)], str(tmp_path / "out"), title="".join(filter(str.isprintable, HOSTILE))))
    text, markup = made["tables"].read_text(), made["page"].read_text()
    files = [text, markup, *(path.read_text() for path in made["charts"].glob("*.svg"))]
    assert not any(re.search("[\x00-\x08\x0b-\x1f\x7f\ufffe\ud800]", file) for file in files)
    assert "alert(1)" in markup and "<script>alert" not in markup and "<b>i</b>" not in markup
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inside = {child.type for token in tokens for child in token.children or []}
    assert inside <= {"text", "text_special"}  # no link, HTML, code or emphasis
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(headings) == 1 + markdown(study).count("\n## ") + 1 and not any(title.startswith("H ") for title in headings)
    columns = [len(row) for row in grid(text, "Runs")]
    assert len(set(columns)) == 1


@pytest.mark.parametrize("number", [-5, 1.5, 1e18])
def test_numbers_that_are_no_accuracy_stand_apart_and_break_no_chart(study: Folder, tmp_path: Path, number: float) -> None:
    run = study.unlearn("wild", evals(0.5, 0.6), lr=number)
    record = json.loads((run.path / "run.json").read_text())
    record["evals"][FORGET]["acc"] = number
    record["losses"]["cb_loss"] = math.inf
    (run.path / "run.json").write_text(json.dumps(record))
    loaded = Study.load([str(study.path)])
    text = "\n".join(table.markdown() for table in tables.all_tables(loaded))
    assert any(run.id in row[0] and row[4] == "no number from 0 to 1" for row in grid(text, "Measured in another way"))
    assert len(text) < 40_000
    json.dumps({name: chart.to_dict() for name, (_, chart) in all_charts(loaded).items()}, allow_nan=False)


def test_a_table_for_the_terminal_holds_no_control_characters() -> None:
    table = Table("T\x1b[31m", ["a\x07"], [["[bold]b\x1b]0;t\x07"]], ["n\x9b"], "l\x00")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", table.text())
    assert "[bold]b" in table.text()


def test_a_report_of_many_runs_draws_what_can_be_read_and_lists_the_rest(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "runs")
    folder.add("evaluate", "base", {"model": "lab:final"}, parents={"model": TARGET}, evals=evals(0.95, 0.83))
    for number in range(30):
        run = folder.unlearn(f"run{number}", evals(0.3, 0.8), lr=1e-3 + number)
        suite(folder, f"run:{run.id}", f"a{number}", [(0.3, 0.8), (0.5, 0.8)], lr=1e-5 * (number + 1))
    suite(folder, "lab:filtered", "a0", [(0.25, 0.8), (0.3, 0.8)], lr=1e-5)
    loaded = Study.load([str(folder.path)])
    charts = all_charts(loaded)
    assert "Shown: 16 of 31 models and 12 of 30 attacks" in charts["worst-case"][0]
    assert any(cell["model"] == "Control: filtered twin" for cell in charts["worst-case"][1].to_dict()["datasets"].popitem()[1])
    text = "\n".join(table.markdown() for table in tables.all_tables(loaded))
    assert len(grid(text, "Worst case")) == len(grid(text, "Tampering")) == 1 + 31
    assert text.count("not run on this model") <= 31 * 10
