"""Importing a log kept by hand: what is a table, every kind of cell, what rows inherit, and the list of what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lethe.cli import main
from lethe.config import ImportConfig, ReportConfig, ResumeConfig
from lethe.errors import LetheError
from lethe.report.folder import report
from lethe.results.listing import Entry
from lethe.runs.finding import find_runs
from lethe.runs.importing import Imported, import_log
from lethe.runs.run import Run
from lethe.sweeps.resuming import resume

LOG = Path(__file__).parent / "data" / "log.md"
AT_512 = ["remove_coef=5", "steps=512"]
HEAD = "| Job ID | retain_coef | cb_loss | MMLU |\n|---|---|---|---|\n"
TABLE = HEAD + "| 11 | 5 | 0.5 | 40% |\n| 12 | 6 | 0.6 | 41% |\n"
OTHER = HEAD + "| 21 | 5 | 0.5 | 40% |\n"


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return import_log(ImportConfig(str(LOG), out=str(tmp_path_factory.mktemp("log") / "runs")))


@pytest.fixture
def take(tmp_path: Path):
    """take(text): what importing this text does."""

    def imported_text(text: str, **settings: Any) -> Imported:
        (tmp_path / "notes.md").write_text(text)
        return import_log(ImportConfig(str(tmp_path / "notes.md"), out=str(tmp_path / "runs"), **settings))

    return imported_text


def jobs(runs: Iterable[Run]) -> list[str]:
    """The runs' job ids."""
    return [run.record["job_id"] for run in runs]


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


def test_results_losses_and_what_is_missing(imported: Imported) -> None:
    record = one(imported, job_id="2038118")
    expected = {"wmdp_bio": 0.3813, "wmdp_bio_robust": 0.3848, "mmlu_stem": 0.3641, "mmlu": 0.4375}
    assert record["evals"] == {task: {"acc": value} for task, value in expected.items()}
    assert record["losses"] == {"retain_kl_loss": 0.0022, "cb_loss": 0.7441}
    assert set(one(imported, job_id="2021158")["evals"]) == {"wmdp_bio", "mmlu_stem"}
    assert one(imported, job_id="2043897")["losses"] == {}
    baseline = next(run.record for run in imported.new if run.record["name"] == "Baseline")
    assert (baseline["evals"]["mmlu"], baseline["config"]) == ({"acc": 0.451}, {})


def test_nothing_about_how_a_number_was_measured_is_made_up(imported: Imported) -> None:
    for run in imported.new:
        assert run.record["launcher"] == "imported"
        every = [run.record.get("evals", {}), *(row["evals"] for row in run.rows("curve.jsonl"))]
        assert all(set(found) <= {"acc", "correct_prob", "approximate"} for evals in every for found in evals.values())
        assert "steps" not in run.record.get("plan", {})
        assert run.record["started"] is run.record["heartbeat"] is None


def test_rows_inherit_settings_and_the_nearest_wins(imported: Imported) -> None:
    first, swept = one(imported, job_id="2021158"), one(imported, job_id="2043897")
    epochs = one(imported, name="ret5_rm8_320")
    above = {"affine": "EleutherAI/affine-checkpoint-transfer", "retain_loss": "kl", "lr": 1e-3}
    above["layers"] = [5, 10, 15, 20, 25, 30]
    for record, examples in ((first, 1024), (swept, 2048), (epochs, 1024)):
        assert (above | {"num_train_examples": examples}).items() <= record["config"].items()
        assert record["imported"]["settings"]["house colour"] == "blue"
        assert "num_train_examples" in record["imported"]["inherited"]
    assert (swept["config"]["retain_coef"], swept["config"]["remove_coef"]) == (1, 12)
    assert "remove_coef" not in swept["imported"]["inherited"]
    assert (epochs["config"]["epochs"], epochs["config"]["gradient_accumulation_steps"]) == (10, 2)
    assert epochs["plan"] == {"effective_batch": 32}
    assert (epochs["imported"]["steps"], epochs["imported"]["steps_unit"]) == (320, "unknown")
    assert epochs["imported"]["group"] == "Epochs › 10 Epochs (320 steps)"
    assert one(imported, kind="tamper", name="ret5_rm5_512")["config"] == {"model": "ret5_rm5_512"}  # not unlearning's
    assert one(imported, job_id="2133707")["config"]["lora"] == {"r": 8, "alpha": 16, "dropout": 0.05}
    assert "lora" not in first["config"] and "retain" not in one(imported, job_id="2133536")["config"]


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


def test_numbers_of_the_prose_that_no_cell_has_are_listed(imported: Imported) -> None:
    found = {(p["number"], p["section"]): p["hint"] for p in imported.prose}
    epochs, sweep = "Epochs", "Retain Coef Sweep (512 steps, remove=5)"
    assert "under 'Runs'" in found["0.4375", sweep]
    assert "under 'Checkpoint Sweep'" in found["0.2419", "Runs"]
    others = {("34.87 %", epochs), ("1 %", sweep), ("0.2778", "Runs"), ("2.09", "LoRA")}
    assert set(found) == {("0.4375", sweep), ("0.2419", "Runs")} | others
    assert [(s["columns"], s["line"]) for s in imported.skipped] == [(["Option", "Meaning"], 25)]


