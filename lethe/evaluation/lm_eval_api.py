"""What Lethe uses of lm-eval, some of it internal: all in one place, which says so if the installed version is another.

Numbers are lm-eval's own only where its internals are those that the tests compare with, so the range of versions is narrow
(the same one as in pyproject.toml). Importing this module puts a sandbox in place of the environment that lm-eval renders
templates in: a template comes with a task file, which may be anybody's, and plain Jinja lets it run Python.
"""

from __future__ import annotations

import functools
import importlib.metadata

from jinja2 import Environment
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lethe.errors import LetheError

FIRST, BEYOND = "0.4.13", "0.4.14"
_WANTED = f"lm_eval>={FIRST},<{BEYOND}"


def require_supported(version: str) -> None:
    """
    Raises:
        LetheError: this version of lm-eval is not one that Lethe is tested with.
    """
    first, beyond, given = (tuple(int(part) for part in one.split(".") if part.isdigit()) for one in (FIRST, BEYOND, version))
    if not first <= given < beyond:
        raise LetheError(f"evaluate: lm_eval {version} is installed, {_WANTED} is supported; run: pip install '{_WANTED}'")


try:
    require_supported(importlib.metadata.version("lm_eval"))
    from lm_eval import utils as lm_eval_utils
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import has_bos_prefix
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import handle_non_serializable, hash_string
except (ImportError, importlib.metadata.PackageNotFoundError) as error:
    raise LetheError(f"evaluate: lm_eval cannot be used ({error}); run: pip install '{_WANTED}'") from error

__all__ = ["HFLM", "TaskManager", "handle_non_serializable", "has_bos_prefix", "hash_string", "load_yaml"]


def sandboxed(theirs: Environment) -> Environment:
    """An environment that renders as `theirs` does, and keeps templates from Python's internals and from changing rows.

    A template is compiled once; lm-eval would compile it for every question.
    """
    kept = {"undefined": theirs.undefined, "loader": theirs.loader, "keep_trailing_newline": theirs.keep_trailing_newline}
    ours = ImmutableSandboxedEnvironment(**kept)  # type: ignore[arg-type]
    ours.filters = theirs.filters | ours.filters
    ours.tests = theirs.tests | ours.tests
    ours.globals = theirs.globals | ours.globals  # ours: a range that ends
    ours.from_string = functools.lru_cache(1024)(ours.from_string)  # type: ignore[assignment, method-assign]
    return ours


lm_eval_utils.env = sandboxed(lm_eval_utils.env)
