"""Task folders of somebody else's: they run no Python without the user's word, and what is wrong with them is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from jinja2 import Environment
from transformers import AutoModelForCausalLM, AutoTokenizer

import lethe
from lethe import Transfer
from lethe.cli import main
from lethe.config import EvaluateConfig, SlurmSettings, to_dict
from lethe.config.parse import from_recipe
from lethe.errors import LetheError
from lethe.evaluation.accuracy import evaluate_model, load_tasks
from lethe.evaluation.lm_eval_api import sandboxed
from lethe.evaluation.tasks import consent
from lethe.launching.launchers import LocalLauncher, SlurmLauncher
from lethe.runs.run import Run

ROWS = [{"question": f"Q{i}?", "choices": ["stone", "cork", "iron"], "answer": i % 3, "golds": [i % 3]} for i in range(6)]
BASE = {
    "dataset_path": "json",
    "dataset_kwargs": "{data_files: {test: FILE}}",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": "[{metric: acc}]",
}
CODE = "open('ran', 'w').write('x')\ndef text(doc): return doc['question']\n"
RUNS = {
    "a function": {"doc_to_text": "!function code.text"},
    "a function of an installed module": {"doc_to_text": "!function os.system"},
    "a function in a value that nothing reads": {"metadata": "{deep: [{down: !function code.text}]}"},
    "a class": {"class": "!function code.text"},
    "a Python name": {"doc_to_text": "!!python/name:os.system"},
    "a Python object": {"metadata": "!!python/object/apply:os.system ['touch ran']"},
    "a tag in full": {"metadata": "{a: !<!function> code.text}"},
    "a metric of the evaluate library": {"metric_list": "[{metric: ./code.py}]"},
    "a metric said to be of the evaluate library": {"metric_list": "[{metric: acc, hf_evaluate: true}]"},
    "a data set in pickles": {"dataset_path": "pandas"},
    "a data set's script": {"dataset_path": "./code.py"},
    "a data set's remote code": {"dataset_kwargs": "{trust_remote_code: true}"},
    "a prompt from another file": {"use_prompt": "prompts.yaml:all"},
}


def text_of(name: str = "mine", **settings: str) -> str:
    return f"task: {name}\n" + "".join(f"{key}: {value}\n" for key, value in (BASE | settings).items())


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path) -> None:
    """The user's caches are left alone; what runs writes `ran` into the working directory."""
    import datasets

    monkeypatch.setenv("LETHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """folder(files): a task folder with rows, in which FILE stands for their file."""

    def make(files: dict[str, str | bytes], rows: list[dict] = ROWS, name: str = "tasks") -> str:
        where = tmp_path / name
        data = where / "rows.jsonl"
        for file, text in files.items():
            (where / file).parent.mkdir(parents=True, exist_ok=True)
            (where / file).write_bytes(text if isinstance(text, bytes) else text.replace("FILE", str(data)).encode())
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(where)

    return make


@pytest.fixture(scope="module")
def model(make_model, tmp_path_factory):
    return str(make_model("gpt2", tmp_path_factory.mktemp("model")))


def refusal(tasks: list[str], **asked: object) -> str:
    with pytest.raises(LetheError) as found:
        load_tasks(tasks, limit=0, **asked)
    assert "\n" not in str(found.value)
    return str(found.value)


# --- Python ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_python_of_a_task_folder_is_refused(folder, settings):
    where = folder({"mine.yaml": text_of(**settings), "code.py": CODE})
    assert "--trust_task_code true" in refusal([where])
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "files",
    [
        {"mine.yaml": text_of(include="base"), "base": "process_docs: !function code.text\n"},
        {
            "mine.yaml": text_of(include="../elsewhere/base.yaml"),
            "../elsewhere/base.yaml": "description: !function code.text\n",
        },
        {"mine.yaml": text_of(), "below/other.yaml": text_of("other", doc_to_text="!function code.text")},
        {"mine.yaml": text_of(), "all.yaml": "group: all\ntask: [mine, {task: other, dataset_path: pandas}]\n"},
        {"mine.yaml": f"%TAG !e! !func\n---\n{text_of(metadata='{a: !e!tion code.text}')}"},
        {"__pycache__/mine.yaml": text_of("/elsewhere/base.yaml"), "../elsewhere/base.yaml": text_of("!function code.text")},
    ],
    ids=[
        "an include",
        "an include elsewhere",
        "a folder below",
        "a group's own task",
        "a tag by another name",
        "a path as name",
    ],
)
def test_python_is_found_wherever_lm_eval_would_take_it_from(folder, files):
    where = folder(files | {"code.py": CODE, "../elsewhere/code.py": CODE})
    refusal([where])
    assert not Path("ran").exists()


def test_python_runs_with_consent_and_only_then(folder, model):
    where = folder({"mine.yaml": text_of(doc_to_text="!function code.text"), "code.py": CODE})
    loaded = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    with lethe.trust_task_code():
        assert evaluate_model(*loaded, [where])["mine"]["n"] == len(ROWS)
    assert Path("ran").exists()
    assert "runs Python" in refusal([where])  # although the task is still in memory
    with lethe.trust_task_code(), lethe.trust_task_code(False):
        assert "runs Python" in refusal([where])


def test_a_folder_within_lm_evals_by_name_alone_is_not_trusted(folder):
    import lm_eval

    where = folder({"mine.yaml": text_of(doc_to_text="!function code.text"), "code.py": CODE})
    roundabout = f"{Path(lm_eval.__file__).parent}/tasks/../../../../../../../../../../../../../..{where}"
    assert os.path.samefile(roundabout, where)
    assert "runs Python" in refusal([roundabout])
    assert load_tasks(["lab_forget_cloze"])  # Lethe's own, with functions


def test_lm_evals_metrics_are_those_that_need_no_consent():
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api.registry import metric_registry

    assert {*metric_registry.keys()} >= consent.METRICS >= {"acc", "acc_norm", "acc_mutual_info", "perplexity"}


def test_consent_is_a_word_of_the_command_alone(folder, model, tmp_path, capsys):
    where = folder({"mine.yaml": text_of(doc_to_text="!function code.text"), "code.py": CODE})
    out = str(tmp_path / "runs")
    words = ["evaluate", model, "--tasks", where, "--out", out]
    assert main(words) == 2 and "--trust_task_code true" in capsys.readouterr().err
    assert main([*words, "--trust_task_code", "false"]) == 2 and main([*words, "--trust_task_code=maybe"]) == 2
    (tmp_path / "recipe.yaml").write_text("trust_task_code: true\n")
    assert main([*words, "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "unknown field 'trust_task_code'" in capsys.readouterr().err
    with pytest.raises(LetheError, match="no setting 'trust_task_code'"):
        from_recipe(Transfer, None, source="lab:final", trust_task_code=True)
    assert main(["runs", out, "--trust_task_code", "true"]) == 2  # it evaluates nothing
    assert not Path("ran").exists() and not Path(out).exists()
    assert main([*words, "--trust_task_code", "true"]) == 0 and Path("ran").exists()
    (run,) = (Run.open(path) for path in Path(out).iterdir())
    assert "trust" not in (run.path / "run.json").read_text()


def test_a_foreign_run_is_not_resumed_with_its_tasks_code_unless_the_user_says_so(folder, model, tmp_path, capsys):
    where = folder({"mine.yaml": text_of(doc_to_text="!function code.text"), "code.py": CODE})
    settings = to_dict(EvaluateConfig(model, [where], out=str(tmp_path / "runs"))) | {"trust_task_code": True}
    run = Run.create("evaluate", "foreign", settings, str(tmp_path / "runs"))
    run.update(status="failed", reason="stopped")
    assert main(["resume", str(run.path)]) == 2
    assert "runs Python" in capsys.readouterr().err and not Path("ran").exists()
    assert main(["resume", str(run.path), "--trust_task_code", "true"]) == 0 and Path("ran").exists()


def test_workers_have_the_consent_of_the_command_that_gives_them_their_work(folder, model, tmp_path):
    where = folder({"mine.yaml": text_of(doc_to_text="!function code.text"), "code.py": CODE})
    runs = [
        Run.create("evaluate", name, to_dict(EvaluateConfig(model, [where], out="runs")), str(tmp_path / "runs"))
        for name in ("without", "with")
    ]
    launcher = LocalLauncher(tmp_path, 1, 1)
    try:
        for run, given in zip(runs, (False, True), strict=True):
            with lethe.trust_task_code(given):
                launcher.start(run.path.name, [run.path])
            while launcher.workers and launcher.workers[0].busy:
                launcher.wait(1)
    finally:
        launcher.stop()
    assert [Run.open(run.path).record["status"] for run in runs] == ["failed", "complete"]
    assert "--trust_task_code" in Run.open(runs[0].path).record["reason"]


def test_jobs_have_the_consent_of_the_command_that_submits_them(tmp_path, monkeypatch):
    launcher, submitted = SlurmLauncher(tmp_path, 1, SlurmSettings()), []
    monkeypatch.setattr("lethe.launching.slurm.submit", lambda work, *rest: submitted.append(work) or "1")
    for given in (False, True):
        with lethe.trust_task_code(given):
            launcher.start("trial", [])
    seen: list[bool] = []
    monkeypatch.setattr("lethe.launching.worker.work", lambda folders, job_id: seen.append(consent.trusts_task_code()))
    monkeypatch.setattr("lethe.launching.worker.SECONDS_TO_NAME_JOB", 0)
    run = Run.create("evaluate", "job", {}, str(tmp_path / "runs"))
    for work in submitted:
        work.folders.append(str(run.path))
        work()
    assert seen == [False, True] and not consent.trusts_task_code()


# --- templates -------------------------------------------------------------------------------------------------------

ESCAPES = [
    "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
    "{{ lipsum.__globals__['os'].system('touch ran') }}",
    "{{ question|attr('__class__') }}",
    "{{ '{0.__class__}'.format(question) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ choices.append('more') }}",
]


@pytest.mark.parametrize(
    ("template", "setting"),
    [(template, "doc_to_text") for template in ESCAPES]
    + [(ESCAPES[0], setting) for setting in ("doc_to_choice", "doc_to_target", "description", "gen_prefix")],
)
def test_templates_are_rendered_in_a_sandbox(folder, template, setting):
    """Consent or not: lm-eval's own tasks render rows of other people's, too."""
    where = folder({"mine.yaml": text_of(**{setting: json.dumps(template)})})
    with lethe.trust_task_code():
        assert "unsafe" in refusal([where])
    assert not Path("ran").exists()


def test_the_sandbox_renders_what_lm_eval_renders():
    import lm_eval.utils
    from jinja2 import BaseLoader, StrictUndefined

    theirs = Environment(loader=BaseLoader, undefined=StrictUndefined, keep_trailing_newline=True)
    theirs.filters["regex_replace"] = lm_eval.utils.regex_replace
    doc = {"q": " a b\n", "choices": ["x", "y"], "answer": 1, "rows": [{"text": ["u"]}]}
    for template in (
        "{{q.strip()}}\n",
        "{{q|regex_replace('a', 'c')}}",
        "{{choices[answer]}} {{'ABCD'[answer]}} {{['A', 'B'][answer]}}",
        "{% for c in choices %}{{loop.index}}. {{c|capitalize}}{% endfor %}",
        "{{rows[0].text[0]}}{{choices|map('upper')|join(', ')}}{% set n = namespace(i=0) %}{{range(3)|list}}",
        "{{choices.index('y')}}{{{'a': 1}['a']}}",
    ):
        assert sandboxed(theirs).from_string(template).render(**doc) == theirs.from_string(template).render(**doc)


# --- definitions that do not work ------------------------------------------------------------------------------------

FAULTS: list[tuple[str, dict[str, str | bytes], str, str]] = [
    ("a cycle", {"mine.yaml": text_of(include="b"), "b": "include: mine.yaml\n"}, "", "includes itself"),
    ("a group in itself", {"mine.yaml": text_of(), "g.yaml": "group: g\ntask: [mine, g]\n"}, "/g", "contains itself (g > g)"),
    (
        "a group in itself by way of another",
        {"mine.yaml": text_of(), "g.yaml": "group: g\ntask: [h]\n", "h.yaml": "group: h\ntask: [{group: i, task: [g]}]\n"},
        "/g",
        "contains itself (g > h > i > g)",
    ),
    ("an unknown member", {"mine.yaml": text_of(), "g.yaml": "group: g\ntask: [other]\n"}, "/g", "has 'other' among its tasks"),
    (
        "groups that double",
        {"mine.yaml": text_of(), "g0.yaml": "group: g0\ntask: [mine, mine]\n"}
        | {f"g{i}.yaml": f"group: g{i}\ntask: [g{i - 1}, g{i - 1}]\n" for i in range(1, 30)},
        "/g29",
        "more than 100,000 tasks",
    ),
    ("YAML that refers to itself", {"mine.yaml": text_of(metadata="&a {b: *a}")}, "", "refers to itself"),
    ("no mapping", {"mine.yaml": "[1, 2]\n"}, "", "no YAML file that defines a task"),
    ("a terminal's words as name", {"mine.yaml": text_of('"\\e[31mred"')}, "", "names a task '\\x1b[31mred'"),
    ("an unknown split", {"mine.yaml": text_of(test_split="tets")}, "", "definition of 'mine' does not work"),
    ("an unknown field", {"mine.yaml": text_of(doc_to_text="'{{nothing}}'")}, "", "'nothing' is undefined"),
    ("a broken template", {"mine.yaml": text_of(doc_to_text="'{{question'")}, "", "a template of 'mine'"),
    ("no data", {"mine.yaml": text_of(dataset_kwargs="{data_files: none.jsonl}")}, "", "data set json (none.jsonl)"),
]


@pytest.mark.parametrize(("files", "ask", "says"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_definition_that_does_not_work_is_one_line(folder, files, ask, says):
    assert says in refusal([folder(files) + ask])


@pytest.mark.parametrize(("kind", "says"), [("link", "a broken link"), ("loop", "symbolic links"), ("folder", "not a file")])
def test_what_is_no_file_is_one_line(folder, kind, says):
    where = folder({"mine.yaml": text_of()})
    other = Path(where, "other.yaml")
    other.mkdir() if kind == "folder" else other.symlink_to("other.yaml" if kind == "loop" else "nowhere")
    assert says in refusal([where])


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "x/" * 3000, "\x1b[31m", "a\nb"])
def test_any_name_is_refused_in_one_line(name):
    assert "there is no task" in refusal([name])


def test_inner_groups_and_tags_are_found(folder):
    files = {"mine.yaml": text_of(tag="[some]"), "g.yaml": "group: g\ntask: [{group: inner, task: [mine]}, some]\n"}
    files |= {"compose.yaml": "task: {build: 1}\n", "play.yaml": "- task: 1\n"}  # of other programs
    where = folder(files)
    assert [len(load_tasks([f"{where}/{name}"])[name]) for name in ("g", "some")] == [1, 1]


# --- rows and examples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": None}, "row 7"),
        ({"choices": None}, "row 7"),
        ({"choices": ["a", None, "b"]}, "row 7"),
        ({"choices": ["", "a", "b"]}, "an answer is empty"),
    ],
)
def test_a_row_without_a_prompt_is_named_before_anything_is_computed(folder, row, says):
    where = folder({"mine.yaml": text_of(target_delimiter='""')}, [*ROWS, ROWS[0] | {"question": "last"} | row])
    assert says in refusal([where])


EXAMPLES = "{sampler: first_n, samples: [{question: a, choices: [x, y, z], answer: 0}]}"


@pytest.mark.parametrize(
    ("settings", "most"),
    [({}, 6), ({"fewshot_split": "test"}, 5), ({"fewshot_config": EXAMPLES}, 1)],
    ids=["no split of its own", "the split that is asked", "fixed examples"],
)
def test_more_examples_than_there_are_are_refused_when_tasks_are_loaded(folder, settings, most):
    where = folder({"mine.yaml": text_of(**settings)})
    assert load_tasks([where], num_fewshot=most, limit=0)
    assert f"num_fewshot: 'mine' cannot give {most + 1} examples" in refusal([where], num_fewshot=most + 1)


@pytest.mark.parametrize("command", ["check", "unlearn", "tamper", "evaluate", "checkpoints"])
def test_commands_refuse_too_many_examples_before_anything_is_written(lab, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("LETHE_HOME", os.environ["LETHE_TEST_HOME"])
    prefix = "" if command in {"evaluate", "checkpoints"} else "eval."
    asked = [f"--{prefix}tasks", "lab_forget_robust", f"--{prefix}num_fewshot", "5000", "--out", str(tmp_path / "runs")]
    source = f"lab:{min(path.name for path in (lab / 'checkpoints').iterdir())}"
    model = ["--source", source] if command in {"check", "unlearn"} else ["lab:final"]
    assert main([command, *model, *asked]) == 2
    assert "num_fewshot: 'lab_forget_robust' cannot give 5000 examples" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_function_that_gives_no_number_is_refused_when_tasks_are_loaded(folder):
    code = "def results(doc, answers): return {'loss': 1.0}\n"
    where = folder({"mine.yaml": text_of(process_results="!function code.results"), "code.py": code})
    with lethe.trust_task_code():
        assert "neither acc nor correct_prob" in refusal([where])
