"""Everything that Lethe uses of lm-eval, its internals included.

Lethe's numbers are those of lm-eval only for the versions that the tests compare with, so the range is narrow and the same as
in pyproject.toml. Another version is refused. Importing this module also makes lm-eval render templates in a sandbox. A
template comes with a task file, perhaps from a stranger, and plain Jinja would let it run Python.
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
    """Refuse a version of lm-eval that Lethe is not tested with.

    Raises:
        LetheError: the version is outside the range.
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
    from lm_eval.utils import handle_non_serializable, hash_string
except (ImportError, importlib.metadata.PackageNotFoundError) as error:
    raise LetheError(f"evaluate: lm_eval cannot be used ({error}); run: pip install '{_WANTED}'") from error

__all__ = ["HFLM", "TaskManager", "handle_non_serializable", "has_bos_prefix", "hash_string"]


def sandboxed(theirs: Environment) -> Environment:
    """An environment that renders as `theirs`, without access to Python's internals and without changes to rows.

    It compiles each template once, where lm-eval would compile it for every question.
    """
    same = {"undefined": theirs.undefined, "loader": theirs.loader, "keep_trailing_newline": theirs.keep_trailing_newline}
    ours = ImmutableSandboxedEnvironment(**same)  # type: ignore[arg-type]
    ours.filters = theirs.filters | ours.filters
    ours.tests = theirs.tests | ours.tests
    ours.globals = theirs.globals | ours.globals  # the sandbox limits range
    ours.from_string = functools.lru_cache(1024)(ours.from_string)  # type: ignore[assignment, method-assign]
    return ours


lm_eval_utils.env = sandboxed(lm_eval_utils.env)
