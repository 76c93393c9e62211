"""Local files in place of a task's data set: the same prompts and numbers as lm-eval's on the same rows, or a clear refusal."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from lethe.config import EvalSettings, EvaluateConfig
from lethe.config.parse import from_recipe, parse
from lethe.errors import LetheError
from lethe.evaluation import tasks
from lethe.evaluation.accuracy import evaluate_model, load_tasks
from lethe.evaluation.tasks import data

LM_EVAL = Path(lm_eval.__file__).parent / "tasks"
ROBUST = tuple(p.stem.removeprefix("wmdp_bio_robust_") for p in sorted(tasks.OWN.glob("wmdp_bio_robust_*.yaml")))


def rows(count: int = 12, **more: str) -> list[dict]:
    words = ["river", "mill", "copper", "salt", "sea", "coal", "resin", "wheel"]
    return [
        {
            "question": f" Which {words[i % 8]} of the {words[(i * 3 + 1) % 8]} number {i}?",
            "choices": [f"{words[(i + k) % 8]} {words[(i + 2 * k) % 8]}" for k in range(4)],
            "answer": (i * 7) % 4,
        }
        | more
        for i in range(count)
    ]


def write(file: Path, some: list) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in some))
    return str(file)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> None:
    """Requests are kept away from the user's own."""
    monkeypatch.setenv("LETHE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def loaded(make_model, make_tokenizer, tmp_path_factory):
    folder = make_model(
        "gpt_neox", tmp_path_factory.mktemp("model"), tokenizer=make_tokenizer(True), max_position_embeddings=512
    )
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def theirs(loaded, tmp_path, monkeypatch):
    """theirs(include, rows, …): samples of lm-eval's own evaluation of a task file of its own, on rows."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")

    def run(include: Path, name: str, splits: dict[str, list[dict]], extra: str = "") -> list[dict]:
        folder = tmp_path / f"theirs-{name}"
        files = {split: write(folder / f"{split}.jsonl", some) for split, some in splits.items()}
        text = f"task: their_{name}\ninclude: {include}\ndataset_path: json\ndataset_name: null\n{extra}"
        (folder / "task.yaml").write_text(f"{text}\ndataset_kwargs:\n  data_files: {json.dumps(files)}\n")
        found = lm_eval.simple_evaluate(
            HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=4),
            tasks=[f"their_{name}"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        )
        return found["samples"][f"their_{name}"]

    return run


def agree(ours: list[dict], theirs: list[dict]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, sorted(theirs, key=lambda s: s["doc_id"]), strict=True):
        expected = [float(r[0]) for r in b["filtered_resps"]]
        assert a["log_likelihoods"] == pytest.approx(expected, abs=1e-4, rel=1e-5)
        assert a.get("acc") == b.get("acc")
        assert a["target"] == b["target"]


@pytest.mark.parametrize("name", ["wmdp_bio", "wmdp_bio_robust"])
def test_letters_in_the_words_of_wmdp(loaded, theirs, tmp_path, name):
    """The robust questions are asked exactly as lm-eval's wmdp_bio asks."""
    samples: dict[str, list] = {}
    result = evaluate_model(*loaded, [name], samples=samples, task_data={name: write(tmp_path / "d.jsonl", rows())})[name]
    agree(samples[name], theirs(LM_EVAL / "wmdp" / "wmdp_bio.yaml", "wmdp", {"test": rows()}))
    assert (result["n"], result["chance"], result["num_fewshot"], result["version"]) == (12, 0.25, 0, 1)


def test_the_robust_group_pools_its_six_configurations(loaded, tmp_path):
    """Rows that name their configuration make six tasks; pooled, each question weighs the same."""
    some = [row | {"configuration": ROBUST[i % 6 if i < 9 else 0]} for i, row in enumerate(rows())]
    named: dict[str, list] = {}
    asked = ["wmdp_bio_robust", *(f"wmdp_bio_robust_{name}" for name in ROBUST)]
    file = write(tmp_path / "d.jsonl", some)
    results = evaluate_model(*loaded, asked, samples=named, task_data={"wmdp_bio_robust": file})
    assert len(ROBUST) == 6 and results["wmdp_bio_robust"]["n"] == 12
    parts = [results[name] for name in asked[1:]]
    assert [part["n"] for part in parts] == [5, 2, 2, 1, 1, 1] and sum(part["n"] for part in parts) == 12
    weighted = sum(part["acc"] * part["n"] for part in parts) / 12
    assert results["wmdp_bio_robust"]["acc"] == pytest.approx(weighted)
    pooled: dict[str, list] = {}
    evaluate_model(
        *loaded, ["wmdp_bio_robust"], samples=pooled, task_data={"wmdp_bio_robust": write(tmp_path / "p.jsonl", rows())}
    )
    values = {row["doc_hash"]: None for row in named["wmdp_bio_robust"]}
    assert len(values) == 12
    likelihoods = [
        sorted(tuple(round(v, 3) for v in r["log_likelihoods"]) for r in s["wmdp_bio_robust"]) for s in (named, pooled)
    ]
    assert likelihoods[0] == likelihoods[1]


@pytest.mark.parametrize("shots", [0, 2])
def test_mmlu_by_subject_zero_and_few_shot(loaded, theirs, tmp_path, shots):
    """A group whose prompts name the subject; examples are the first of the split dev."""
    test = {
        name: [r | {"question": f"{name}{r['question']}"} for r in rows(7)] for name in ("anatomy", "astronomy", "virology")
    }
    dev = {name: [r | {"question": f"example of {name}{r['question']}"} for r in rows(3)] for name in test}
    lines = [row | {"subject": name} for name, some in test.items() for row in some]
    lines += [row | {"subject": name, "split": "dev"} for name, some in dev.items() for row in some]
    samples: dict[str, list] = {}
    file = write(tmp_path / "d.jsonl", lines)
    results = evaluate_model(*loaded, ["mmlu", "mmlu_stem"], samples=samples, task_data={"mmlu": file}, num_fewshot=shots)
    assert (results["mmlu"]["n"], results["mmlu_stem"]["n"]) == (21, 14)
    assert results["mmlu"]["num_fewshot"] == shots
    for subject in ("anatomy", "astronomy"):
        expected = theirs(
            LM_EVAL / "mmlu" / "default" / f"mmlu_{subject}.yaml",
            subject,
            {"test": test[subject], "dev": dev[subject]},
            f"num_fewshot: {shots}",
        )
        for name in ("mmlu", "mmlu_stem"):
            agree([s for s in samples[name] if s["subtask"] == f"mmlu_{subject}"], expected)


def test_few_shot_examples_are_those_of_lm_eval(loaded, theirs, tmp_path):
    """Drawn at random from a fixed seed, one question after the other; also when the requests come from the disk."""
    (tmp_path / "few").mkdir()
    file = write(tmp_path / "few" / "d.jsonl", rows())
    text = (LM_EVAL / "wmdp" / "_default_template_yaml").read_text().replace("num_fewshot: 0", "num_fewshot: 3")
    text = text.replace("dataset_path: cais/wmdp", "dataset_path: json").replace(
        "test_split: test", "test_split: test\nfewshot_split: test"
    )
    (tmp_path / "few" / "few.yaml").write_text(f"task: few\n{text}\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n")
    expected = theirs(tmp_path / "few" / "few.yaml", "few", {"test": rows()})
    for _ in range(2):
        samples: dict[str, list] = {}
        result = evaluate_model(*loaded, [str(tmp_path / "few")], samples=samples)["few"]
        agree(samples["few"], expected)
        assert result["num_fewshot"] == 3
        sys.modules["lethe.evaluation.questions"]._loaded.clear()


def test_cloze_gives_a_probability_and_a_length_normalised_accuracy(loaded, tmp_path):
    import numpy as np

    some = [row | {"choices": [c + " and more" * (k % 2) for k, c in enumerate(row["choices"])]} for row in rows()]
    samples: dict[str, list] = {}
    task_data = {"wmdp_bio_cloze": write(tmp_path / "d.jsonl", some)}
    result = evaluate_model(*loaded, ["wmdp_bio_cloze"], samples=samples, task_data=task_data)["wmdp_bio_cloze"]
    values, right = [], []
    for sample, row in zip(samples["wmdp_bio_cloze"], some, strict=True):
        scores = np.array(sample["log_likelihoods"])
        values.append(np.exp(scores)[row["answer"]] / np.exp(scores).sum())
        right.append(np.argmax(scores / [len(c) for c in row["choices"]]) == row["answer"])
    assert result["correct_prob"] == pytest.approx(np.mean(values))
    assert result["acc_norm"] == pytest.approx(np.mean(right))
    assert "acc" not in result and "chance" not in result


PUBLISHED_CLOZE = """
description: "Complete the following biology questions with the correct answer.\\n\\n"
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question.strip()}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
num_fewshot: 0
metric_list: [{metric: acc_norm, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


def test_the_cloze_is_asked_and_normalised_as_the_published_one(loaded, theirs, tmp_path):
    """`wmdp_bio_cloze_verified` of the Deep Ignorance repository, read by lm-eval itself."""
    (tmp_path / "published.yaml").write_text(PUBLISHED_CLOZE)
    some = [row | {"choices": [c + " and more" * (k % 3) for k, c in enumerate(row["choices"])]} for row in rows()]
    expected = theirs(tmp_path / "published.yaml", "cloze", {"test": some})
    samples: dict[str, list] = {}
    task_data = {"wmdp_bio_cloze": write(tmp_path / "d.jsonl", some)}
    evaluate_model(*loaded, ["wmdp_bio_cloze"], samples=samples, task_data=task_data)
    agree(samples["wmdp_bio_cloze"], expected)
    theirs_right = [row["acc_norm"] for row in sorted(expected, key=lambda row: row["doc_id"])]
    assert [row["acc_norm"] for row in samples["wmdp_bio_cloze"]] == theirs_right
    assert 0 < sum(theirs_right) < len(theirs_right)


@pytest.mark.parametrize(
    ("kind", "definition"),
    [
        ("loglikelihood", "output_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: ' {{choices[0]}}'\n"),
        (
            "several contexts",
            "output_type: multiple_choice\ndoc_to_text: answer\ndoc_to_target: 'by the sea'\n"
            "doc_to_choice: '{{[question + choices[0], question + choices[1]]}}'\n",
        ),
        (
            "mutual information",
            "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
            "metric_list: [{metric: acc, aggregation: mean}, {metric: acc_mutual_info, aggregation: mean}]\n",
        ),
        ("no context", "output_type: multiple_choice\ndoc_to_text: ''\ndoc_to_choice: choices\ndoc_to_target: answer\n"),
    ],
)
def test_other_kinds_of_tasks_are_scored_as_lm_eval_scores_them(loaded, tmp_path, monkeypatch, kind, definition):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    file = write(tmp_path / "t" / "d.jsonl", [row | {"answer": row["answer"] % 2} for row in rows()])
    source = f"task: kind\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
    (tmp_path / "t" / "kind.yaml").write_text(source + definition)
    theirs = lm_eval.simple_evaluate(
        HFLM(pretrained=loaded[0], tokenizer=loaded[1], batch_size=4),
        tasks=["kind"],
        task_manager=TaskManager(include_path=str(tmp_path / "t"), include_defaults=False),
    )
    samples: dict[str, list] = {}
    result = evaluate_model(*loaded, [str(tmp_path / "t")], samples=samples)["kind"]
    agree(samples["kind"], theirs["samples"]["kind"])
    assert result["acc"] == pytest.approx(theirs["results"]["kind"]["acc,none"])
    chance = {"loglikelihood": None, "several contexts": 0.5}.get(kind, 0.25)
    assert result.get("chance") == chance
    assert max(map(int, result.get("answers", {"0": 12}))) < (4 if chance == 0.25 else 2)


INNER = {"text": ["stone", "cork", "iron"], "label": ["A", "B", "C"]}
HUB_ROWS: dict[str, dict] = {
    "arc_easy": {"question": "Q?", "choices": INNER, "answerKey": "B"},
    "hellaswag": {"ctx_a": "Q", "ctx_b": "it", "endings": ["x", "y", "z", "w"], "activity_label": "A", "label": "1"},
    "belebele_eng_Latn": {"flores_passage": "P", "question": "Q?", "correct_answer_num": "2"}
    | {f"mc_answer{i}": f"a{i}" for i in range(1, 5)},
    "xcopa_it": {"premise": "P.", "choice1": "x", "choice2": "y", "question": "cause", "label": 1},
    "logiqa": {"context": "P", "question": "Q?", "options": ["w", "x", "y", "z"], "label": "b"},
    "lambada_openai": {"text": "a stone that floats"},
}


@pytest.mark.parametrize(("task", "row"), HUB_ROWS.items(), ids=HUB_ROWS)
def test_rows_of_a_hub_data_set_are_taken_whatever_a_task_makes_of_them(tmp_path, task, row):
    """Choices in an inner field, an answer made by a template, prompts and rows made by functions."""
    first, *rest = row
    some = [{first: f"{i} {row[first]}"} | {key: row[key] for key in rest} for i in range(3)]
    (leaf,) = load_tasks([task], {task: write(tmp_path / "d.jsonl", some)}, limit=0)[task]
    assert len(leaf.prompts(0)) == 3
    without = write(tmp_path / "d.jsonl", [*some[:2], {key: row[key] for key in rest}])
    with pytest.raises(LetheError, match=f"'{re.escape(without)}'"):
        load_tasks([task], {task: without}, limit=0)


# --- refusals --------------------------------------------------------------------------------------------------------

GOOD = rows(3)


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
        ({"question": "Q?", "choices": list("abcd"), "answer": -1}, "line 4 (answer -1 is out of range"),
        ({"question": "Q?", "choices": list("abcd"), "answer": True}, "line 4 (answer True is not the number of a choice"),
        ({"question": "Q?", "choices": list("abcd"), "answer": None}, "line 4 (has no answer)"),
        ("null", "line 4 (is not an object with fields)"),
        ('{"question": "\\ud800?", "choices": ["a", "b", "c", "d"], "answer": 1}', "line 4 (half of a character"),
        ('{"question": ' + "[" * 5000 + "]" * 5000 + "}", "line 4 (nested too deeply)"),
        ('{"question": "Q?", "question": "R?"}', "line 4 ('question' is written twice)"),
        ('{"question": "Q?", "number": ' + "9" * 5000 + "}", "line 4 (is not JSON)"),
        (GOOD[1] | {"question": "Q?", "id": 2**63}, "line 4 (id is larger than 64 bits; write it as text)"),
        (GOOD[1] | {"question": "Q?", "meta": {"ids": [-(2**64)]}}, "line 4 (meta.ids[] is larger than 64 bits"),
        (GOOD[1] | {"question": "Q?", "meta": [{"a": 1}, {"a": "x"}]}, "line 4 (meta[].a is text here and a number there)"),
        (GOOD[1] | {"question": math.nan}, "line 4 (question is a number, in lines before text)"),
        (GOOD[1] | {"question": "Q?", "answer": math.nan}, "line 4 (answer nan is not the number of a choice"),
        (GOOD[1] | {"question": "Q?", "answer": []}, "line 4 (answer [] is not the number of a choice"),
        (GOOD[1] | {"question": "Q?", "answer": [1, 4]}, "line 4 (answer 4 is out of range"),
        (GOOD[1] | {"question": "Q?", "split": 3}, "line 4 (split 3 is not text)"),
        (GOOD[1] | {"question": "Q?", "split": ["test"]}, "line 4 (split ['test'] is not text)"),
        (GOOD[1] | {"answer": 0}, "line 4 (asks what line 2 asks)"),
        (GOOD[1] | {"choices": GOOD[1]["choices"][::-1]}, "line 4 (asks what line 2 asks)"),
    ],
)
def test_a_broken_row_is_named_by_its_line(tmp_path, line, says):
    file = write(tmp_path / "d.jsonl", [*GOOD, line, rows(5)[4]])
    with pytest.raises(LetheError) as refusal:
        data.read({"wmdp_bio": file}, tasks.locate(["wmdp_bio"]))
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_every_broken_row_is_named_at_once_and_blank_lines_count(tmp_path):
    file = write(tmp_path / "d.jsonl", [GOOD[0], "", "nonsense", GOOD[0], GOOD[2] | {"answer": 9}])
    with pytest.raises(LetheError, match=r"line 3 \(is not JSON\), line 4 \(asks what line 1 asks\), line 5 \(answer 9"):
        data.read({"wmdp_bio_robust": file}, tasks.locate(["wmdp_bio_robust"]))


def test_of_many_broken_rows_each_is_named(tmp_path):
    some = ["nonsense"] * 10 + [GOOD[0]] + ["nonsense"] + [GOOD[1]] + ["nonsense"] * 2
    with pytest.raises(LetheError, match=r"line 8 \(is not JSON\), lines 9-10, 12, 14-15$"):
        data.read({"wmdp_bio": write(tmp_path / "d.jsonl", some)}, tasks.locate(["wmdp_bio"]))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": "C"}, "line 4 (answer is text, in lines before a number)"),
        ({"source": 7}, "line 4 (source is a number, in lines before text)"),
    ],
)
def test_a_field_that_holds_something_else_than_before_is_broken(tmp_path, row, says):
    """The data set's columns have one type: what the library says of it names no line."""
    some = [one | {"source": "a book"} for one in GOOD]
    file = write(tmp_path / "d.jsonl", [*some, rows(4)[3] | row])
    with pytest.raises(LetheError) as refusal:
        data.read({"wmdp_bio": file}, tasks.locate(["wmdp_bio"]))
    assert says in str(refusal.value)


def test_an_inner_field_has_one_kind_in_all_lines(tmp_path):
    some = [row | {"meta": {"a": [1]}} for row in GOOD] + [rows(4)[3] | {"meta": {"a": ["x"]}}]
    with pytest.raises(LetheError, match=r"line 4 \(meta\.a\[\] is text, in lines before a number\)"):
        data.read({"wmdp_bio": write(tmp_path / "d.jsonl", some)}, tasks.locate(["wmdp_bio"]))


def test_rows_of_another_split_alone_are_refused(tmp_path):
    file = write(tmp_path / "d.jsonl", [row | {"split": "train"} for row in GOOD])
    with pytest.raises(LetheError, match=r"no row of wmdp-bio in the split test, only in train; leave out the field split"):
        data.read({"wmdp_bio": file}, tasks.locate(["wmdp_bio"]))


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


def test_rows_may_name_several_right_answers(loaded, tmp_path):
    file = write(tmp_path / "d.jsonl", [row | {"answer": [0, i % 3 + 1]} for i, row in enumerate(rows(6))])
    assert evaluate_model(*loaded, ["wmdp_bio"], task_data={"wmdp_bio": file})["wmdp_bio"]["chance"] == 0.5


@pytest.mark.parametrize("value", [["x"], {"a": 1}, 5])
def test_a_field_named_subject_that_is_no_text_is_only_a_field(tmp_path, value):
    file = write(tmp_path / "d.jsonl", [row | {"subject": value} for row in GOOD])
    assert len(data.read({"wmdp_bio": file}, tasks.locate(["wmdp_bio"]))["wmdp_bio"].rows) == 3


@pytest.mark.parametrize(
    ("file", "says"), [("", "directory"), ("none.jsonl", "no such file"), ("a\0b", "null byte"), ("x" * 5000, "too long")]
)
def test_a_file_that_cannot_be_read_is_one_line(file, says):
    with pytest.raises(LetheError, match=f"task_data: .*cannot be read.*{says}"):
        data.read({"wmdp_bio": file}, tasks.locate(["wmdp_bio"]))


def test_a_row_of_no_configuration_is_broken(tmp_path):
    """A misspelt subject would otherwise be a question that is never asked."""
    some = [GOOD[0] | {"subject": "anatomy"}, GOOD[1] | {"subject": "anatmy"}, GOOD[2], rows(4)[3] | {"subject": "virology"}]
    with pytest.raises(LetheError, match=r"line 2 \(subject 'anatmy' is no configuration\), line 3 \(has no subject\)"):
        data.read({"mmlu_stem": write(tmp_path / "d.jsonl", some)}, tasks.locate(["mmlu_stem"]))
    found = data.read({"mmlu_stem": write(tmp_path / "d.jsonl", [some[0], some[3]])}, tasks.locate(["mmlu_stem"]))
    assert list(found) == ["mmlu_anatomy"]  # virology is MMLU's, and not of this group


def test_a_subject_that_names_no_configuration_at_all_is_only_a_field(tmp_path):
    file = write(tmp_path / "d.jsonl", [row | {"subject": "biology"} for row in GOOD])
    assert len(data.read({"wmdp_bio": file}, tasks.locate(["wmdp_bio"]))["wmdp_bio"].rows) == 3
    pooled = data.read({"wmdp_bio_robust": file}, tasks.locate(["wmdp_bio_robust"]))
    assert list(pooled) == ["wmdp_bio_robust"]


def test_the_same_words_with_other_choices_are_another_question(tmp_path):
    other = GOOD[0] | {"choices": ["w", "x", "y", "z"]}
    found = data.read({"wmdp_bio": write(tmp_path / "d.jsonl", [*GOOD, other])}, tasks.locate(["wmdp_bio"]))
    assert len(found["wmdp_bio"].rows) == 4


@pytest.mark.parametrize(
    ("names", "task_data", "says"),
    [
        (["lab_forget"], "wmdp_bio", "'wmdp_bio' is none of the tasks that are asked"),
        (["mmlu_stem"], "mmlu_stem", "a field subject with one of"),
    ],
)
def test_data_that_no_task_would_ask_is_refused(tmp_path, names, task_data, says):
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


# --- names and settings ----------------------------------------------------------------------------------------------


def test_folders_groups_and_their_members_are_found(tmp_path):
    (tmp_path / "one.yaml").write_text("task: one\n")
    (tmp_path / "two.yaml").write_text("task: two\n")
    (tmp_path / "all.yaml").write_text("group: all\ntask: [one, two]\n")
    assert list(tasks.locate([str(tmp_path)])) == ["one", "two"]
    assert list(tasks.locate([f"{tmp_path}/all"])) == ["all"]
    assert tasks.leaves("all", tasks.definitions(tmp_path)) == ["one", "two"]
    with pytest.raises(LetheError, match="defines no task 'three'"):
        tasks.locate([f"{tmp_path}/three"])
    known = tasks.definitions(LM_EVAL / "mmlu" / "default")
    assert len(tasks.leaves("mmlu", known)) == 57
    assert "mmlu_anatomy" in tasks.leaves("mmlu_stem", known)


def test_suites_and_commas_are_spelled_out(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("suites:\n  bio: [wmdp_bio, wmdp_bio_robust]\n  general: [mmlu]\n")
    words = ["lab:final", "--config", str(recipe), "--tasks", "bio,general", "lab_retain"]
    config = parse("evaluate", EvaluateConfig, words, "", "model")
    assert config.tasks == ["wmdp_bio", "wmdp_bio_robust", "mmlu", "lab_retain"]
    assert from_recipe(EvaluateConfig, recipe, model="x", tasks=["general"]).tasks == ["mmlu"]
    assert EvalSettings(["a", "b,c"], suites={"a": ["x", "b"]}).tasks == ["x", "b", "c"]


def test_a_recipe_for_unlearning_has_suites_and_local_data(tmp_path):
    from lethe import Transfer

    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "source: lab:global_step600\neval:\n  tasks: [bio, lab_retain]\n  suites: {bio: [wmdp_bio, wmdp_bio_robust]}\n"
        "  task_data: {wmdp_bio: a.jsonl}\n  num_fewshot: 1\n"
    )
    settings = parse("unlearn", Transfer, ["--config", str(recipe), "--eval.task_data", "wmdp_bio=b.jsonl"], "").eval
    assert settings.tasks == ["wmdp_bio", "wmdp_bio_robust", "lab_retain"]
    assert (settings.task_data, settings.num_fewshot) == ({"wmdp_bio": "b.jsonl"}, 1)
    assert from_recipe(Transfer, recipe).eval.task_data == {"wmdp_bio": "a.jsonl"}


def test_task_data_on_the_command_line(tmp_path):
    words = ["m", "--task_data", "a=x.jsonl", "b=y=z.jsonl", "--limit", "3"]
    assert parse("evaluate", EvaluateConfig, words, "", "model").task_data == {"a": "x.jsonl", "b": "y=z.jsonl"}
    assert parse("evaluate", EvaluateConfig, ["m", "--task_data=a=x.jsonl"], "", "model").task_data == {"a": "x.jsonl"}
    with pytest.raises(LetheError, match=r"expected name=value, got 'x\.jsonl'"):
        parse("evaluate", EvaluateConfig, ["m", "--task_data", "x.jsonl"], "", "model")


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
