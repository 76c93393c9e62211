"""The questions of tasks: lm-eval's task objects, and their requests built and tokenised once.

Rendering prompts and tokenising them takes longer than scoring a small model, and is the same for every model with the same
tokenizer. So the requests of a task are kept in $LETHE_HOME, under a name made of everything they depend on: the
task's definition and documents, shots, limit, tokenizer and versions. Within a process task objects are kept too, and are
loaded again only when a file that they come from has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import importlib.metadata
import inspect
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from lethe import tasks
from lethe.errors import LetheError
from lethe.harness import TaskManager, handle_non_serializable, hash_string, load_yaml
from lethe.kept import keep
from lethe.lab import active_preset, lethe_home
from lethe.scoring import Encoded, Scorer
from lethe.tasks import data

FORMAT = 1
SEED = 1234
MEASURED = ("acc", "correct_prob")
_loaded: dict[str, tuple[str, dict[str, list[Leaf]]]] = {}
_tokenizers: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class Question:
    """One question: what is asked, in words and in tokens, one of each a choice."""

    doc_id: int
    doc_hash: str
    target: Any
    arguments: list[tuple[str, str]]
    encoded: list[Encoded]


@dataclass(eq=False)
class Leaf:
    """A task that asks questions itself, with its documents and what was built from them so far."""

    task: Any
    version: Any
    shots: int
    definition: str
    """Hash of the task's definition."""
    docs: list[dict[str, Any]]
    built: dict[str, list[Question]] = field(default_factory=dict)

    @property
    def multiple_choice(self) -> bool:
        return self.task.OUTPUT_TYPE == "multiple_choice"

    def questions(self, scorer: Scorer, limit: int) -> list[Question]:
        """The first `limit` questions (0: all), tokenised; from memory or disk where they are there."""
        docs = self.docs[:limit] if limit else self.docs
        known = [limit if limit < len(self.docs) else 0, tokenizer_hash(scorer.tokenizer), scorer.prefix_token_id]
        key = hashlib.sha256(json.dumps([self.definition, *known, scorer.add_bos_token]).encode()).hexdigest()[:32]
        if key not in self.built:
            file = lethe_home() / "requests" / f"{self.task.config.task}-{key}.json"
            kept = _read(file, len(docs))
            self.built[key] = kept or self._build(scorer, docs)
            if kept is None:
                keep(file, _written(self.built[key]))
        return self.built[key]

    def _build(self, scorer: Scorer, docs: list[dict[str, Any]]) -> list[Question]:
        self.task.set_fewshot_seed(seed=SEED)  # examples are drawn one question after the other: each time the same
        asked = []
        for i, doc in enumerate(docs):
            try:
                context = self.task.fewshot_context(doc, num_fewshot=self.shots, gen_prefix=self.task.doc_to_prefix(doc))
            except ValueError as error:
                raise LetheError(
                    f"num_fewshot: '{self.task.config.task}' cannot give {self.shots} examples ({error}); ask for fewer"
                ) from error
            made = self.task.construct_requests(doc=doc, ctx=context, metadata=(self.task.config.task, i, 1))
            asked.append([tuple(one.args) for one in (made if isinstance(made, list) else [made])])
        encoded = iter(scorer.encode([pair for pairs in asked for pair in pairs]))
        return [
            Question(i, _doc_hash(doc), self.task.doc_to_target(doc), pairs, [next(encoded) for _ in pairs])
            for i, (doc, pairs) in enumerate(zip(docs, asked, strict=True))
        ]


