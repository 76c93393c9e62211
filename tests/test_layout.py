"""The tree of packages: what may import what."""

from __future__ import annotations

import ast
from pathlib import Path

import lethe

ROOT = Path(lethe.__file__).parent
ORDER = [
    "errors",
    "files",
    "distributed",
    "progress",
    "home",
    "config",
    "methods",
    "runs",
    "results",
    "lab",
    "models",
    "text",
    "objectives",
    "evaluation",
    "maps",
    "training",
    "unlearning",
    "attacks",
    "launching",
    "sweeps",
    "report",
    "demo",
    "cli",
    "__main__",
]
"""Packages and modules of the top level, from the ground up: each imports only from those before it, and from itself."""


def modules() -> dict[str, Path]:
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of Lethe that a module imports, anywhere in its code; not under TYPE_CHECKING."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            found.update(f"{node.module}.{each.name}" for each in node.names)
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found.update(each.name for each in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    inner = {each for each in found if each in known}
    # `from lethe.package import module` needs the module; the package's own file runs too, and is the same file for all.
    return inner - {name, "lethe"}


def test_imports_run_downwards_between_packages_and_never_in_a_circle():
    known = modules()
    graph = {name: imported(name, path, known) for name, path in known.items() if name != "lethe"}
    place = {package: i for i, package in enumerate(ORDER)}
    top = {name: name.split(".")[1] for name in graph}
    assert set(top.values()) == set(ORDER)
    upward = [
        f"{name} -> {other}"
        for name, others in graph.items()
        for other in sorted(others)
        if place[top[other]] > place[top[name]]
    ]
    assert not upward
    done: set[str] = set()

    def follow(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in graph[name]:
                follow(other, (*above, name))
            done.add(name)

    for name in graph:
        follow(name, ())


def test_the_top_of_the_package_is_short_and_no_module_is_named_like_a_public_function():
    entries = [path for path in ROOT.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 27
    last = {name.rsplit(".", 1)[-1] for name in modules()}
    assert not last & {name for name in dir(lethe) if callable(getattr(lethe, name))}


def test_files_and_functions_stay_short():
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{name}.{node.name}"
