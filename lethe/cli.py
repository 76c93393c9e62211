"""The command line: each command builds one config object and calls one function of it.

    lethe unlearn --config lab --lr 2e-3 --lora.r 8

Settings come from the defaults, then the recipe (YAML), then the command line. Each command imports what needs torch inside its
function, after the checks that do not need it, so that help and errors answer at once. A `LetheError` is one line on standard
error and exit code 2. With `--json`, standard output holds JSON alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import typing
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lethe import config as c
from lethe import distributed
from lethe.config import recipes
from lethe.config.arguments import TRUST, as_suite, command_of, consent, is_suite
from lethe.config.parse import parse
from lethe.errors import LONGEST, LetheError, full_disk, printable
from lethe.evaluation.tasks.consent import trust_task_code
from lethe.methods.check_settings import Check
from lethe.methods.method import Method
from lethe.progress import quiet
from lethe.runs import garbage
from lethe.runs.run import Run, Terminated

MANY_ROWS = 200


@dataclass
class Command:
    """A command: its function, its settings, and what its help shows.

    `runs_tasks`: it evaluates on tasks, or has workers that do, so it takes --trust_task_code.
    """

    run: Callable[[Any, bool], None]
    config: type
    about: str
    example: str
    positional: str | None = None
    runs_tasks: bool = False


COMMANDS: dict[str, Command] = {}
Answer = Callable[[Any, bool], None]


def command(name: str, example: str, positional: str | None = None, runs_tasks: bool = False) -> Callable[[Answer], Answer]:
    """Make a function of settings and `as_json` a command. Its help begins with its docstring, or else its settings' one."""

    def register(function: Answer) -> Answer:
        config = typing.get_type_hints(function)["settings"]
        about = (function.__doc__ or config.__doc__ or "").strip()
        COMMANDS[name] = Command(function, config, about, example, positional, runs_tasks)
        return function

    return register


class _NotComplete(Exception):
    """A run ended in another status than complete."""


@garbage.seldom()
def console() -> int:
    """The command `lethe`: `main` as a process of its own."""
    return main()


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns 0, 1 (the run did not complete), 2 (refused), 130 (interrupted) or 143 (stopped).

    Of several processes, the first speaks to the user.
    """
    quiet()
    if not distributed.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:
        code, message = _ending(error)
        if distributed.has_last_word():
            print(f"lethe: {message}", file=sys.stderr)
        return code
    return 0


def _run(words: list[str]) -> None:
    if words[:1] == ["--version"]:
        print(importlib.metadata.version("lethe-lm"))
        return
    name, rest = command_of(words, COMMANDS)
    if name is None:
        _show_commands(rest)
        return
    as_json = "--json" in rest
    rest = [word for word in rest if word != "--json"]
    rest, trusts = consent(rest) if COMMANDS[name].runs_tasks else (rest, False)
    if name == "tamper" and is_suite(rest):
        name, rest = "tamper --suite", as_suite(rest, lambda attack: _parsed("tamper", attack))
    with trust_task_code(trusts):
        COMMANDS[name].run(_parsed(name, rest), as_json)


def _parsed(name: str, words: list[str]) -> Any:
    this = COMMANDS[name]
    trust = f".    {TRUST} true lets task folders run their Python code: read that code first." if this.runs_tasks else ""
    return parse(name, this.config, words, this.example + trust, this.positional, this.about)


def _ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the line that an error ends a command with. An error that nobody foresaw is raised again."""
    if isinstance(error, LetheError):
        return 2, str(error)
    if isinstance(error, _NotComplete):
        return 1, printable(error, LONGEST)
    if isinstance(error, Terminated):
        return 143, printable(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, PermissionError):
        return 2, f"'{printable(error.filename, 300)}': no permission; ask its owner"
    if full_disk(error):
        return 2, f"a disk is full ({printable(error)}); make room and run the command again"
    raise error


def _show_commands(names: Collection[str]) -> None:
    print("usage: lethe COMMAND [settings]     (lethe COMMAND --help shows a command's settings)\n")
    for name in names:
        print(f"  {name:<14} {COMMANDS[name].about.splitlines()[0]}")
    print("\nexample: lethe demo --out demo")


def _print(value: Any) -> None:
    """A table for a terminal; plain columns elsewhere, and where rich would take long."""
    from rich.console import Console

    if isinstance(value, str):
        print(value)
    elif not sys.stdout.isatty() or len(value.rows) > MANY_ROWS:
        print(value.text())
    else:
        Console(highlight=False).print(value)


