"""Importing a hand-kept log: every kind of cell, what rows inherit, and nothing that cannot be read goes unsaid."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from lethe.cli import main
from lethe.config import ImportConfig, ReportConfig, ResumeConfig
from lethe.errors import LetheError
from lethe.report import report
from lethe.results.listing import Entry
from lethe.runs.importing import Imported, import_log
from lethe.runs.logbook import column, read
from lethe.runs.run import Run, find_runs
from lethe.sweeps.resuming import resume

LOG = Path(__file__).parent / "data" / "log.md"
HEAD = "| Job ID | retain_coef | cb_loss | MMLU |\n|---|---|---|---|\n"
AT_512 = ["remove_coef=5", "steps=512"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return import_log(ImportConfig(str(LOG), out=str(tmp_path_factory.mktemp("log") / "runs")))


@pytest.fixture
def take(tmp_path: Path):
    """take(text): what importing this text does."""

    def do(text: str, **settings: Any) -> Imported:
        (tmp_path / "notes.md").write_text(text)
        return import_log(ImportConfig(str(tmp_path / "notes.md"), out=str(tmp_path / "runs"), **settings))

    return do


def one(imported: Imported, **facts: Any) -> dict[str, Any]:
    """The record of the one run with these facts."""
    found = [run for run in imported.new if all(run.record.get(name) == value for name, value in facts.items())]
    assert len(found) == 1, facts
    return json.loads((found[0].path / "run.json").read_text())


def curve(imported: Imported, name: str) -> dict[int, dict[str, Any]]:
    (run,) = [run for run in imported.new if run.record["name"] == name and run.record["kind"] == "tamper"]
    return {row["step"]: row["evals"] for row in run.rows("curve.jsonl")}


# --- the log ----------------------------------------------------------------------------------------------------------


def test_every_row_is_a_run_and_a_checkpoint_sweep_is_one(imported: Imported) -> None:
    kinds = [run.record["kind"] for run in imported.new]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "checkpoints": 1,
        "evaluate": 4,
        "unlearn": 4 + 6 + 1 + 5 + 2,
        "tamper": 2 + 3,
    }
    assert imported.unreadable == []
    assert [run.id for run in find_runs(imported.new[0].path.parent)] == [run.id for run in imported.new]


def test_percentages_fractions_bold_and_what_is_missing(imported: Imported) -> None:
    assert one(imported, job_id="2038118")["evals"] == {
        "wmdp_bio": {"acc": 0.3813},
        "wmdp_bio_robust": {"acc": 0.3848},
        "mmlu_stem": {"acc": 0.3641},
        "mmlu": {"acc": 0.4375},
    }
    assert one(imported, job_id="2038118")["losses"] == {"retain_kl_loss": 0.0022, "cb_loss": 0.7441}
    assert set(one(imported, job_id="2021158")["evals"]) == {"wmdp_bio", "mmlu_stem"}
    baseline = next(run.record for run in imported.new if run.record["name"] == "Baseline")
    assert baseline["evals"]["mmlu"] == {"acc": 0.451}
    assert baseline["config"] == {}
    assert one(imported, job_id="2038118")["imported"]["deprecated"] == ["mmlu_stem"]
    assert one(imported, job_id="2043897")["losses"] == {}


def test_nothing_about_how_a_number_was_measured_is_made_up(imported: Imported) -> None:
    for run in imported.new:
        assert run.record["launcher"] == "imported"
        results = [
            *run.record.get("evals", {}).values(),
            *(r for row in run.rows("curve.jsonl") for r in row["evals"].values()),
        ]
        assert all(set(result) <= {"acc", "correct_prob", "approximate"} for result in results)
        assert "steps" not in run.record.get("plan", {})
        assert run.record["started"] is run.record["heartbeat"] is None


def test_rows_inherit_settings_and_the_nearest_wins(imported: Imported) -> None:
    first, swept, epochs = (
        one(imported, job_id="2021158"),
        one(imported, job_id="2043897"),
        one(imported, name="ret5_rm8_320"),
    )
    fixed = {
        "affine": "EleutherAI/affine-checkpoint-transfer",
        "retain_loss": "kl",
        "lr": 1e-3,
        "layers": [5, 10, 15, 20, 25, 30],
    }
    for record, examples in ((first, 1024), (swept, 2048), (epochs, 1024)):
        assert fixed.items() <= record["config"].items()
        assert record["config"]["num_train_examples"] == examples
        assert record["imported"]["settings"]["house colour"] == "blue"
        assert "num_train_examples" in record["imported"]["inherited"]
    assert (swept["config"]["retain_coef"], swept["config"]["remove_coef"]) == (1, 12)
    assert "remove_coef" not in swept["imported"]["inherited"]
    assert (epochs["config"]["epochs"], epochs["config"]["gradient_accumulation_steps"]) == (10, 2)
    assert epochs["plan"] == {"effective_batch": 32}
    assert (epochs["imported"]["steps"], epochs["imported"]["steps_unit"]) == (320, "unknown")
    assert epochs["imported"]["group"] == "Epochs › 10 Epochs (320 steps)"


def test_rank_optimizer_and_rate_in_one_cell(imported: Imported) -> None:
    assert one(imported, job_id="2133707")["config"]["lora"] == {"r": 8, "alpha": 16, "dropout": 0.05}
    full = one(imported, job_id="2133785")
    assert (full["config"]["lora"], full["config"]["optimizer"], full["config"]["lr"]) == (None, "muon", 5e-4)
    assert one(imported, job_id="2133747")["config"]["lora"]["r"] == 16
    assert one(imported, job_id="2133712")["config"]["lr"] == 1e-3
    assert "lora" not in one(imported, job_id="2021158")["config"]


def test_words_in_place_of_numbers_are_statuses(imported: Imported) -> None:
    cancelled, diverged = one(imported, job_id="2133747"), one(imported, job_id="2133758")
    assert (cancelled["status"], cancelled["losses"], cancelled["evals"]) == ("cancelled", {}, {})
    assert (diverged["status"], diverged["losses"]) == ("diverged", {"retain_kl_loss": 0.0})
    assert diverged["evals"]["mmlu"] == {"acc": 0.2464}
    assert diverged["reason"] == "the log says 'diverged' under cb_loss"
    running = next(run for run in imported.new if run.record["name"].endswith("Muon (30ep)"))
    assert (running.record["status"], running.status) == ("running", "lost")  # nobody updated the row
    assert running.record["reason"] == "the log says 'Running' under Status"


def test_a_footnote_goes_to_the_rows_with_its_mark(imported: Imported) -> None:
    marked = [run.record["job_id"] for run in imported.new if "footnotes" in run.record["imported"]]
    assert marked == ["2133758"]
    assert one(imported, job_id="2133758")["imported"]["footnotes"][0].startswith("The optimizer had a fault")


def test_checkpoints(imported: Imported) -> None:
    sweep = one(imported, kind="checkpoints")
    assert sweep["latest_ignorant"] == "global_step54832"
    last, viable = sweep["checkpoints"][3], sweep["checkpoints"][2]
    assert last == {"name": "global_step57216", "step": 57216, "evals": {}, "note": "Learning starts"}
    assert viable["evals"] == {"wmdp_bio_robust": {"acc": 0.265}, "mmlu": {"acc": 0.2908}}


def test_attacks_have_curves(imported: Imported) -> None:
    near = {"acc": 0.42, "approximate": True}
    assert curve(imported, "ret5_rm5_512") == {
        0: {"wmdp": {"acc": 0.377}},
        10: {"wmdp": near},
        110: {"wmdp": near | {"acc": 0.43}},
    }
    assert list(curve(imported, "LoRA ret5_rm5_r16")) == [0, 10, 70]
    assert one(imported, name="LoRA ret5_rm5_r16")["imported"]["notes"] == "Full recovery by step 5"
    long = curve(imported, "ct_sft_muon_ret0_rm2000 AdamW (old long)")
    assert list(long) == [0, 100, 500, 1000, 5500]
    assert long[0] == {"wmdp": {"acc": 0.29}, "mmlu": {"acc": 0.293}}
    assert long[5500] == {"wmdp": {"acc": 0.289}, "mmlu": {"acc": 0.359}}
    assert curve(imported, "ct_sft_muon_ret0_rm2000 Muon (30ep)") == {0: long[0]}  # from the line above the table
    attack = one(imported, name="ct_sft_muon_ret0_rm2000 AdamW (old long)")
    assert attack["config"]["model"] == "ct_sft_muon_ret0_rm2000"
    assert (attack["config"]["lr"], attack["config"]["num_train_examples"]) == (2e-5, 512)
    assert (attack["config"]["optimizer"], attack["config"]["eval"]) == ("adamw", {"every": 100})
    assert attack["evals"] == long[5500]


def test_settings_of_unlearning_are_not_those_of_an_attack(imported: Imported) -> None:
    assert one(imported, kind="tamper", name="ret5_rm5_512")["config"] == {"model": "ret5_rm5_512"}


def test_numbers_of_the_prose_that_no_cell_holds_are_listed(imported: Imported) -> None:
    found = {(p["number"], p["section"]): p["hint"] for p in imported.prose}
    epochs, sweep = "Epochs", "Retain Coef Sweep (512 steps, remove=5)"
    assert "34.73% (MMLU)" in found["34.87 %", epochs]
    assert "under 'Runs'" in found["0.4375", sweep]
    assert "under 'Checkpoint Sweep'" in found["0.2419", "Runs"]
    expected = {
        ("34.87 %", epochs),
        ("0.4375", sweep),
        ("1 %", sweep),
        ("0.2419", "Runs"),
        ("0.2778", "Runs"),
        ("2.09", "LoRA"),
    }
    assert set(found) == expected


def test_a_table_that_is_not_about_runs_is_left_out_and_named(imported: Imported) -> None:
    assert [(s["columns"], s["line"]) for s in imported.skipped] == [(["Option", "Meaning"], 25)]


# --- asking it --------------------------------------------------------------------------------------------------------


def test_the_smallest_retain_coef_within_a_point(imported: Imported) -> None:
    assert smallest_retain_coef(imported.new, "mmlu", 0.4375, 0.01, AT_512) == 5
    assert smallest_retain_coef(imported.new, "mmlu", 0.4510, 0.01, AT_512) is None
    found = smallest(imported.new, "retain_coef", "mmlu", 0.4375, 0.01, AT_512)
    assert found is not None
    assert found[1][0].record["job_id"] in {"2038116", "2042651"}
    assert smallest_retain_coef(imported.new, "mmlu", 0.4375, 0.01, [*AT_512, "lora_r=16"]) is None


@pytest.mark.skipif("LETHE_LOG" not in os.environ, reason="LETHE_LOG names no log of a study")
def test_the_whole_log(tmp_path: Path) -> None:
    whole = import_log(ImportConfig(os.environ["LETHE_LOG"], out=str(tmp_path)))
    assert (len(whole.new), whole.unreadable, whole.skipped) == (60, [], [])
    assert smallest_retain_coef(whole.new, "mmlu", 0.4375, 0.01, AT_512) == 5
    assert smallest_retain_coef(whole.new, "mmlu", 0.4510, 0.01, AT_512) is None


def test_its_report_has_a_table_for_each_of_the_logs(imported: Imported, tmp_path: Path) -> None:
    made = report(ReportConfig([str(imported.new[0].path.parent)], out=str(tmp_path / "report")))
    text = made["tables"].read_text()
    titles = [line.removeprefix("## Imported: ") for line in text.splitlines() if line.startswith("## ")]
    assert titles[:4] == ["Checkpoint Sweep", "Runs", "Retain Coef Sweep (512 steps, remove=5)", "Tampering"]
    assert titles[5:7] == ["LoRA", "LoRA (2)"]
    for cell in ("~42.00 %", "43.75 %", "| diverged |", "Full recovery by step 5", "31.1447", "The optimizer had a fault"):
        assert cell in text
    assert "Imported: Runs" in made["page"].read_text()


def test_imported_and_measured_numbers_share_no_column(imported: Imported, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    import_log(ImportConfig(str(LOG), out=str(out)))
    measured = Run.create("evaluate", "base", {"model": "target"}, out)
    result = {"acc": 0.4444, "stderr": 0.01, "low": 0.42, "high": 0.46, "n": 100, "chance": 0.25, "fingerprint": "f"}
    measured.update(status="complete", evals={"mmlu": result}, parents={"model": {"ref": "target", "sha256": "a"}})
    text = report(ReportConfig([str(out)], out=str(tmp_path / "report")))["tables"].read_text()
    (part,) = [part for part in text.split("## ") if "44.44 %" in part]
    assert part.startswith("Evaluations")
    assert "45.10 %" not in part


def test_a_list_marks_imported_numbers(imported: Imported, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(imported.new[0].path.parent)
    assert main(["runs", folder, "--where", *AT_512, "mmlu>=0.4275", "--sort", "retain_coef", "--columns", "job", "mmlu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["2038116", "42.96", "%‡"]
    assert [line.split()[0] for line in lines[2:-1]] == ["2038116", "2042651", "2042650", "2042137", "2038118"]
    assert lines[-1].startswith("‡ imported")


def test_an_imported_run_cannot_be_resumed(imported: Imported) -> None:
    run = next(run for run in imported.new if run.status == "lost")
    with pytest.raises(LetheError, match=r"was imported from log\.md"):
        resume(ResumeConfig(str(run.path)))


# --- again ------------------------------------------------------------------------------------------------------------


def test_a_second_import_changes_nothing_and_a_changed_row_is_updated(take) -> None:
    text = HEAD + "| 11 | 5 | 0.5 | 40% |\n| 12 | 6 | 0.6 | 41% |\n"
    first = take(text)
    files = {run.path: (run.path / "run.json").stat().st_mtime_ns for run in first.new}
    again = take(text)
    assert (len(again.new), len(again.updated), len(again.unchanged)) == (0, 0, 2)
    assert {run.path: (run.path / "run.json").stat().st_mtime_ns for run in again.unchanged} == files
    changed = take(text.replace("41%", "39%") + "| 13 | 7 | - | Running |\n")
    assert [run.record["job_id"] for run in changed.updated] == ["12"]
    assert [run.record["job_id"] for run in changed.new] == ["13"]
    assert Entry(Run.open(changed.updated[0].path)).value("mmlu") == 0.39
    assert len(find_runs(first.new[0].path.parent)) == 3


def test_another_log_of_the_same_name_does_not_replace_the_first_but_a_moved_one_does(tmp_path: Path) -> None:
    settings = [tmp_path / who / "log.md" for who in ("alice", "bob")]
    for file, value in zip(settings, (0.3, 0.4), strict=True):
        file.parent.mkdir()
        file.write_text(HEAD + f"| 1 | 5 | 0.1 | {value} |\n")
    first = import_log(ImportConfig(str(settings[0]), out=str(tmp_path / "runs")))
    with pytest.raises(LetheError, match=r"has the runs of another log\.md"):
        import_log(ImportConfig(str(settings[1]), out=str(tmp_path / "runs")))
    assert Run.open(first.new[0].path).record["evals"]["mmlu"]["acc"] == 0.3
    settings[0].rename(tmp_path / "log.md")
    moved = import_log(ImportConfig(str(tmp_path / "log.md"), out=str(tmp_path / "runs")))
    assert len(moved.unchanged) == 1 and not moved.new


def test_lines_above_a_table_change_no_run_but_where_it_stands(take) -> None:
    take(HEAD + "| 11 | 5 | 0.5 | 40% |\n")
    moved = take("A word before.\n\n" + HEAD + "| 11 | 5 | 0.5 | 40% |\n")
    assert len(moved.unchanged) == 1
    assert Run.open(moved.unchanged[0].path).record["imported"]["line"] == 5


def test_a_row_taken_out_of_the_log_stays_and_is_named(take) -> None:
    take(HEAD + "| 11 | 5 | 0.5 | 40% |\n| 12 | 6 | 0.6 | 41% |\n")
    less = take(HEAD + "| 11 | 5 | 0.5 | 40% |\n")
    assert [run.record["job_id"] for run in less.gone] == ["12"]
    assert less.gone[0].path.exists()
    assert "no longer in the log" in less.text()


def test_equal_rows_without_a_job_are_two_runs(take) -> None:
    rows = "| retain_coef | MMLU |\n|---|---|\n| 5 | 40% |\n| 5 | 40% |\n"
    assert len({run.path for run in take(rows).new}) == 2
    assert len(take(rows).unchanged) == 2


# --- what cannot be read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "column", "cell"),
    [
        ("| 1 | 5 | 0.5 | about forty |", "MMLU", "about forty"),
        ("| 1 | 5 | 0.5 | 42.97 |", "MMLU", "42.97"),
        ("| 1 | 5 | 0.5 | 142% |", "MMLU", "142%"),
        ("| 1 | 5 | 0.5 | 41% / 42% |", "MMLU", "41% / 42%"),
        ("| 1 | 5 | 761K | 41% |", "cb_loss", "761K"),
        ("| 1 | five | 0.5 | 41% |", "retain_coef", "five"),
        ("| 1 | 5 (lion) | 0.5 | 41% |", "retain_coef", "5 (lion)"),
        ("| 1 | 5 | 0.5 |", "", "1 | 5 | 0.5"),
        ("| 1 | 5 | 0.5 | 41% | 42% |", "", "1 | 5 | 0.5 | 41% | 42%"),
    ],
)
def test_a_cell_that_cannot_be_read_is_listed_and_the_rest_of_its_row_kept(take, row: str, column: str, cell: str) -> None:
    made = take(HEAD + row + "\n| 2 | 6 | 0.6 | 41% |\n")
    assert [(u["line"], u["column"], u["cell"]) for u in made.unreadable] == [(3, column, cell)]
    assert len(made.new) == 2
    assert cell in made.text()
    assert made.new[0].record["job_id"] == "1"
    if column:
        assert Entry(made.new[0]).value(column) in {None, 5}
    assert made.answer()["unreadable"][0]["why"]


def test_an_unknown_column_is_listed_and_kept_as_text(take) -> None:
    made = take("| Job ID | retain_coef | MMLU | Mood |\n|---|---|---|---|\n| 1 | 5 | 41% | fine |\n")
    assert made.unreadable[0]["column"] == "Mood"
    assert made.new[0].record["imported"]["others"] == {"Mood": "fine"}


def test_a_second_column_of_the_same_meaning_is_listed_and_does_not_overwrite_the_first(take) -> None:
    made = take("| retain_coef | MMLU | mmlu |\n|---|---|---|\n| 5 | 41% | 42% |\n")
    assert made.new[0].record["evals"] == {"mmlu": {"acc": 0.41}}
    assert [u["column"] for u in made.unreadable] == ["mmlu"]


def test_links_and_code_in_cells(take) -> None:
    made = take("| Job ID | retain_coef | MMLU |\n|---|---|---|\n| [17](https://example.org/17) | `5` | 41% |\n")
    assert (made.new[0].record["job_id"], made.new[0].record["config"]["retain_coef"]) == ("17", 5)


def test_a_column_that_says_per_cent_needs_no_sign_in_its_cells(take) -> None:
    assert take("| retain_coef | MMLU (%) |\n|---|---|\n| 5 | 42.97 |\n").new[0].record["evals"] == {"mmlu": {"acc": 0.4297}}


def test_a_row_with_neither_result_nor_status_is_not_complete(take) -> None:
    record = take(HEAD + "| 1 | 5 | - | - |\n").new[0].record
    assert (record["status"], record["reason"]) == ("lost", "the log has neither a result nor a status")


def test_a_unit_of_steps_that_the_log_names_is_kept(take) -> None:
    made = take("| retain_coef | Updates | MMLU |\n|---|---|---|\n| 5 | 64 | 41% |\n").new[0].record
    assert made["plan"] == {"steps": 64}
    assert "steps" not in made["imported"]


def test_starting_values_that_contradict_a_cell_are_listed(take) -> None:
    text = "Starting WMDP: 26.5%\n\n| Attack | Step 0 WMDP | Step 9 WMDP |\n|---|---|---|\n| short | 27.5% | 28% |\n"
    made = take(text)
    assert made.new[0].rows("curve.jsonl")[0] == {"step": 0, "evals": {"wmdp": {"acc": 0.275}}}
    assert made.unreadable[0]["why"] == "the row's own value at step 0 is another"


def test_tasks_can_be_named(take) -> None:
    text = "| Model | Starting WMDP | Final WMDP (9 steps) | My quiz |\n|---|---|---|---|\n| a | 27% | 28% | 30% |\n"
    made = take(text, tasks={"WMDP": "wmdp_bio_robust", "my quiz": "quiz"})
    assert made.new[0].rows("curve.jsonl")[1]["evals"] == {"wmdp_bio_robust": {"acc": 0.28}}
    assert made.new[0].record["evals"]["quiz"] == {"acc": 0.3}
    with pytest.raises(LetheError, match="no column of the log is called 'wmpd'; did you mean 'wmdp'"):
        take(text, tasks={"WMPD": "wmdp_bio"})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "only words\n",
        "| a | b |\n",
        "| Option | Meaning |\n|---|---|\n| x | y |\n",
        f"```\n{HEAD}| 1 | 5 | 0.5 | 40% |\n```\n",
    ],
)
def test_a_file_without_a_table_of_runs_is_refused_and_nothing_lost(take, tmp_path: Path, text: str) -> None:
    before = take(HEAD + "| 11 | 5 | 0.5 | 40% |\n").new[0]
    with pytest.raises(LetheError, match="has no table of runs") as caught:
        take(text)
    assert "\n" not in str(caught.value)
    assert [run.id for run in find_runs(tmp_path / "runs")] == [before.id]


def test_files_that_cannot_be_read_and_folders_that_are_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LetheError, match="cannot be read"):
        import_log(ImportConfig(str(tmp_path / "none.md")))
    (tmp_path / "binary.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LetheError, match="cannot be read"):
        import_log(ImportConfig(str(tmp_path / "binary.md")))
    run = Run.create("unlearn", "x", {}, tmp_path / "runs")
    with pytest.raises(LetheError, match="already holds a run"):
        import_log(ImportConfig(str(LOG), out=str(run.path)))


@pytest.mark.parametrize(
    ("header", "role", "name"),
    [
        ("WMDP Bio (↓)", "task", "wmdp_bio"),
        ("WMDP Bio Robust", "task", "wmdp_bio_robust"),
        ("**MMLU**", "task", "mmlu"),
        ("wmdp_bio_robust", "task", "wmdp_bio_robust"),
        ("lab_retain", "task", "lab_retain"),
        ("MMLU STEM (deprecated)", "task", "mmlu_stem"),
        ("retain_kl_loss", "loss", "retain_kl_loss"),
        ("Learning rate", "setting", "lr"),
        ("Step 500 WMDP", "point", "wmdp"),
        ("Final (110 steps)", "final", ""),
        ("Seconds", "other", ""),
    ],
)
def test_headers(header: str, role: str, name: str) -> None:
    found = column(header, {})
    assert (found.role, found.name) == (role, name)


def test_the_command_answers_in_words_and_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "import", str(LOG), "--out", str(tmp_path / "runs"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (len(answer["new"]), answer["unreadable"]) == (28, [])
    assert {"line", "number", "text", "section", "hint"} == set(answer["prose"][0])
    assert main(["runs", "import", str(LOG), "--out", str(tmp_path / "runs")]) == 0
    words = capsys.readouterr().out
    assert words.startswith("log.md: 0 new, 0 updated, 28 unchanged runs")
    assert "34.87 % is in no cell of 'Epochs'" in words


# --- what markdown says -----------------------------------------------------------------------------------------------

TABLE = HEAD + "| 11 | 5 | 0.5 | 40% |\n| 12 | 6 | 0.6 | 41% |\n"
OTHER = HEAD + "| 21 | 5 | 0.5 | 40% |\n"


def jobs(imported: Imported) -> list[str]:
    return [run.record["job_id"] for run in imported.new]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + TABLE,
        "\ufeff## A\n\n" + TABLE,
        "words\n" + TABLE,  # a table may end a paragraph
        "```lethe unlearn```\n\n" + TABLE,
        "~~~\n" + OTHER + "~~~\n" + TABLE,
        "````md\n```\n" + OTHER + "```\n````\n\n" + TABLE,
        "```\n" + OTHER + "~~~\n```\n" + TABLE,
        "<!-- old\n\n" + OTHER + "-->\n\n" + TABLE,
        "<div>\n" + OTHER + "</div>\n\n" + TABLE,
        "".join(f"    {line}\n" for line in OTHER.splitlines()) + "\n" + TABLE,  # indented code
        "".join(f"> {line}\n" for line in TABLE.splitlines()),
        "- a list\n\n" + "".join(f"  {line}\n" for line in TABLE.splitlines()),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\r"),
        "".join(line.strip("|") + "\n" for line in TABLE.splitlines()),
    ],
)
def test_what_is_a_table_is_what_markdown_says(take, text: str) -> None:
    made = take(text)
    assert jobs(made) == ["11", "12"] and made.unreadable == []
    assert [run.record["evals"]["mmlu"]["acc"] for run in made.new] == [0.4, 0.41]


def test_settings_end_with_the_section_of_an_underlined_heading_or_of_a_quotation(take) -> None:
    text = f"Log\n===\n\nFirst\n-----\n\n- lr: 1e-3\n\n{TABLE}\nSecond\n---\n\n{OTHER}\n> ## Quoted\n> lr: 1e-4\n\n"
    made = take(text + OTHER.replace("21", "31"))
    found = [(run.record["imported"]["group"], run.record["config"].get("lr")) for run in made.new]
    assert found == [("First", 1e-3), ("First", 1e-3), ("Second", None), ("Second", None)]


@pytest.mark.parametrize("mark", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_a_break_that_is_none_in_markdown_cuts_no_row(take, mark: str) -> None:
    made = take(f"| Job ID | Notes | MMLU |\n|---|---|---|\n| 1 | a{mark}b | 40% |\n| 2{mark} | c | 41% |\n\nMMLU was 77.7%\n")
    assert jobs(made) == ["1", "2"]
    assert made.new[0].record["imported"]["notes"] == "a b"
    assert [p["line"] for p in made.prose] == [6]


def test_names_of_imported_runs_are_one_printable_line(take) -> None:
    dirty = "a\x1b[31m\x00\u202eb" + "c" * 1000
    made = take(f"# {dirty}\n\n| Run | Model | MMLU |\n|---|---|---|\n| {dirty} | 名{'名' * 300} | 40% |\n")
    record, path = made.new[0].record, made.new[0].path
    assert record["name"].isprintable() and len(record["name"]) <= 210 and len(path.name.encode()) < 200
    assert json.dumps(record, ensure_ascii=False).isprintable()


def test_pipes_in_cells_and_rows_of_another_width(take) -> None:
    rows = ["| 1 | 5 | `a\\|b` \\| c | 40% |", "| 2 | 6 |", "| 3 | 7 | d | 41% | more |", "4 | 8 | e | 42%"]
    made = take("| Job ID | retain_coef | Notes | MMLU |\n|---|---|---|---|\n" + "\n".join(rows))
    assert jobs(made) == ["1", "2", "3", "4"]
    assert made.new[0].record["imported"]["notes"] == "a|b | c"
    assert [(u["line"], u["why"]) for u in made.unreadable] == [(4, "2 cells under 4 headers"), (5, "5 cells under 4 headers")]


def test_emphasis_code_links_and_html_in_cells_are_taken_off(take) -> None:
    made = take(
        "| Job ID | retain_coef | MMLU |\n|---|---|---|\n| ***17*** | <b>5</b> <!-- was 6 --> | _40%_[^1] |\n\n[^1]: by hand\n"
    )
    record = made.new[0].record
    assert (record["job_id"], record["config"]["retain_coef"], record["evals"]["mmlu"]["acc"]) == ("17", 5, 0.4)
    assert record["imported"]["footnotes"] == ["by hand"]


def test_what_looks_like_a_table_and_is_none_is_named(take) -> None:
    made = take(TABLE + "\n| 13 | 7 | 0.7 | 42% |\n\n| Job ID | MMLU |\n|---|\n| 14 | 43% |\n")
    assert jobs(made) == ["11", "12"]
    assert [(s["line"], s["columns"][0]) for s in made.skipped] == [(6, "13"), (8, "Job ID")]
    assert "markdown sees no rows" in made.text()


def test_a_number_is_not_read_from_the_middle_of_another(take) -> None:
    made = take("## 1,024 examples, 1.5 epochs, lr=1e-3\n\n" + TABLE)
    assert set(made.new[0].record["imported"]["inherited"]) == {"lr"}


LONG = 50_000


@pytest.mark.parametrize(
    "part", ["a", "1", "_a", "a ", "1 ", "start ", "(a", "[^a", "**a ", "![", "`a ", "<a ", "a=", "setting ", "\u0661"]
)
def test_long_lines_take_no_longer_than_they_are_long(take, part: str) -> None:
    """Headings, prose, cells, headers and settings: patterns that look back took more than 40 s for one such line."""
    text = part * (LONG // len(part))
    start = time.process_time()
    settings = f"**Settings:**\n- lr: {text}\n- {text}: 5\n- layers: [{text}]"
    take(f"# {text}x\n\n{text}\n\n{settings}\n\n{TABLE}|{4 * f' {text} |'}\n")
    take(f"| Job ID | {text} | MMLU |\n|---|---|---|\n| 1 | 5 | 40% |\n").text()
    assert time.process_time() - start < 5


def test_prose_of_many_numbers_is_looked_up_in_many_cells_at_once(take) -> None:
    rows = "".join(f"| {i} | 5 | 0.5 | 0.{i + 1000} |\n" for i in range(500))
    prose = "".join(f"MMLU went from 0.{i + 1000} to 0.{i + 2000}1 in run {i}.\n\n" for i in range(5000))
    start = time.process_time()
    made = take(HEAD + rows + "\n" + prose)
    assert time.process_time() - start < 20
    assert len(made.prose) == 4499 + 5000  # one is the cells' cb_loss
    assert made.prose[0]["hint"] == "" and made.prose[0]["number"] == "0.20001"


def test_short_rows_without_end_are_all_read() -> None:
    """The parser's own rule ends a table after 65,536 cells that are not there."""
    made = read("| Job ID | " + "MMLU | " * 99 + "\n|" + "---|" * 100 + "\n" + "| 1 |\n" * 1000)
    assert [len(table.rows) for table in made[0]] == [1000]
