"""Tasks and their requests: lm-eval's task objects, and the prompts of their questions, built and tokenised once a process.

    load_tasks -> Leaf (a task with questions) -> Leaf.questions (text) -> Leaf.encoded (tokens)

A process caches task objects until one of their files changes. Commands that train build the prompts before training, so that
a faulty task is refused at once.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import inspect
import json
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lethe.errors import LetheError, full_disk, printable
from lethe.evaluation import tasks
from lethe.evaluation.lm_eval_api import handle_non_serializable, hash_string
from lethe.evaluation.scoring import Encoded, Scorer
from lethe.evaluation.tasks import data
from lethe.evaluation.tasks.manager import data_sets, load, reason, texts_in
from lethe.lab.presets import active_preset

SEED = 1234
MEASURED = ("acc", "correct_prob")
SURE = 1000.0
"""Lead in log-likelihood of the chosen answer, in made-up answers."""
_loaded: dict[str, tuple[list[tuple[str, int, int]], dict[str, list[Leaf]]]] = {}
"""By settings: the state of the files when tasks were loaded, and the tasks."""
_tokenizers: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class Question:
    """One question as text. `arguments`: context and answer of each request. `right`: positions of right choices, if any."""

    doc_id: int
    doc_hash: str
    target: Any
    arguments: list[tuple[str, str]]
    right: list[int] | None


@dataclass(eq=False)
class Leaf:
    """A task with questions of its own (no group), its documents, and the questions and tokens built so far."""

    task: Any
    version: Any
    shots: int
    definition: str
    """Hash of everything that the questions depend on, except their number."""
    docs: list[dict[str, Any]]
    source: str
    """Where its documents come from, for messages."""
    _questions: dict[int, list[Question]] = field(default_factory=dict)
    _encoded: dict[tuple[Any, ...], list[list[Encoded]]] = field(default_factory=dict)

    @property
    def multiple_choice(self) -> bool:
        return self.task.OUTPUT_TYPE == "multiple_choice"

    @property
    def requests_a_choice(self) -> int:
        """2 for mutual information, which also scores each choice without the question."""
        return 2 if "acc_mutual_info" in self.task._metric_fn_list else 1

    def encoded(self, scorer: Scorer, limit: int, before: str = "") -> list[list[Encoded]]:
        """The tokens of the first `limit` questions' requests (0: all), with the text `before` each context."""
        questions = self.questions(limit)
        if before:
            encoded = iter(scorer.encode([(before + c if c else "", answer) for q in questions for c, answer in q.arguments]))
            return [[next(encoded) for _ in q.arguments] for q in questions]
        key = len(questions), tokenizer_hash(scorer.tokenizer), scorer.prefix_token_id, scorer.add_bos_token
        if key not in self._encoded:
            encoded = iter(scorer.encode([pair for q in questions for pair in q.arguments]))
            self._encoded[key] = [[next(encoded) for _ in q.arguments] for q in questions]
        return self._encoded[key]

    def questions(self, limit: int) -> list[Question]:
        """The first `limit` questions (0: all) as text.

        Raises:
            LetheError: a question has no prompt or too few examples, or no question has a right answer.
        """
        docs = self.docs[:limit] if limit else self.docs
        if len(docs) not in self._questions:
            self.task.set_fewshot_seed(seed=SEED)  # lm-eval draws examples question by question
            found = [self._question(i, doc) for i, doc in enumerate(docs)]
            if self.multiple_choice and not callable(self.task.config.process_results) and not any(one.right for one in found):
                wrong = f"has no right answer among the choices of any row of {self.source}"
                raise LetheError(f"tasks: '{self.task.config.task}' {wrong}; correct its doc_to_target, or the rows")
            self._questions[len(docs)] = found
        return self._questions[len(docs)]

    def _question(self, i: int, doc: dict[str, Any]) -> Question:
        task, context = self.task, None
        try:
            context = task.fewshot_context(doc, num_fewshot=self.shots, gen_prefix=task.doc_to_prefix(doc))
            made = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, i, 1))
            pairs = [tuple(one.args) for one in (made if isinstance(made, list) else [made])]
            if not all(isinstance(text, str) for pair in pairs for text in pair):
                raise TypeError("a prompt or an answer is not text")
            if not all(pair[-1] for pair in pairs):
                raise ValueError("an answer is empty")
            return Question(i, _doc_hash(doc), task.doc_to_target(doc), pairs, self._right(doc, len(pairs)))
        except Exception as error:  # rows and functions fail in many ways
            name = task.config.task
            if self.shots and context is None and self._has_prompt_without_examples(doc):
                available = len(getattr(getattr(task, "sampler", None), "df", []))
                wrong = f"cannot give {self.shots} examples, it has {available} to draw from ({reason(error)})"
                raise LetheError(f"num_fewshot: '{name}' {wrong}; give a smaller number") from error
            wrong = f"has no prompt for row {i + 1} of {self.source} ({reason(error)}): {printable(doc, 120)}"
            raise LetheError(f"tasks: '{name}' {wrong}; correct the row") from error

    def _has_prompt_without_examples(self, doc: dict[str, Any]) -> bool:
        with contextlib.suppress(Exception):
            self.task.fewshot_context(doc, num_fewshot=0)
            return True
        return False

    def _right(self, doc: dict[str, Any], answers: int) -> list[int] | None:
        """The positions of the right choices; None: the task has no choices.

        A choice is right if the task's metric says so of made-up answers in which this choice wins.
        """
        choices = answers // self.requests_a_choice if self.multiple_choice else 0
        rest = [(-1.0, False)] * (answers - choices)
        if not choices:
            self._value(doc, rest)
            return None
        sure = [[(0.0 if j == i else -SURE, j == i) for j in range(choices)] for i in range(choices)]
        return [i for i in range(choices) if self._value(doc, sure[i] + rest) > 0.5]

    def _value(self, doc: dict[str, Any], responses: list[tuple[float, bool]]) -> float:
        """The metric of a question for these log-likelihoods."""
        results = self.task.process_results(doc, responses)
        key = next((key for key in MEASURED if key in results), None)
        if key is None:
            raise ValueError(f"it gives {', '.join(results) or 'nothing'}, and neither acc nor correct_prob")
        return float(results[key])