def _dump(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _answer(run: Any, as_json: bool, *tables: Any, good: Collection[str] = ("complete",)) -> None:
    """Print a run's record, or tables and its folder; a status that is not good is a failure (none named: all are good)."""
    if as_json:
        _dump(run.record | {"path": str(run.path)})
    else:
        for table in tables:
            _print(table)
        print(f"{run.status}: {printable(run.path)}")
    if good and run.status not in good:
        raise _NotComplete(f"the run is {run.status}: {run.record['reason']}")


def _answer_paths(made: dict[str, Path], as_json: bool) -> None:
    _dump({name: str(path) for name, path in made.items()}) if as_json else print(f"page: {printable(made['page'])}")


def _answer_all(run: Any, as_json: bool) -> None:
    """As `_answer`, with the tables that a report has for this run."""
    from lethe.report.tables import terminal

    _answer(run, as_json, *terminal([run]))


def _answer_sweep(run: Any, as_json: bool, good: Collection[str] = ("complete", "running")) -> None:
    from lethe.report.sweeps import sweep_table

    _answer(run, as_json, sweep_table(run), good=good)


@command("demo", "lethe demo --out demo")
def _demo(settings: c.DemoConfig, as_json: bool) -> None:
    from lethe.demo import demo

    made = demo(settings)
    if not as_json:
        print(made["tables"].read_text())
    _answer_paths(made, as_json)


@command("lab build", "lethe lab build")
def _lab_build(settings: c.LabConfig, as_json: bool) -> None:
    """Build the lab, a tiny family of pretrained models, once per machine (LETHE_LAB=nano: a smaller one)."""
    from lethe.evaluation.lab import build_lab

    build_lab()
    _lab_show(settings, as_json)


@command("lab show", "lethe lab show --json")
def _lab_show(settings: c.LabConfig, as_json: bool) -> None:
    """Show where the lab is, its checkpoints, and the accuracy of its models."""
    from lethe.models import refs
    from lethe.report.tables import lab_table

    run = Run.open(refs.lab_folder())
    _answer(run, as_json, lab_table(run))


@command("checkpoints", "lethe checkpoints lab:final", "model", runs_tasks=True)
def _checkpoints(settings: c.CheckpointsConfig, as_json: bool) -> None:
    from lethe.evaluation.checkpoint_sweep import checkpoints
    from lethe.report.charts import draw_checkpoints

    run = checkpoints(settings)
    draw_checkpoints(run)
    _answer_all(run, as_json)


@command("affine fit", "lethe affine fit --model lab:final --source lab:global_step900")
def _affine_fit(settings: c.AffineConfig, as_json: bool) -> None:
    from lethe.maps.pipeline import fit_affine

    _answer_all(fit_affine(settings), as_json)


@command("affine score", "lethe affine score run:ID --model lab:final --source lab:global_step900", "affine")
def _affine_score(settings: c.AffineScoreConfig, as_json: bool) -> None:
    from lethe.maps.pipeline import score_affine
    from lethe.report.tables import affine_table

    scored = score_affine(settings)
    if as_json:
        facts = {"convention": scored.convention, "recorded": scored.recorded, "scores": scored.scores}
        _dump(facts | {"conventions": scored.by_convention})
        return
    for convention, scores in scored.by_convention.items():
        better = "; the better" if len(scored.by_convention) > 1 and convention == scored.convention else ""
        _print(affine_table(scores, f"Affine maps ({convention}{better})"))


@command("check", "lethe check --config lab", runs_tasks=True)
def _check(settings: Check, as_json: bool) -> None:
    """Show the plan of a `lethe unlearn` run, or why it cannot work. No model is trained and no run is created.

    With `memory` or `devices`, the weights are not read: Lethe computes the memory that the run takes on each device from the
    model's config.json, and prints the largest batch that fits. If the run does not fit, it tries several changes.
    """
    from lethe.report.tables import memory_tables, plan_table

    if settings.plans:
        from lethe.unlearning.fit import fit

        found = fit(settings)
    else:
        from lethe.unlearning.pipeline import inspect

        found = inspect(settings)  # type: ignore[arg-type]  # it is a method too
    if as_json:
        _dump(found)
        return
    for table in memory_tables(found) if settings.plans else [plan_table(found)]:
        _print(table)


@command("unlearn", "lethe unlearn --config lab --lr 2e-3 --lora.r 8", runs_tasks=True)
def _unlearn(settings: Method, as_json: bool) -> None:
    from lethe.unlearning.pipeline import unlearn

    _answer_all(unlearn(settings), as_json)


@command("evaluate", "lethe evaluate lab:final --tasks lab_forget_robust lab_retain", "model", runs_tasks=True)
def _evaluate(settings: c.EvaluateConfig, as_json: bool) -> None:
    from lethe.evaluation.pipeline import evaluate
    from lethe.report.tables import evals_table

    run = evaluate(settings)
    _answer(run, as_json, evals_table(run.record["evals"], missing=run.record.get("evals_missing")))


@command("compare", "lethe compare lab:final lab:filtered --tasks lab_forget_robust", "models", runs_tasks=True)
def _compare(settings: c.CompareConfig, as_json: bool) -> None:
    from lethe.evaluation.comparison import compare
    from lethe.report.tables import compare_table

    compared = compare(settings)
    _dump(compared) if as_json else _print(compare_table(compared))


@command("tamper", "lethe tamper run:ID --max_steps 100", "model", runs_tasks=True)
def _tamper(settings: c.TamperConfig, as_json: bool) -> None:
    from lethe.attacks.tampering import tamper

    _answer_all(tamper(settings), as_json)


@command("resume", "lethe resume 1a2b3c4d", "run", runs_tasks=True)
def _resume(settings: c.ResumeConfig, as_json: bool) -> None:
    from lethe.sweeps.resuming import resume

    _answer_all(resume(settings), as_json)


@command("tamper --suite", "lethe tamper run:ID lab:filtered --suite standard --jobs 2", "models", runs_tasks=True)
def _suite(settings: c.SuiteConfig, as_json: bool) -> None:
    from lethe.report.attacks import worst_table
    from lethe.sweeps.controller import Sweep, sweep

    run = sweep(settings)
    if not as_json:
        found = Sweep.open(str(run.path), settings.out)
        planner: Any = found.planner
        if (table := worst_table(planner.study(found))).rows:
            _print(table)
    _answer_sweep(run, as_json)


@command("sweep", "lethe sweep --config sweeps/lab-boundary --jobs 2", runs_tasks=True)
def _sweep(settings: c.SweepConfig, as_json: bool) -> None:
    from lethe.sweeps.controller import sweep

    _answer_sweep(sweep(settings), as_json)


@command("sweep status", "lethe sweep status 1a2b3c4d", "sweep")
def _sweep_status(settings: c.SweepStatusConfig, as_json: bool) -> None:
    from lethe.sweeps.controller import status

    _answer_sweep(status(settings), as_json, good=())


@command("sweep retry", "lethe sweep retry 1a2b3c4d", "sweep", runs_tasks=True)
def _sweep_retry(settings: c.SweepRetryConfig, as_json: bool) -> None:
    from lethe.sweeps.controller import retry

    _answer_sweep(retry(settings), as_json)


@command("sweep cancel", "lethe sweep cancel 1a2b3c4d", "sweep")
def _sweep_cancel(settings: c.SweepCancelConfig, as_json: bool) -> None:
    from lethe.sweeps.controller import cancel

    _answer_sweep(cancel(settings), as_json, good=())


@command("runs", "lethe runs demo/runs", "folder")
def _runs(settings: c.RunsConfig, as_json: bool) -> None:
    from lethe.report import runs_list

    if as_json and settings.watch:
        raise LetheError("watch: has no effect with --json; leave one of them out")
    if as_json:
        lines = [json.dumps(runs_list.as_data(run, settings.columns), default=str) for run in runs_list.chosen(settings)]
        print("[" + ",\n".join(lines) + "]")  # one run per line: indenting thousands of records takes seconds
    elif settings.watch:
        runs_list.watch(settings, _print)
    else:
        _print(runs_list.as_table(settings))


@command("runs import", "lethe runs import log.md --out runs", "file")
def _runs_import(settings: c.ImportConfig, as_json: bool) -> None:
    from lethe.runs.importing import import_log

    imported = import_log(settings)
    _dump(imported.answer()) if as_json else print("\n".join(map(printable, imported.text().split("\n"))))


@command("recipes", "lethe recipes lab", "recipe")
def _recipes(settings: c.RecipesConfig, as_json: bool) -> None:
    found = [recipes.named(name) for name in ([settings.recipe] if settings.recipe else recipes.names())]
    if as_json:
        _dump([asdict(recipe) for recipe in found])
    elif settings.recipe:
        print(found[0].text, end="")
    else:
        print("\n".join(f"{recipe.name}\n    {recipe.about}\n    {recipe.command}" for recipe in found))


@command("report", "lethe report demo/runs --out report", "runs")
def _report(settings: c.ReportConfig, as_json: bool) -> None:
    from lethe.report.folder import report

    _answer_paths(report(settings), as_json)


if __name__ == "__main__":
    sys.exit(console())