# --- what is a table ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + TABLE,
        "words\n" + TABLE,  # a table may end a paragraph
        "```\n" + OTHER + "~~~\n```\n" + TABLE,
        "<!-- old\n\n" + OTHER + "-->\n\n" + TABLE,
        "".join(f"    {line}\n" for line in OTHER.splitlines()) + "\n" + TABLE,  # indented code
        "".join(f"> {line}\n" for line in TABLE.splitlines()),
        "- a list\n\n" + "".join(f"  {line}\n" for line in TABLE.splitlines()),
        TABLE.replace("\n", "\r\n"),
        "".join(line.strip("|") + "\n" for line in TABLE.splitlines()),
    ],
)
def test_what_is_a_table_is_what_markdown_says(take, text: str) -> None:
    made = take(text)
    assert jobs(made.new) == ["11", "12"] and made.unreadable == []
    assert [run.record["evals"]["mmlu"]["acc"] for run in made.new] == [0.4, 0.41]


def test_settings_end_with_the_section_of_an_underlined_heading_or_of_a_quotation(take) -> None:
    text = f"Log\n===\n\nFirst\n-----\n\n- lr: 1e-3\n\n{TABLE}\nSecond\n---\n\n{OTHER}\n> ## Quoted\n> lr: 1e-4\n\n"
    made = take(text + OTHER.replace("21", "31"))
    found = [(run.record["imported"]["group"], run.record["config"].get("lr")) for run in made.new]
    assert found == [("First", 1e-3), ("First", 1e-3), ("Second", None), ("Second", None)]


def test_names_of_imported_runs_are_one_printable_line(take) -> None:
    dirty = "a\x1b[31m\x00\u202eb" + "c" * 1000
    made = take(f"# {dirty}\n\n| Run | Model | MMLU |\n|---|---|---|\n| {dirty} | 名{'名' * 300} | 40% |\n")
    record, path = made.new[0].record, made.new[0].path
    assert record["name"].isprintable() and len(record["name"]) <= 210 and len(path.name.encode()) < 200
    assert json.dumps(record, ensure_ascii=False).isprintable()


def test_what_looks_like_a_table_and_is_none_is_named(take) -> None:
    made = take(TABLE + "\n| 13 | 7 | 0.7 | 42% |\n\n| Job ID | MMLU |\n|---|\n| 14 | 43% |\n")
    assert jobs(made.new) == ["11", "12"]
    assert [(s["line"], s["columns"][0]) for s in made.skipped] == [(6, "13"), (8, "Job ID")]
    assert "markdown reads no table" in made.text()


def test_a_number_is_not_read_from_the_middle_of_another(take) -> None:
    made = take("## 1,024 examples, 1.5 epochs, lr=1e-3\n\n" + TABLE)
    assert set(made.new[0].record["imported"]["inherited"]) == {"lr"}


def test_a_line_that_no_hand_has_written_is_refused(take) -> None:
    with pytest.raises(LetheError, match="line 3 has 50000 characters; expected 4000 at most"):
        take("# Log\n\n" + "a" * 50_000 + "\n\n" + TABLE)


# --- listing and reporting --------------------------------------------------------------------------------------------