def load_tasks(
    task_names: list[str],
    task_data: dict[str, str] | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> dict[str, list[Leaf]]:
    """The tasks of each name: the task itself, or all tasks of a group. A process loads them once, unless their files change.

    Args:
        task_names: tasks, groups or tags of lm-eval, or task folders (see `tasks.locate`).
        task_data: local files in place of data sets, by task or group (see `tasks.data`).
        num_fewshot: examples in each prompt; None: as the task defines.
        limit: build the prompts of the first `limit` questions of each task (0: of all) now, to find their faults; None: later.

    Raises:
        LetheError: a task is unknown or of an unsupported type, or its data cannot be loaded.
    """
    folders = tasks.locate(task_names)
    local = data.read(task_data or {}, folders)
    key = json.dumps([list(folders.items()), task_data, num_fewshot, active_preset().name], default=str)
    paths = {str(folder) for folder in folders.values() if not tasks.is_lm_evals(folder)} | {one.file for one in local.values()}
    if key not in _loaded or _loaded[key][0] != _state(paths, _loaded[key][1]):
        made = {name: _load(name, folder, local, num_fewshot) for name, folder in folders.items()}
        _loaded[key] = _state(paths, made), made
    found = _loaded[key][1]
    if limit is not None:
        for leaf in (leaf for leaves in found.values() for leaf in leaves):
            leaf.questions(limit)
    return found


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what determines the tokens of a text: vocabulary, merges, pre-tokenisation, special tokens. 16 hex digits."""
    if tokenizer not in _tokenizers:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
        for setting in ("padding", "truncation"):  # each call sets them anew
            content.pop(setting, None)
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        text = json.dumps([content, special, type(tokenizer).__name__], sort_keys=True)
        _tokenizers[tokenizer] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return _tokenizers[tokenizer]


def _load(name: str, folder: Path, local: dict[str, data.LocalData], num_fewshot: int | None) -> list[Leaf]:
    import datasets

    datasets.disable_progress_bars()
    known = tasks.definitions(folder)
    members = {name, *tasks.leaves(name, known)}
    files = sorted({f"'{one.file}'" for task, one in local.items() if task in members})
    source = ", ".join(files) or data_sets([known[task] for task in members if task in known])
    try:
        group = known[name] if "group" in known.get(name, {}) else {}
        version = (group.get("metadata") or {}).get("version")
        leaves = [_leaf(task, version, num_fewshot, source) for task in load(name, folder, local, num_fewshot)]
        if not leaves:
            raise LetheError(f"tasks: the group '{name}' has no tasks; list some under task")
        if len({"correct_prob" in leaf.task._metric_fn_list for leaf in leaves}) > 1:
            raise LetheError(f"tasks: of '{name}' some tasks measure correct_prob and some acc; name the tasks one by one")
        return leaves
    except LetheError:
        raise
    except Exception as error:  # data sets, the network and definitions fail in many ways
        if full_disk(error):
            raise
        why = reason(error)
        if isinstance(error, ImportError):
            raise LetheError(f"tasks: the functions of '{name}' cannot be imported ({why}); install what they need") from error
        if files:
            raise LetheError(f"task_data: {source} cannot be used for '{name}' ({why}); correct its rows") from error
        if any(frame.name == "download" for frame in traceback.extract_tb(error.__traceback__)):
            todo = f"give its rows in a local file: --task_data {name}=FILE.jsonl"
            raise LetheError(f"tasks: {source} of '{name}' cannot be loaded ({why}); {todo}") from error
        part = "a template" if isinstance(error, TemplateError) else "the definition"
        wrong = f"{part} of '{name}' does not work with {source} ({why})"
        raise LetheError(f"tasks: {wrong}; correct the file in '{folder}' that defines it") from error


def _leaf(task: Any, version: Any, num_fewshot: int | None, source: str) -> Leaf:
    name, config = task.config.task, task.config
    if task.OUTPUT_TYPE not in {"multiple_choice", "loglikelihood"}:
        raise LetheError(f"tasks: '{name}' is of type {task.OUTPUT_TYPE}; give a task of type multiple_choice or loglikelihood")
    metrics = [metric for metric in task._metric_fn_list if metric in MEASURED]
    if not metrics and config.metric_list is not None:
        raise LetheError(f"tasks: '{name}' measures neither acc nor correct_prob; add one of them to its metric_list")
    shots = config.num_fewshot or 0 if num_fewshot is None else num_fewshot
    task.set_config(key="num_fewshot", value=shots)
    docs = [doc for _, doc in task.doc_iterator()]
    if not docs:
        raise LetheError(f"tasks: '{name}' has no questions; name another task")
    return Leaf(task, task.VERSION if version is None else version, shots, _definition_hash(task, docs, shots), docs, source)


def _definition_hash(task: Any, docs: list[dict[str, Any]], shots: int) -> str:
    config = {k: v for k, v in task.config.to_dict().items() if k not in {"custom_dataset", "dataset_kwargs"}}
    config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
    examples = list(task.sampler.df) if shots and hasattr(getattr(task, "sampler", None), "df") else []
    modules = {inspect.getsourcefile(value) for value in vars(task.config).values() if inspect.isfunction(value)}
    content = [config, docs, examples, [Path(module).read_text() for module in sorted(filter(None, modules))]]
    return hashlib.sha256(json.dumps(content, default=_source_of, sort_keys=True).encode()).hexdigest()


def _source_of(value: Any) -> str:
    """The source of a function, or another value as lm-eval writes it, since JSON has no form for them."""
    if callable(value):
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(value)
        return getattr(value, "__qualname__", type(value).__name__)
    return str(handle_non_serializable(value))


def _doc_hash(doc: dict[str, Any]) -> str:
    """As in lm-eval's own samples."""
    return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))


def _state(paths: set[str], found: dict[str, list[Leaf]]) -> list[tuple[str, int, int]]:
    """Times and sizes of the files at `paths`, and of the local data files in the definitions of tasks."""
    configs = [leaf.task.config for leaves in found.values() for leaf in leaves]
    named = {text for config in configs for text in texts_in([config.dataset_path, config.dataset_kwargs])}
    roots = [*paths, *(file for text in named for file in glob.glob(text))]
    files = {file for root in map(Path, roots) for file in (root, *root.rglob("*")) if file.is_file()}
    return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(files)]
