"""Which settings of a task folder would run Python, and the user's consent to that.

A task file in lm-eval's format is more than data. `!function` imports a module beside it, lm-eval downloads and runs a script
for a metric that it does not have, and some builders of data sets unpickle or import their input. The tasks of lm-eval and of
Lethe are trusted. Any other folder runs nothing without consent: `--trust_task_code true` on the command line, or
`with lethe.trust_task_code():` in Python. The workers and jobs of a command have its consent. A recipe or a record cannot give
consent. Templates need none, since `lm_eval_api` renders them in a sandbox.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import yaml

from lethe.files import Loader, UnreadableError

METRICS = frozenset(
    "acc acc_all acc_bytes acc_mutual_info acc_norm bits_per_byte bleu brier_score bypass byte_perplexity chrf chrf++ "  # noqa: SIM905
    "exact_match f1 likelihood mcc perplexity ter word_perplexity".split()
)
"""The metrics of lm-eval. It searches for others in the evaluate library, which runs scripts, even local ones."""
BUILDERS = {
    "pandas": "unpickles its files",
    "iceberg": "imports what its catalog names",
    "sql": "runs any statement on any database",
}
"""Builders of the datasets library that run code from their files or settings."""
MOST_VALUES = 1_000_000
_given: ContextVar[bool] = ContextVar("trust_task_code", default=False)


@contextlib.contextmanager
def trust_task_code(given: bool = True) -> Iterator[None]:
    """Inside, task folders may run their Python code. Read that code first: it has all your permissions.

    >>> with trust_task_code():
    ...     trusts_task_code()
    True
    """
    token = _given.set(given)
    try:
        yield
    finally:
        _given.reset(token)


def trusts_task_code() -> bool:
    """Whether the user has given consent to Python in task folders."""
    return _given.get()


class Python(str):
    """A YAML value that lm-eval would turn into something other than data: its tag and its text."""


class TaskLoader(Loader):
    """Imports nothing: a value with a tag that YAML does not define becomes a `Python` text."""


def _as_text(loader: yaml.Loader, tag: str, node: yaml.Node) -> Python:
    shown = tag.replace("tag:yaml.org,2002:", "!!")
    return Python(f"{shown} {node.value}" if isinstance(node, yaml.ScalarNode) else shown)


TaskLoader.add_multi_constructor(None, _as_text)  # type: ignore[arg-type]  # None: every tag that has no constructor


def python_in(content: Any) -> str | None:
    """The part of a task file that would run Python, in a few words; None if there is none.

    Raises:
        UnreadableError: the content refers to itself, or aliases make it too large.
    """
    left, seen = [content], 0
    while left:
        value = left.pop()
        seen += 1
        if seen > MOST_VALUES:
            raise UnreadableError("refers to itself, or holds more than a million values")
        if isinstance(value, Python):
            return str(value)
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += [*value, *value.values()]
            if found := _python_named(value):
                return found
    return None


def _python_named(settings: dict[Any, Any]) -> str | None:
    """A setting that is plain text and still makes lm-eval run Python, or read a file that was not checked."""
    metrics = settings.get("metric_list")
    for one in metrics if isinstance(metrics, list) else ():
        name = one.get("metric", "acc") if isinstance(one, dict) else "acc"
        if not isinstance(name, str) or name not in METRICS or (isinstance(one, dict) and one.get("hf_evaluate")):
            return f"metric: {name}, a script of the evaluate library"
    path, options = settings.get("dataset_path"), settings.get("dataset_kwargs")
    if isinstance(path, str) and (path in BUILDERS or path.endswith(".py")):
        return f"dataset_path: {path}, which {BUILDERS.get(path, 'is a script')}"
    if isinstance(options, dict) and options.get("trust_remote_code"):
        return "trust_remote_code, scripts of a data set"
    return f"use_prompt: {settings['use_prompt']}" if settings.get("use_prompt") else None
