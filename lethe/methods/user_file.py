"""Methods in files of the user: `--method ./mine.py`.

A file is code, and runs with the user's permissions. It runs only if the user has named it: on the command line, in a recipe,
or in Python. `trust` then prints a warning and stores the file's SHA-256 in $LETHE_HOME/trusted. `load` runs no other file.
So processes that a command starts run the file too, while a record from somebody else cannot make Lethe run one.

A run has a copy of the file, `method.py`, and resumes from the copy. A sweep reads the file itself, which must not change while
the sweep runs. Each content is loaded once, as a module of its own.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lethe import distributed
from lethe.config.checks import types_of
from lethe.errors import LetheError, printable
from lethe.files import write_atomically
from lethe.home import lethe_home, store, stored

if TYPE_CHECKING:
    from lethe.methods.method import Method
    from lethe.runs.run import Run

COPY = "method.py"
"""The file's copy in the folder of a run."""
PREFIX, PATH, CLASS = "lethe_method_", "LETHE_PATH", "LETHE_CLASS"
"""Names of a file's module (with its SHA-256), and of what Lethe keeps in it: its path and its class."""
TAKES = {"needs": 0, "loss": 3, "gradient": 1, "begin": 2, "forget_need": 0, "forget_loss": 1}
"""How many arguments Lethe gives to the functions that a method may define."""
_trusted: set[str] = set()


def is_file(method: Any) -> bool:
    """Whether the setting `method` names a file."""
    return isinstance(method, str) and ("/" in method or method.endswith(".py"))


def trust(method: str | Path) -> None:
    """The user has named this file: warn that it is code, and let it run on this machine from now on."""
    key = _sha256(_source(method))
    if key not in _trusted and distributed.is_first():
        sys.stderr.write(f"lethe: method '{printable(method, 300)}' is Python code, and runs with your permissions\n")
    _trusted.add(key)
    if stored(_stamp(key)) is None:
        store(_stamp(key), str(method))


def load(method: str | Path, base: type[Method], usual: type[Method]) -> type[Method]:
    """The class of the method in a file: a subclass of `base` (Method), perhaps of `usual` (ForgetAndRetain).

    Raises:
        LetheError: the user has never named this file, it cannot be run, or it does not define a method.
    """
    source = _source(method)
    key, shown = _sha256(source), printable(method, 300)
    if key not in _trusted and stored(_stamp(key)) is None:
        raise LetheError(
            f"method: '{shown}' is Python code that you have not run before; read it, and if you trust it, add "
            f"--trust_record true"
        )
    name = f"{PREFIX}{key}"
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__file__, module.__dict__[PATH] = str(Path(method).absolute()), str(method)
        sys.modules[name] = module
        try:
            exec(compile(source, module.__file__, "exec"), module.__dict__)
            module.__dict__[CLASS] = _method_in(module, shown, base, usual)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, LetheError | KeyboardInterrupt):
                raise
            raise LetheError(f"method: '{shown}' cannot be loaded{_place(error, module.__file__)}: {_said(error)}") from error
    return _class_of(sys.modules[name])


def sha256_of(method: type) -> str | None:
    """The SHA-256 of the file that a method's class comes from; None for a method that comes with Lethe."""
    return method.__module__.removeprefix(PREFIX) if method.__module__.startswith(PREFIX) else None


def name_of(method: type) -> str:
    """The name of a method's class: that of its module in lethe/methods, or the path of its file."""
    if sha256_of(method) is None:
        return method.__module__.rpartition(".")[2]
    return str(vars(sys.modules[method.__module__])[PATH])


def is_same(method: Any, kind: type) -> bool:
    """Whether `method` names a file with the content that the class `kind` comes from."""
    return is_file(method) and sha256_of(kind) == _sha256(_source(method))


def loaded() -> list[type[Method]]:
    """The methods of all files that this process has loaded."""
    return [_class_of(module) for name, module in list(sys.modules.items()) if name.startswith(PREFIX)]


def _class_of(module: types.ModuleType) -> type[Method]:
    found: type[Method] = vars(module)[CLASS]
    return found


def hashes(methods: Iterable[Any]) -> dict[str, str]:
    """The SHA-256 of those methods that are files, by path."""
    return {method: _sha256(_source(method)) for method in methods if is_file(method)}