def load_tasks(
    task_names: list[str], task_data: dict[str, str] | None = None, num_fewshot: int | None = None
) -> dict[str, list[Leaf]]:
    """The tasks that each name stands for: one, or all of a group. Loaded once a process, unless their files change.

    Args:
        task_names: lm-eval tasks, groups or tags; or folders (see `tasks.locate`).
        task_data: local files instead of data sets, by task or group (see `tasks.data`).
        num_fewshot: examples in each prompt; None leaves it to the task.

    Raises:
        LetheError: a task is not known, cannot be measured here, or its data cannot be loaded.
    """
    folders = tasks.locate(task_names)
    local = data.read(task_data or {}, folders)
    asked = json.dumps([list(folders.items()), task_data, num_fewshot, active_preset().name], default=str)
    sources = [folder for folder in set(folders.values()) if not tasks.is_lm_evals(folder)]
    files = [
        str(file)
        for folder in sources
        for file in folder.glob("**/*")
        if file.suffix in {".py", ".yaml"} or file.name.endswith("_yaml")
    ]
    files += [one.file for one in local.values()]
    known = _loaded.get(asked)
    if known and known[0] == _contents(files + _data_files(known[1])):
        return known[1]
    found = {name: _load(name, folder, local, num_fewshot) for name, folder in folders.items()}
    _loaded[asked] = _contents(files + _data_files(found)), found
    return found


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides how text becomes tokens: vocabulary, merges, pre-tokenisation, special tokens. 16 hexadecimal digits."""
    if tokenizer not in _tokenizers:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
        for setting in ("padding", "truncation"):  # set by every call, and of no account here
            content.pop(setting, None)
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        text = json.dumps([content, special, type(tokenizer).__name__], sort_keys=True)
        _tokenizers[tokenizer] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return _tokenizers[tokenizer]


def _load(name: str, folder: Path, local: dict[str, data.LocalData], num_fewshot: int | None) -> list[Leaf]:
    import datasets

    datasets.disable_progress_bars()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    index = manager.task_index
    for one in local.values():
        if one.like in index:
            entry = index[one.like]
            definition = load_yaml(entry.yaml_path, resolve_func=True) | _local_source(one)
            if num_fewshot is not None:
                definition["num_fewshot"] = num_fewshot
            _refuse_missing_examples(one, definition)
            index[one.task] = dataclasses.replace(entry, name=one.task, yaml_path=None, cfg=definition)
    if local and name in index and name not in local:
        _leave_out_empty(name, folder, local, index)
    try:
        loaded: Any = manager.load([name])
        found = list(loaded["tasks"].values())
        return [_leaf(task, loaded["groups"].get(name), num_fewshot) for task in found]
    except LetheError:
        raise
    except Exception as error:  # data sets, their scripts and the network fail in a dozen ways; each means the same here
        known = tasks.definitions(folder)
        paths = {str(known[leaf].get("dataset_path")) for leaf in tasks.leaves(name, known) if leaf not in local} - {"None"}
        what = f"the data set {', '.join(sorted(paths))}" if paths else "the data"
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LetheError(
            f"tasks: {what} of '{name}' cannot be loaded ({why}); give its rows in a local file: --task_data {name}=FILE.jsonl"
        ) from error


def _local_source(one: data.LocalData) -> dict[str, Any]:
    """The fields of a definition that take a task's rows from a local file."""
    from datasets import Dataset

    splits = one.splits

    def rows(**_: Any) -> dict[str, Any]:
        return {split: Dataset.from_list(some) for split, some in splits.items() if some}

    settings: dict[str, Any] = {"task": one.task, "custom_dataset": rows, "dataset_path": None, "dataset_kwargs": None}
    return settings | {"test_split": one.asked, "validation_split": None, "training_split": None}


def _refuse_missing_examples(one: data.LocalData, definition: dict[str, Any]) -> None:
    """Refuse few-shot prompts whose examples a local file lacks; without examples their split is never read."""
    split = (definition.get("fewshot_config") or {}).get("split") or definition.get("fewshot_split")
    if split is None or one.splits.get(split):
        return
    if definition.get("num_fewshot"):
        raise LetheError(
            f"task_data: '{one.task}' takes its {definition['num_fewshot']} examples from the split {split}, "
            f'of which \'{one.file}\' has no rows; mark some with "split": "{split}", or set num_fewshot to 0'
        )
    definition["fewshot_split"] = one.asked
    if definition.get("fewshot_config"):
        definition["fewshot_config"] = definition["fewshot_config"] | {"split": one.asked}


def _leave_out_empty(name: str, folder: Path, local: dict[str, data.LocalData], index: dict[str, Any]) -> None:
    """Take those tasks out of a group that its local file has no rows for: their data set is not to be fetched."""
    known = tasks.definitions(folder)
    members = tasks.leaves(name, known)
    with_rows = [leaf for leaf in members if leaf in local]
    if with_rows and known.get(name, {}).get("group") == name:
        index[name] = dataclasses.replace(
            index[name], yaml_path=None, cfg={**known[name], "task": with_rows, "metadata": known[name].get("metadata") or {}}
        )