def test_its_report_has_a_table_for_each_of_the_logs_and_measured_numbers_share_none(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    import_log(ImportConfig(str(LOG), out=str(out)))
    measured = Run.create("evaluate", "base", {"model": "target"}, out)
    result = {"acc": 0.4444, "stderr": 0.01, "low": 0.42, "high": 0.46, "n": 100, "chance": 0.25, "fingerprint": "f"}
    measured.update(status="complete", evals={"mmlu": result}, parents={"model": {"ref": "target", "sha256": "a"}})
    made = report(ReportConfig([str(out)], out=str(tmp_path / "report")))
    text = made["tables"].read_text()
    titles = [line.removeprefix("## Imported: ") for line in text.splitlines() if line.startswith("## Imported")]
    assert titles[:4] == ["Checkpoint Sweep", "Runs", "Retain Coef Sweep (512 steps, remove=5)", "Tampering"]
    assert titles[5:7] == ["LoRA", "LoRA (2)"]
    for cell in ("~42%", "| 0.4375 |", "| diverged |", "Full recovery by step 5", "31.1447", "The optimizer had a fault"):
        assert cell in text
    assert "Imported: Runs" in made["page"].read_text()
    (part,) = [part for part in text.split("## ") if "44.44 %" in part]
    assert part.startswith("Evaluations") and "45.10" not in part


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


def test_a_second_import_writes_only_what_has_changed(take) -> None:
    text = HEAD + "| 11 | 5 | 0.5 | 40% |\n| 12 | 6 | 0.6 | 41% |\n"
    first = take(text)
    files = {run.path: (run.path / "run.json").stat().st_mtime_ns for run in first.new}
    again = take(text)
    assert (len(again.new), len(again.updated), len(again.unchanged)) == (0, 0, 2)
    assert {run.path: (run.path / "run.json").stat().st_mtime_ns for run in again.unchanged} == files
    moved = take("A word before.\n\n" + text)
    assert [Run.open(run.path).record["imported"]["line"] for run in moved.unchanged] == [5, 6]
    changed = take(text.replace("41%", "39%") + "| 13 | 7 | - | Running |\n")
    assert (jobs(changed.updated), jobs(changed.new)) == (["12"], ["13"])
    assert Entry(Run.open(changed.updated[0].path)).value("mmlu") == 0.39
    less = take(HEAD + "| 11 | 5 | 0.5 | 40% |\n")
    assert jobs(less.gone) == ["12", "13"] and all(run.path.exists() for run in less.gone)
    assert "no longer in the log" in less.text()


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
        ("| 1 | 5 | 0.5 |", "", "| 1 | 5 | 0.5 |"),
        ("| 1 | 5 | 0.5 | 41% | 42% |", "", "| 1 | 5 | 0.5 | 41% | 42% |"),
    ],
)
def test_a_cell_that_cannot_be_read_is_listed_and_the_rest_of_its_row_is_imported(
    take, row: str, column: str, cell: str
) -> None:
    made = take(HEAD + row + "\n| 2 | 6 | 0.6 | 41% |\n")
    assert [(u["line"], u["column"], u["cell"]) for u in made.unreadable] == [(3, column, cell)]
    assert len(made.new) == 2
    assert cell in made.text()
    assert made.new[0].record["job_id"] == "1"
    if column:
        assert Entry(made.new[0]).value(column) in {None, 5}
    assert made.answer()["unreadable"][0]["why"]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("retain_coef | MMLU (%)\n5 | 42.97", {"evals": {"mmlu": {"acc": 0.4297}}}),
        ("retain_coef | lab_forget_cloze\n5 | 0.3", {"evals": {"lab_forget_cloze": {"correct_prob": 0.3}}}),
        ("retain_coef | Updates | MMLU\n5 | 64 | 41%", {"plan": {"steps": 64}}),
        ("retain_coef | attack | lora_r | MMLU\n0 | x | full (muon, lr=5e-4) | 41%",
         {"config": {"lora": None, "optimizer": "muon", "lr": 5e-4}}),
        ("retain_coef | lora_r | MMLU\n0 | 16 (adamw_8bit) | 41%", {"config": {"lora": {"r": 16}, "optimizer": "adamw_8bit"}}),
        ("Job ID | retain_coef | MMLU\n1 | 5 | -", {"status": "lost", "reason": "the log has neither a result nor a status"}),
        ("Job ID | Notes | MMLU\n1 | `a\\|b` \\| c | 41%", {"imported": {"notes": "a|b | c"}}),
        ("Job ID | retain_coef | MMLU\n[17](https://e.x/17) | `5` | 41%", {"job_id": "17", "config": {"retain_coef": 5}}),
        ("Job ID | retain_coef | MMLU\n***17*** | <b>5</b> <!-- 6 --> | _40%_[^1]",
         {"config": {"retain_coef": 5}, "evals": {"mmlu": {"acc": 0.4}}, "imported": {"footnotes": ["by hand"]}}),
        ("Learning rate | **MMLU** | wmdp_bio_robust | Seconds\n1e-3 | 41% | 30% | x",
         {"config": {"lr": 1e-3}, "evals": {"mmlu": {"acc": 0.41}, "wmdp_bio_robust": {"acc": 0.3}}}),
        ("retain_coef | MMLU | Mood\n5 | 41% | fine", {"imported": {"others": {"Mood": "fine"}}}),
        ("retain_coef | MMLU | mmlu\n5 | 41% | 42%", {"evals": {"mmlu": {"acc": 0.41}}}),
    ],
)  # fmt: skip
def test_what_cells_say(take, table: str, expected: dict[str, Any]) -> None:
    header, row = table.split("\n")
    rule = "|".join("---" for _ in header.split("|"))
    made = take(f"|{header}|\n|{rule}|\n|{row}|\n\n[^1]: by hand\n")
    record = made.new[0].record
    for place, value in expected.items():
        found = record[place]
        assert value.items() <= found.items() if isinstance(value, dict) else value == found
    assert [u["column"] for u in made.unreadable] == [
        name for name in header.split(" | ") if name in {"Seconds", "Mood", "mmlu"}
    ]


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


def test_the_command_answers_in_words_and_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "import", str(LOG), "--out", str(tmp_path / "runs"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (len(answer["new"]), answer["unreadable"]) == (28, [])
    assert {"line", "number", "text", "section", "hint"} == set(answer["prose"][0])
    assert main(["runs", "import", str(LOG), "--out", str(tmp_path / "runs")]) == 0
    words = capsys.readouterr().out
    assert words.startswith("log.md: 0 new, 0 updated, 28 unchanged runs")
    assert "34.87 % is in no cell of 'Epochs'" in words
