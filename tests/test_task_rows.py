"""Broken rows of a task's local file, and data that no task uses, are refused with their line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from made_up import rows, write

from lethe.errors import LetheError
from lethe.evaluation import tasks
from lethe.evaluation.accuracy import load_tasks
from lethe.evaluation.tasks import data

pytestmark = pytest.mark.usefixtures("own_home")


GOOD = rows(3)


def refused(file: str, name: str = "wmdp_bio") -> str:
    with pytest.raises(LetheError) as refusal:
        data.read({name: file}, tasks.locate([name]))
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def accepted(file: str, name: str = "wmdp_bio") -> dict[str, int]:
    """The number of rows by task."""
    return {task: len(one.rows) for task, one in data.read({name: file}, tasks.locate([name])).items()}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "line 4 (is not JSON)"),
        ("[1, 2]", "line 4 (is not an object with fields)"),
        ({"question": "Q?", "answer": 1}, "line 4 (has no choices)"),
        ({"question": " ", "choices": list("abcd"), "answer": 1}, "line 4 (has an empty question)"),
        ({"question": "Q?", "choices": list("abc"), "answer": 1}, "line 4 (has 3 choices, 4 are needed)"),
        ({"question": "Q?", "choices": ["a", "b", "c", 4], "answer": 1}, "line 4 (choices is not a list of texts)"),
        ({"question": "Q?", "choices": list("abcd"), "answer": 4}, "line 4 (answer 4 is out of range"),
        ({"question": "Q?", "choices": list("abcd"), "answer": True}, "line 4 (answer True is not the number of a choice"),
        (GOOD[1] | {"question": "Q?", "id": 2**63}, "line 4 (has a number beyond 64 bits; write it as text)"),
        (GOOD[1] | {"question": "Q?", "meta": {"ids": [-(2**64)]}}, "line 4 (has a number beyond 64 bits"),
        (GOOD[1] | {"question": "Q?", "meta": [{"a": 1}, {"a": "x"}]}, "line 4 (Could not convert 'x'"),
        (GOOD[1] | {"question": "Q?", "answer": [1, 4]}, "line 4 (answer 4 is out of range"),
        (GOOD[1] | {"question": "Q?", "split": 3}, "line 4 (split 3 is not text)"),
        (GOOD[1] | {"answer": 0}, "line 4 (has the question of line 2)"),
        (GOOD[1] | {"choices": GOOD[1]["choices"][::-1]}, "line 4 (has the question of line 2)"),
        (rows(4)[3] | {"answer": "C"}, "line 4 (Field answer has incompatible types: int64 vs string"),
        (rows(4)[3] | {"meta": {"a": ["x"]}}, "line 4 (Field meta has incompatible types"),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path, line, says):
    some = [row | {"source": "a book", "meta": {"a": [1]}} for row in GOOD]
    assert says in refused(write(tmp_path / "d.jsonl", [*some, line, rows(5)[4]]))


def test_every_broken_row_is_named_at_once_and_blank_lines_count(tmp_path):
    file = write(tmp_path / "d.jsonl", [GOOD[0], "", "nonsense", GOOD[0], GOOD[2] | {"answer": 9}])
    says = "line 3 (is not JSON), line 4 (has the question of line 1), line 5 (answer 9"
    assert says in refused(file, "wmdp_bio_robust")
    some = ["nonsense"] * 10 + [GOOD[0]] + ["nonsense"] + [GOOD[1]] + ["nonsense"] * 2
    assert refused(write(tmp_path / "d.jsonl", some)).endswith("line 8 (is not JSON), and 5 more")


def test_rows_of_another_split_alone_are_refused(tmp_path):
    file = write(tmp_path / "d.jsonl", [row | {"split": "train"} for row in GOOD])
    assert "no row of wmdp-bio in the split test, only in train; leave out the field split" in refused(file)


@pytest.mark.parametrize(
    "change",
    [{"number": 0.5}, {"question": 7}, {"question": ["Q?"]}, {"self": 1}, {"deep": json.loads("[" * 90 + "]" * 90)}],
    ids=lambda change: next(iter(change)),
)
def test_what_only_shows_later_still_names_the_file_and_not_the_data_set_that_it_replaces(tmp_path, change):
    some = [
        row | (change if "question" not in change else {"question": change["question"] * (i + 1)}) for i, row in enumerate(GOOD)
    ]
    file = write(tmp_path / "d.jsonl", [*some[:-1], some[-1] | ({"number": 2**62 + 1} if "number" in change else {})])
    with pytest.raises(LetheError) as refusal:
        load_tasks(["wmdp_bio"], {"wmdp_bio": file}, limit=0)
    assert f"'{file}'" in str(refusal.value) and "cais" not in str(refusal.value) and "hub" not in str(refusal.value)


def test_a_row_of_no_configuration_is_broken(tmp_path):
    """A misspelt subject would otherwise be a question that is never evaluated."""
    some = [GOOD[0] | {"subject": "anatomy"}, GOOD[1] | {"subject": "anatmy"}, GOOD[2], rows(4)[3] | {"subject": "virology"}]
    says = "line 2 (subject 'anatmy' is no configuration), line 3 (has no subject)"
    assert says in refused(write(tmp_path / "d.jsonl", some), "mmlu_stem")
    # virology belongs to MMLU, and not to this group
    assert accepted(write(tmp_path / "d.jsonl", [some[0], some[3]]), "mmlu_stem") == {"mmlu_anatomy": 1}


@pytest.mark.parametrize("value", [["x"], {"a": 1}, 5, "biology"])
def test_a_subject_that_names_no_configuration_at_all_is_only_a_field(tmp_path, value):
    file = write(tmp_path / "d.jsonl", [row | {"subject": value} for row in GOOD])
    assert accepted(file) == {"wmdp_bio": 3} and accepted(file, "wmdp_bio_robust") == {"wmdp_bio_robust": 3}


def test_the_same_prompt_with_other_choices_is_another_question(tmp_path):
    assert accepted(write(tmp_path / "d.jsonl", [*GOOD, GOOD[0] | {"choices": ["w", "x", "y", "z"]}])) == {"wmdp_bio": 4}


@pytest.mark.parametrize(
    ("names", "task_data", "says"),
    [
        (["lab_forget"], "wmdp_bio", "'wmdp_bio' is not among the tasks"),
        (["mmlu_stem"], "mmlu_stem", "a field subject with one of"),
    ],
)
def test_data_of_no_task_is_refused(tmp_path, names, task_data, says):
    with pytest.raises(LetheError, match=says):
        data.read({task_data: write(tmp_path / "d.jsonl", GOOD)}, tasks.locate(names))


def test_missing_examples_are_refused(tmp_path):
    file = write(tmp_path / "d.jsonl", [row | {"subject": "anatomy"} for row in GOOD])
    with pytest.raises(LetheError, match="2 examples from the split dev"):
        load_tasks(["mmlu_anatomy"], {"mmlu_anatomy": file}, num_fewshot=2)


def test_a_missing_data_set_is_one_line_that_names_it_and_the_option(monkeypatch, tmp_path):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # else the client tries for half a minute
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(LetheError) as refusal:
        load_tasks(["wmdp_bio_robust"])
    text = str(refusal.value)
    assert "EleutherAI/wmdp_bio_robust_mcqa" in text and "--task_data wmdp_bio_robust=FILE.jsonl" in text
    assert "\n" not in text


def test_a_task_that_generates_text_is_refused(tmp_path):
    file = write(tmp_path / "d.jsonl", [{"q": "a", "a": "b"}])
    (tmp_path / "gen.yaml").write_text(
        f"task: gen\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\n"
    )
    with pytest.raises(LetheError, match="is of type generate_until"):
        load_tasks([str(tmp_path)])


def test_refusals_import_no_torch(tmp_path):
    file = write(tmp_path / "d.jsonl", ["nonsense"])
    code = (
        "import sys; from lethe.cli import main\n"
        f"code = main(['evaluate', 'lab:final', '--tasks', 'wmdp_bio', '--task_data', {f'wmdp_bio={file}'!r}])\n"
        "assert code == 2 and 'torch' not in sys.modules and 'lm_eval' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "line 1 (is not JSON)" in done.stderr