def _leaf(task: Any, group: Any, num_fewshot: int | None) -> Leaf:
    name, config = task.config.task, task.config
    if task.OUTPUT_TYPE not in {"multiple_choice", "loglikelihood"}:
        raise LetheError(
            f"tasks: '{name}' is of type {task.OUTPUT_TYPE}; tasks of type multiple_choice and loglikelihood can be measured"
        )
    metrics = [metric for metric in task._metric_fn_list if metric in MEASURED]
    if not metrics and config.metric_list is not None:
        raise LetheError(f"tasks: '{name}' measures neither acc nor correct_prob; add one of them to its metric_list")
    shots = config.num_fewshot or 0 if num_fewshot is None else num_fewshot
    task.set_config(key="num_fewshot", value=shots)
    version = task.VERSION if group is None or not group.metadata else group.metadata.get("version", task.VERSION)
    docs = [doc for _, doc in task.doc_iterator()]
    if not docs:
        raise LetheError(f"tasks: '{name}' has no questions")
    return Leaf(task, version, shots, _definition_hash(task, docs, shots), docs)


def _definition_hash(task: Any, docs: list[dict[str, Any]], shots: int) -> str:
    """Hash of everything but tokenizer and limit that requests depend on."""
    config = {k: v for k, v in task.config.to_dict().items() if k not in {"custom_dataset", "dataset_kwargs"}}
    config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
    examples = list(task.sampler.df) if shots and hasattr(getattr(task, "sampler", None), "df") else []
    modules = {inspect.getsourcefile(value) for value in vars(task.config).values() if inspect.isfunction(value)}
    versions = {name: importlib.metadata.version(name) for name in ("lm_eval", "transformers", "tokenizers")}
    content = [FORMAT, versions, config, docs, examples, _contents(sorted(filter(None, modules)))]
    return hashlib.sha256(json.dumps(content, default=_source_of, sort_keys=True).encode()).hexdigest()


def _source_of(value: Any) -> str:
    """A value that JSON has no form for: a function by its source, anything else as lm-eval writes it."""
    if callable(value):
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(value)
        return getattr(value, "__qualname__", type(value).__name__)
    return str(handle_non_serializable(value))


def _doc_hash(doc: dict[str, Any]) -> str:
    """As in lm-eval's own samples."""
    return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))


def _data_files(found: dict[str, list[Leaf]]) -> list[str]:
    """Local files that tasks' own definitions name as their data."""

    def texts(value: Any) -> list[str]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [value] if isinstance(value, str) else [text for one in inner for text in texts(one)]

    configs = [leaf.task.config for leaves in found.values() for leaf in leaves]
    named = [text for config in configs for text in texts([config.dataset_path, config.dataset_kwargs])]
    return sorted({file for text in named for file in glob.glob(text)})


def _contents(files: list[str]) -> str:
    """Hash of files' names and contents; of a folder, of the times and sizes of what is in it."""
    digest = hashlib.sha256()
    for name in sorted(set(files)):
        path = Path(name)
        digest.update(name.encode())
        if path.is_file():
            digest.update(path.read_bytes())
        elif path.is_dir():
            inner = sorted(entry for entry in path.rglob("*") if entry.is_file())
            digest.update(repr([(str(file), os.stat(file).st_mtime_ns, os.stat(file).st_size) for file in inner]).encode())
    return digest.hexdigest()


def _written(questions: list[Question]) -> str:
    """Questions as JSON: each context of a question is written once, in words and in tokens."""
    lines = []
    for q in questions:
        contexts = {json.dumps([text, tokens[0]]): None for (text, _), tokens in zip(q.arguments, q.encoded, strict=True)}
        order = {context: i for i, context in enumerate(contexts)}
        asked = [
            [order[json.dumps([text, tokens[0]])], rest, tokens[1]]
            for (text, rest), tokens in zip(q.arguments, q.encoded, strict=True)
        ]
        lines.append([q.doc_id, q.doc_hash, q.target, [json.loads(context) for context in contexts], asked])
    return json.dumps(lines, default=handle_non_serializable)


def _read(file: Path, count: int) -> list[Question] | None:
    """Questions that were kept; None where there are none, or a file that is damaged."""
    try:
        lines = json.loads(file.read_text(encoding="utf-8"))
        found = [
            Question(
                doc_id,
                doc_hash,
                target,
                [(contexts[i][0], rest) for i, rest, _ in asked],
                [(contexts[i][1], tokens) for i, _, tokens in asked],
            )
            for doc_id, doc_hash, target, contexts, asked in lines
        ]
    except (OSError, ValueError, TypeError, IndexError):
        return None
    return found if len(found) == count else None