def keep(run: Run, key: str | None) -> None:
    """Copy the method's file into the folder of a new run. `key`: the SHA-256 of the file that was checked.

    Raises:
        LetheError: the file is gone, or has changed. The run is removed.
    """
    method = run.record["config"].get("method")
    if not is_file(method):
        return
    try:
        source = _source(method)
        if _sha256(source) != key:
            raise LetheError(f"method: '{printable(method, 300)}' has changed since it was checked; start again")
    except LetheError:
        run.discard()
        raise
    if distributed.is_first():
        write_atomically(run.path / COPY, source)
    run.update(method_file={"path": method, "sha256": key})


def kept(run: Run) -> Path:
    """The copy of the method's file in the folder of a run.

    Raises:
        LetheError: there is none, or it is not the file that the run began with.
    """
    copy, recorded = run.path / COPY, (run.record.get("method_file") or {}).get("sha256")
    if recorded is None or not copy.is_file() or _sha256(_source(copy)) != recorded:
        raise LetheError(f"method: '{copy}' is not the file that the run began with; restore it, or start a new run")
    return copy


def refuse_changed(expected: dict[str, str]) -> None:
    """Refuse files of methods that are not those that a sweep began with. `expected`: the SHA-256 by path."""
    for path, key in expected.items():
        if _sha256(_source(path)) != key:
            raise LetheError(
                f"method: '{printable(path, 300)}' has changed since the sweep began; undo the change, or start anew"
            )


def _method_in(module: types.ModuleType, shown: str, base: Any, usual: Any) -> type[Method]:
    """The one method that a module defines, after a check that it is whole."""
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__
    ]
    found = [each for each in dict.fromkeys(found) if not each.__name__.startswith("_")]
    if len(found) != 1:
        classes = ", ".join(each.__name__ for each in found) or "none"
        raise LetheError(f"method: '{shown}' must define one subclass of Method or ForgetAndRetain, and defines {classes}")
    method: Any = found[0]
    if "__dataclass_fields__" not in vars(method):
        raise LetheError(f"method: {method.__name__} in '{shown}' is no dataclass; write @dataclass(kw_only=True) above it")
    written = {name for name in TAKES if getattr(method, name, None) is not getattr(base, name, None)}
    if issubclass(method, usual):
        written -= {name for name in ("forget_need", "forget_loss") if getattr(method, name) is getattr(usual, name)}
        lacking = [name for name in ("forget_need", "forget_loss") if name not in written]
    else:
        lacking = [name for name in ("needs", "loss") if name not in written and not (name == "loss" and "gradient" in written)]
    if lacking:
        raise LetheError(f"method: {method.__name__} in '{shown}' does not define {lacking[0]}(); write it")
    for name in sorted(written):
        _refuse_signature(method, name, getattr(usual, name, None), shown)
    types_of(method)
    return method  # type: ignore[no-any-return]


def _refuse_signature(method: type, name: str, original: Any, shown: str) -> None:
    """Refuse a function that does not take what Lethe gives it, as the function `original` of the base class does."""
    wanted, given = inspect.signature(original), inspect.signature(getattr(method, name))
    try:
        given.bind(*range(TAKES[name] + 1))
    except TypeError:
        expected = ", ".join(wanted.parameters)
        raise LetheError(
            f"method: {name}({', '.join(given.parameters)}) of {method.__name__} in '{shown}' must be {name}({expected})"
        ) from None


def _source(method: str | Path) -> bytes:
    try:
        return Path(method).read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise LetheError(
            f"method: the file '{printable(method, 300)}' cannot be read ({why}); name the file of a method"
        ) from error


def _sha256(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()


def _stamp(key: str) -> Path:
    """The file that holds the user's consent."""
    return lethe_home() / "trusted" / f"method-{key}.json"


def _place(error: BaseException, file: str) -> str:
    """Where in the file an error arose: `, line 3`."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    lines, traceback = [], error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == file:
            lines.append(traceback.tb_lineno)
        traceback = traceback.tb_next
    return f", line {lines[-1]}" if lines else ""


def _said(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return printable(f"{type(error).__name__}: {' '.join(text.split())}", 300)
