"""Attacks in a report: which model and control they are on, recovery, the worst case over several attacks."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies import FORGET, RETAIN, Folder, grid, whole_study

from lethe.config import ReportConfig
from lethe.report.attack_charts import worst_cells
from lethe.report.attacks import recovery_note
from lethe.report.charts import all_charts
from lethe.report.folder import report
from lethe.report.headline import headline
from lethe.results.format import MISSING
from lethe.runs.run import Run

ABOVE = "Above filtered twin, points"


@pytest.fixture
def study(tmp_path: Path) -> Folder:
    return whole_study(tmp_path / "runs")


@pytest.fixture
def suites(study: Folder) -> Folder:
    """Three attacks on an unlearned model and two of them on the filtered twin; one of those failed."""
    for name in ("hit", "twin", "fresh"):
        study.named(name).discard()
    ref = lora(study)
    study.attack("full", ref, [(0.26, 0.80), (0.5, 0.79), (0.9, 0.6)], lr=1e-3)
    study.attack("low", ref, [(0.26, 0.80), (0.4, 0.80), (0.45, 0.76)], lr=1e-5)
    study.attack("noise", ref, [(0.26, 0.80), (0.3, 0.7)], attack="noise", strengths=[0.4])
    study.attack("full", "lab:filtered", [(0.25, 0.78), (0.27, 0.78), (0.3, 0.78)], lr=1e-3)
    study.attack("low", "lab:filtered", [(0.25, 0.78)], "failed", lr=1e-5).update(reason="out of memory")
    return study


def lora(folder: Folder) -> str:
    return f"run:{folder.named('lora').id}"


def recovery_row(folder: Folder, model: str = "lora") -> dict[str, str]:
    """The row of the recovery table about the attack `full` on a model."""
    header, *rows = grid(folder.tables(), "Recovery")
    lines = [dict(zip(header, row, strict=True)) for row in rows]
    return next(line for line in lines if line["Attack"] == "full" and line["Model"].startswith(model))


def test_the_tampering_table_reads_the_curve(study: Folder) -> None:
    attacked, twin, fresh = study.table("Tampering").values()
    assert attacked["Model"].startswith("lora (")
    assert twin["Model"] == "Control: filtered twin (lab:filtered)"
    assert fresh["Model"] == "Control: random weights (random:lab:final)"
    columns = (f"Starting {FORGET}", "After 10 steps", "Highest", "Final (30 steps)", f"Final {RETAIN}")
    assert [attacked[column] for column in columns] == ["26.25 %", "50.00 %", "94.00 %", "94.00 %", "80.00 %"]
    assert (attacked["Lost updates"], attacked["Notes"]) == ("12.5000 %", "Full recovery by step 30")
    share = round(100 * (0.4 - 0.25) / (0.9525 - 0.25))
    assert twin["Notes"] == f"{share} % of the gap recovered in 30 steps; full recovery not within 30 steps"


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ([0.25, 0.94, 0.3], "Full recovery by step 10"),
        ([0.25, 0.93, 0.3], "7 % of the gap recovered in 20 steps; full recovery not within 20 steps"),
        ([0.94, 0.95, 0.95], "no gap to recover: the start's interval contains the baseline"),
        ([], "not evaluated"),
    ],
)
def test_the_interval_decides_about_recovery(study: Folder, values: list[float], note: str) -> None:
    study.attack("again", "lab:filtered", values, "failed")
    attack = next(attack for attack in study.load().attacks if attack.run.record["name"] == "again")
    assert recovery_note(attack, FORGET) == note


def test_an_attack_that_is_not_complete_has_no_final_result(study: Folder) -> None:
    study.named("hit").update(status="failed", reason="killed")
    row, *_ = study.table("Tampering").values()
    assert (row["After 10 steps"], row["Final (30 steps)"]) == ("50.00 %", "failed")
    text = " ".join(headline(study.load()))
    assert "failed after step" in text and "An attack of" not in text


def test_attacks_on_one_model_stand_side_by_side_with_the_steps_of_the_longest(study: Folder) -> None:
    study.attack("muon", "lab:filtered", [0.25, 0.26], "running", optimizer="muon")
    header, first, second = grid(study.tables(), "Attacks on Control: filtered twin")
    assert header == [
        "Attack",
        "Optimizer",
        *(f"Step {n}" for n in (0, 10, 20, 30)),
        f"Final {FORGET}",
        f"Final {RETAIN}",
        "Status",
    ]
    assert first == ["twin", "null", "25.00 %", "26.00 %", "30.00 %", "40.00 %", "40.00 %", "80.00 %", "complete"]
    assert second[2:-1] == ["25.00 %", "26.00 %", MISSING, MISSING, MISSING, MISSING]


def test_attacks_lead_back_to_the_unlearned_model(study: Folder) -> None:
    """An attack called run-unlearn-lora is not the run that `run:unlearn-lora` means; an attacked model can be attacked."""
    study.attack("early", "lab:global_step900", [0.25, 0.3])
    first = study.attack("run-unlearn-lora", "run:unlearn-lora", [0.26, 0.9])
    study.attack("again", f"run:{first.id}", [0.9, 0.95])
    found = {attack.run.record["name"]: attack for attack in study.load().attacks}
    assert found["early"].label == "Control: source (lab:global_step900)"
    assert {found[name].unlearned.id for name in ("run-unlearn-lora", "again")} == {study.named("lora").id}
    assert [run.id for run in found["again"].before] == [first.id]
    assert found["again"].baseline is not None and found["again"].control is None


def test_a_run_that_an_attack_names_is_that_of_its_own_folder(study: Folder, tmp_path: Path) -> None:
    other = Folder(tmp_path / "other")
    other.add("unlearn", "lora", {"model": "m"})
    for folder in (study, other):
        folder.attack("here", "run:unlearn-lora", [0.3])
    both = type(study.load()).load([str(study.path), str(other.path)])
    here = [attack for attack in both.attacks if attack.run.record["name"] == "here"]
    assert len(here) == 2 and all(attack.unlearned.folder == attack.run.folder for attack in here)


def test_the_worst_case_table_names_the_attack_and_what_is_not_measured(suites: Folder) -> None:
    attacked, twin = suites.table("Worst case").values()
    assert attacked["Model"].startswith("lora (") and twin["Model"] == "Control: filtered twin (lab:filtered)"
    columns = ["Worst case", "Worst attack", "At", "Measured"]
    assert [attacked[name] for name in columns] == ["50.00 %", "full", "step 10, 1,000 tokens", "3 of 3"]
    assert attacked["lab_retain lost"] == "+1.0 points" and attacked["Recovered"] == f"{100 * 0.24 / (0.9525 - 0.26):.0f} %"
    assert attacked[ABOVE].startswith("+23.0 (")
    assert [twin[name] for name in columns] == ["30.00 %", "full", "step 20, 2,000 tokens", "1 of 3"]
    text = suites.tables()
    assert "low is not measured to its end: failed: out of memory." in text
    assert "noise is not measured to its end: not run on this model." in text
    assert "no evaluation within the bound under noise." in text
    assert "0.4: 30.00 %" in text


def test_the_bound_is_that_of_the_suite_and_a_twin_attacked_less_far_gives_no_number(suites: Folder) -> None:
    for path in suites.path.glob("tamper-*"):
        Run.open(path).update(suite={"name": "standard", "general_bound": 0.25})
    attacked, _ = suites.table("Worst case").values()
    assert (attacked["Worst case"], attacked["lab_retain lost"]) == ("90.00 %", "+20.0 points")
    assert attacked[ABOVE].startswith("+60.0 (")
    twin = next(a.run for a in suites.load().attacks if a.control and a.run.record["name"] == "full")
    Run.open(twin.path).update(status="failed", reason="killed")
    lines = (twin.path / "curve.jsonl").read_text().splitlines(keepends=True)
    (twin.path / "curve.jsonl").write_text("".join(lines[:2]))
    attacked, _ = suites.table("Worst case").values()
    assert (attacked["Worst case"], attacked[ABOVE]) == ("90.00 %", MISSING)
    assert recovery_row(suites)[ABOVE].endswith(", at 1,000 tokens")


def test_runs_that_differ_in_their_seed_are_one_attack(suites: Folder) -> None:
    suites.attack("full", lora(suites), [(0.26, 0.80), (0.6, 0.79), (0.9, 0.6)], lr=1e-3, seed=1)
    failed = suites.attack("full", lora(suites), [(0.26, 0.80), (0.9, 0.79)], "failed", lr=1e-3, seed=2)
    failed.update(reason="killed")

    def full():
        return next(series for series in suites.load().series if series.attack == "full" and series.control is None)

    assert len(full().attacks) == 3 and full().reason == "seed 2 failed: killed"
    assert [point.value for point in full().points_of(FORGET)] == pytest.approx([0.26, 0.55, 0.9])  # of the complete seeds
    attacked, _ = suites.table("Worst case").values()
    assert (attacked["Worst case"], attacked["Worst attack"]) == ("90.00 %", "full, seed 2")  # as far as it was measured
    assert attacked["Measured"] == "3 of 4" and "full, seed 2 is not measured to its end: failed: killed." in suites.tables()
    suites.attack("full", lora(suites), [(0.26, 0.80), (0.7, 0.79), (0.9, 0.6)], lr=1e-3, seed=2)
    assert full().reason is None and full().points_of(FORGET)[1].value == pytest.approx(0.6)  # the failed run does not count
    assert [recovery_row(suites, model)["Seeds"] for model in ("lora", "Control")] == ["3", "1"]


def test_only_a_filtered_model_is_the_twin_and_of_two_none_is_chosen(suites: Folder) -> None:
    curve = [(0.9, 0.80), (0.9, 0.79), (0.92, 0.79)]
    suites.attack("full", "EleutherAI/deep-ignorance-unfiltered", curve, lr=1e-3)
    assert recovery_row(suites)[ABOVE].startswith("+60.0 (")  # 0.9 − 0.3, not 0.9 − 0.92
    suites.attack("full", "EleutherAI/deep-ignorance-e2e-strong-filter", curve, lr=1e-3)
    assert recovery_row(suites)[ABOVE] == MISSING
    assert "Above the twin is empty with several filtered twins" in suites.tables()
    controls = {series.model: series.control for series in suites.load().series}
    assert controls["EleutherAI/deep-ignorance-unfiltered"] is None
    assert controls["Control: filtered twin (EleutherAI/deep-ignorance-e2e-strong-filter)"]


def test_models_of_one_name_and_different_weights_are_different_models(suites: Folder) -> None:
    again = suites.attack("full", "lab:filtered", [(0.25, 0.78), (0.9, 0.78)], lr=1e-3, seed=1)
    again.update(parents={"model": {"ref": "lab:filtered", "sha256": "7" * 64}})
    models = {series.model for series in suites.load().series if series.control}
    assert models == {f"Control: filtered twin (lab:filtered), weights {letter * 8}" for letter in "7e"}


def test_an_attack_on_an_attacked_model_counts_from_the_model_before_both(suites: Folder) -> None:
    benign = suites.attack("benign", "lab:filtered", [(0.25, 0.78), (0.26, 0.79)], forget="lab:retain")
    suites.attack("then", f"run:{benign.id}", [(0.26, 0.79), (0.4, 0.70)], lr=2e-3)
    (then,) = (series for series in suites.load().series if series.attack == "then")
    assert then.model == "Control: filtered twin (lab:filtered)" and then.control
    places = [(point.step, point.tokens, point.value) for point in then.points_of(FORGET)]
    assert places == [(0, 0, 0.25), (10, 1000, 0.26), (20, 2000, 0.4)]
    assert then.attacks[0].label == "Control: filtered twin (lab:filtered), after benign"


def test_the_charts_of_a_suite_show_every_attack_and_the_page_leads_with_the_worst_case(suites: Folder, tmp_path: Path) -> None:
    loaded = suites.load()
    cells = {(c["model"], c["attack"]): c["text"] for c in worst_cells(loaded, loaded.series, FORGET, RETAIN)}
    attacks = ("full", "low", "noise", "worst case")
    assert [cells["lora", name] for name in attacks] == ["50", "45", "26", "50"]
    assert [cells["Control: filtered twin", name] for name in attacks] == ["30", "–", "–", "≥ 30"]
    made = report(ReportConfig([str(suites.path)], str(tmp_path / "out")))
    assert {"tamper", "tamper-general", "worst-case"} <= {path.stem for path in made["charts"].iterdir()}
    assert "Worst case over 3 attacks: lab_forget_robust 26.0 % → 50.0 % (by full, step 10" in made["page"].read_text()


def test_a_report_of_many_runs_draws_what_can_be_read_and_lists_the_rest(study: Folder) -> None:
    for number in range(30):
        run = study.unlearn(f"run{number}", None, "failed", lr=1e-3 + number)
        study.attack(f"a{number}", f"run:{run.id}", [0.3, 0.5], lr=1e-5 * (number + 1))
    charts = all_charts(study.load())
    assert "Shown: 16 of 33 models and 12 of 31 attacks" in charts["worst-case"][0]
    cells = charts["worst-case"][1].to_dict()["datasets"].popitem()[1]
    assert any(cell["model"] == "Control: filtered twin" for cell in cells)
    text = study.tables()
    assert len(grid(text, "Worst case")) == len(grid(text, "Tampering")) == 1 + 33
    assert text.count("not run on this model") <= 33 * 10
