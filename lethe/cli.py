"""The command line: each command builds one config object and calls one function of it.

    lethe unlearn --config recipe.yaml --remove_coef 20 --lora.r 8

Settings come from the defaults, then the recipe (YAML), then the command line. Modules that import torch are imported
inside the commands that need them, so that help and refusals answer at once. A `LetheError` is one line on standard error and
exit code 2; with `--json` standard output holds JSON alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lethe import config as c
from lethe.config.parse import parse
from lethe.errors import LONGEST, LetheError, full_disk, nearest, printable
from lethe.evaluation.tasks.consent import trust_task_code
from lethe.methods.method import Method
from lethe.progress import quiet
from lethe.runs import garbage
from lethe.runs.run import Terminated

MANY_ROWS = 200
SUITE_WORDS = {"--suite", "--seeds", "--launcher", "--jobs"}
TRUST = "--trust_task_code"
TRUST_HELP = f".    {TRUST} true lets task folders run the Python that they name: read it first."
TASK_RUNNERS = {
    c.CheckpointsConfig,
    c.CompareConfig,
    c.EvaluateConfig,
    c.ResumeConfig,
    c.SuiteConfig,
    c.SweepConfig,
    c.SweepRetryConfig,
    c.TamperConfig,
    Method,
}


@dataclass
class Command:
    """A command: its function, its settings, and what its help shows."""

    run: Callable[[Any, bool], None]
    config: type
    example: str
    positional: str | None = None

    @property
    def runs_tasks(self) -> bool:
        """Whether it evaluates on tasks, or has workers that do: then it takes --trust_task_code."""
        return self.config in TASK_RUNNERS


@garbage.seldom()
def console() -> int:
    """The command `lethe`: `main` as a process of its own."""
    return main()


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns 0, 1 (a run failed or diverged), 2 (refused), 130 (interrupted) or 143 (told to stop)."""
    words = list(sys.argv[1:] if argv is None else argv)
    quiet()
    try:
        name, rest = _command(words)
        if name is None:
            _show_commands()
            return 0
        command = COMMANDS[name]
        as_json = "--json" in rest
        rest = [word for word in rest if word != "--json"]
        rest, trusts = _consent(rest) if command.runs_tasks else (rest, False)
        if name == "tamper" and any(word.split("=")[0] in SUITE_WORDS for word in rest):
            name, rest = "tamper --suite", _as_suite(rest)
            command = COMMANDS[name]
        example = command.example + (TRUST_HELP if command.runs_tasks else "")
        settings = parse(name, command.config, rest, example, command.positional)
        if settings is not None:
            with trust_task_code(trusts):
                command.run(settings, as_json)
    except LetheError as error:
        print(f"lethe: {error}", file=sys.stderr)
        return 2
    except Terminated as error:
        print(f"lethe: {printable(error)}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("lethe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except _NotComplete as error:
        print(f"lethe: {printable(error, LONGEST)}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(f"lethe: '{printable(error.filename, 300)}': no permission; ask whoever it belongs to", file=sys.stderr)
        return 2
    except Exception as error:
        if not full_disk(error):
            raise
        print(f"lethe: a disk is full ({printable(error)}); make room and give the command again", file=sys.stderr)
        return 2
    return 0


def _consent(words: list[str]) -> tuple[list[str], bool]:
    """The words without --trust_task_code, and what it says. It is no setting, so that no recipe or record can give it."""
    rest, given = list(words), False
    while any(word.split("=")[0] == TRUST for word in rest):
        at = next(i for i, word in enumerate(rest) if word.split("=")[0] == TRUST)
        _, equals, value = rest.pop(at).partition("=")
        if not equals:
            value = rest.pop(at) if at < len(rest) and not rest[at].startswith("-") else "true"
        if value not in {"true", "false"}:
            raise LetheError(f"trust_task_code: expected true or false, got '{value}'")
        given = value == "true"
    return rest, given


def _as_suite(words: list[str]) -> list[str]:
    """The words of an attack that is launched (with --seeds, --jobs, --launcher) as those of a suite of that one attack."""
    if any(word.split("=")[0] == "--suite" for word in words):
        return ["--help"] if {"-h", "--help"} & set(words) else words
    from lethe.config.parse import fields_of

    launched, own = fields_of(c.LaunchSettings), fields_of(c.TamperConfig)
    kept: list[str] = []
    attack: list[str] = []
    into = attack
    for word in words:
        field = word.removeprefix("--").split("=")[0]
        if word.startswith("--"):
            into = kept if field in launched and field not in own else attack
        into.append(word)
    settings = parse("tamper", c.TamperConfig, attack, COMMANDS["tamper"].example, "model")
    if settings is None:
        raise SystemExit(0)
    made = {key: value for key, value in c.to_dict(settings).items() if key not in {"model", "out", "name"}}
    if settings.seed:
        raise LetheError(f"seed: {settings.seed} has no effect beside seeds; name the seeds: --seeds {settings.seed} …")
    made.pop("seed")
    return [settings.model, *kept, "--attacks", json.dumps({settings.name: made}), "--out", settings.out]


class _NotComplete(Exception):
    """A run ended in another status than complete."""


def _command(words: list[str]) -> tuple[str | None, list[str]]:
    if not words or words[0] in {"-h", "--help", "help"}:
        return None, []
    if words[0] == "--version":
        import importlib.metadata

        print(importlib.metadata.version("lethe-lm"))
        raise SystemExit(0)
    two = " ".join(words[:2])
    if two in COMMANDS and "-" not in two:
        return two, words[2:]
    if words[0] in COMMANDS:
        return words[0], words[1:]
    groups = sorted(name for name in COMMANDS if name.startswith(f"{words[0]} "))
    if groups:
        if len(words) > 1 and words[1] not in {"-h", "--help"}:
            raise LetheError(f"there is no command '{two}'{nearest(two, groups)}")
        _show_commands(groups)
        raise SystemExit(0)
    raise LetheError(f"there is no command '{words[0]}'{nearest(words[0], COMMANDS)}")


def _show_commands(names: list[str] | None = None) -> None:
    print("usage: lethe COMMAND [settings]     (lethe COMMAND --help shows a command's settings)\n")
    for name in names or COMMANDS:
        summary = (COMMANDS[name].config.__doc__ or "").strip().splitlines()[0]
        print(f"  {name:<14} {summary}")
    print("\nexample: lethe demo --out demo")


def _print(value: Any) -> None:
    from rich.console import Console

    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(value)


def _dump(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _answer(run: Any, as_json: bool, *tables: Any) -> None:
    """Print a run's record, or tables and its folder."""
    if as_json:
        _dump(run.record | {"path": str(run.path)})
    else:
        for table in tables:
            _print(table)
        print(f"{run.status}: {printable(run.path)}")
    if run.status != "complete":
        raise _NotComplete(f"the run is {run.status}: {run.record['reason']}")


def _lab_build(settings: c.LabConfig, as_json: bool) -> None:
    from lethe.evaluation.lab import build_lab
    from lethe.progress import bar

    build_lab(bar)
    _lab_show(settings, as_json)


def _lab_show(settings: c.LabConfig, as_json: bool) -> None:
    from lethe.models import refs
    from lethe.report.tables import lab_table
    from lethe.runs.run import Run

    run = Run.open(refs.lab_folder())
    if as_json:
        _dump({"path": str(run.path)} | run.record)
    else:
        _print(lab_table(run))
        print(printable(run.path))


def _checkpoints(settings: c.CheckpointsConfig, as_json: bool) -> None:
    from lethe.evaluation.checkpoint_sweep import checkpoints
    from lethe.report.charts import draw_checkpoints
    from lethe.report.tables import terminal

    run = checkpoints(settings)
    draw_checkpoints(run)
    _answer(run, as_json, *terminal([run]))


def _affine_fit(settings: c.AffineConfig, as_json: bool) -> None:
    from lethe.maps.check import check_affine

    check_affine(settings)
    from lethe.maps.affine import fit_affine
    from lethe.report.tables import affine_table

    run = fit_affine(settings)
    _answer(run, as_json, affine_table(run.record["scores"]))


def _affine_score(settings: c.AffineScoreConfig, as_json: bool) -> None:
    from lethe.maps.check import check_affine_score

    check_affine_score(settings)
    from lethe.maps.affine import score_affine
    from lethe.report.tables import affine_table

    scored = score_affine(settings)
    if as_json:
        facts = {"convention": scored.convention, "recorded": scored.recorded, "scores": scored.scores}
        _dump(facts | {"conventions": scored.by_convention})
        return
    for convention, scores in scored.by_convention.items():
        better = "; the better" if len(scored.by_convention) > 1 and convention == scored.convention else ""
        _print(affine_table(scores, f"Affine maps ({convention}{better})"))


def _check(settings: Method, as_json: bool) -> None:
    from lethe.unlearning.check import check

    check(settings)
    from lethe.report.tables import plan_table
    from lethe.unlearning.pipeline import inspect

    plan = inspect(settings)
    if as_json:
        _dump(plan)
    else:
        _print(plan_table(plan))


def _unlearn(settings: Method, as_json: bool) -> None:
    from lethe.unlearning.check import check

    check(settings)
    from lethe.report.tables import terminal
    from lethe.unlearning.pipeline import unlearn

    run = unlearn(settings)
    _answer(run, as_json, *terminal([run]))


def _evaluate(settings: c.EvaluateConfig, as_json: bool) -> None:
    from lethe.evaluation.check import check_model

    check_model(settings)
    from lethe.evaluation.accuracy import evaluate
    from lethe.report.tables import evals_table

    run = evaluate(settings)
    _answer(run, as_json, evals_table(run.record["evals"], missing=run.record.get("evals_missing")))


def _compare(settings: c.CompareConfig, as_json: bool) -> None:
    from lethe.evaluation.comparison import compare
    from lethe.report.tables import compare_table

    compared = compare(settings)
    if as_json:
        _dump(compared)
    else:
        _print(compare_table(compared))


def _tamper(settings: c.TamperConfig, as_json: bool) -> None:
    from lethe.attacks.check import check_tamper

    check_tamper(settings)
    from lethe.attacks.tampering import tamper
    from lethe.report.tables import terminal

    run = tamper(settings)
    _answer(run, as_json, *terminal([run]))


def _resume(settings: c.ResumeConfig, as_json: bool) -> None:
    from lethe.report.tables import terminal
    from lethe.sweeps.resuming import resume

    run = resume(settings)
    _answer(run, as_json, *terminal([run]))


def _suite(settings: c.SuiteConfig, as_json: bool) -> None:
    from lethe.report.attacks import worst_table
    from lethe.sweeps.controller import Sweep, sweep
    from lethe.sweeps.kinds import planner_of

    run = sweep(settings)
    if not as_json:
        found = Sweep.open(str(run.path), settings.out)
        planner: Any = planner_of(found.config)
        if (table := worst_table(planner.study(found))).rows:
            _print(table)
    _answer_sweep(run, as_json)


def _sweep(settings: c.SweepConfig, as_json: bool) -> None:
    from lethe.sweeps.controller import sweep

    _answer_sweep(sweep(settings), as_json)


def _sweep_status(settings: c.SweepStatusConfig, as_json: bool) -> None:
    from lethe.sweeps.controller import status

    _answer_sweep(status(settings), as_json, done=False)


def _sweep_retry(settings: c.SweepRetryConfig, as_json: bool) -> None:
    from lethe.sweeps.controller import retry

    _answer_sweep(retry(settings), as_json)


def _sweep_cancel(settings: c.SweepCancelConfig, as_json: bool) -> None:
    from lethe.sweeps.controller import cancel

    _answer_sweep(cancel(settings), as_json, done=False)


def _answer_sweep(run: Any, as_json: bool, done: bool = True) -> None:
    """Print a sweep's trials and what they say; `done`: anything but complete is a failure."""
    from lethe.report.sweeps import sweep_table

    if as_json:
        _dump(run.record | {"path": str(run.path)})
    else:
        _print(sweep_table(run))
        print(f"{run.status}: {printable(run.path)}")
    if done and run.status not in {"complete", "running"}:
        raise _NotComplete(f"the sweep is {run.status}: {run.record['reason']}")


def _runs(settings: c.RunsConfig, as_json: bool) -> None:
    from lethe.report.tables import runs_table
    from lethe.results.listing import Entry, entries, ordered, refuse_unknown, select
    from lethe.runs.run import find_runs

    if not Path(settings.folder).is_dir():
        raise LetheError(f"folder: there is no folder '{settings.folder}'")
    if as_json and settings.watch:
        raise LetheError("watch: has no effect on an answer in JSON; leave one of them out")

    def chosen() -> list[Entry]:
        every = entries(find_runs(settings.folder))
        refuse_unknown(settings.columns, every, "columns")
        found = select(every, settings.where)
        if settings.sort:
            refuse_unknown([settings.sort], every, "sort")
            return ordered(found, settings.sort, settings.reverse)
        return found[::-1] if settings.reverse else found

    def shown() -> Any:
        found = chosen()
        such = " such" if settings.where else ""
        return runs_table(found, settings.columns) if found else f"no{such} runs in '{printable(settings.folder)}'"

    if as_json:
        lines = [json.dumps(_listed(entry, settings.columns), default=str) for entry in chosen()]
        print("[" + ",\n".join(lines) + "]")  # a run a line: indenting thousands of records takes seconds
    elif settings.watch:
        _watch(shown, settings.every)
    else:
        _show(shown())


def _listed(entry: Any, columns: list[str]) -> dict[str, Any]:
    if columns:
        return {name: entry.value(name) for name in columns}
    facts = {"status": entry.status, "reason": entry.reason, "path": str(entry.run.path)}
    return entry.run.record | facts | {"age": entry.age, "progress": entry.value("progress"), "eta": entry.eta}


def _show(value: Any) -> None:
    """A table for the screen; in plain columns where nobody looks, and where rich would take long."""
    plain = isinstance(value, str) or not sys.stdout.isatty() or len(value.rows) > MANY_ROWS
    if plain:
        print(value if isinstance(value, str) else value.text())
    else:
        _print(value)


def _watch(shown: Callable[[], Any], every: float) -> None:
    """Show it again every so many seconds, until Ctrl-C: in place on a terminal, one after the other elsewhere."""
    import time

    if not sys.stdout.isatty():
        while True:
            _show(shown())
            sys.stdout.flush()
            time.sleep(every)
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)

    def fitting() -> Any:
        table = shown()
        room = max(1, console.height - 6)  # title, header, rules and the note
        if isinstance(table, str) or len(table.rows) <= room:
            return table
        return replace(table, rows=table.rows[:room], notes=[f"… and {len(table.rows) - room} more"])

    with Live(fitting(), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(fitting(), refresh=True)


def _runs_import(settings: c.ImportConfig, as_json: bool) -> None:
    from lethe.runs.importing import import_log

    imported = import_log(settings)
    if as_json:
        _dump(imported.answer())
    else:
        print("\n".join(map(printable, imported.text().split("\n"))))


def _report(settings: c.ReportConfig, as_json: bool) -> None:
    from lethe.report.folder import report

    made = report(settings)
    if as_json:
        _dump({name: str(path) for name, path in made.items()})
    else:
        print(printable(made["page"]))


def _demo(settings: c.DemoConfig, as_json: bool) -> None:
    from lethe.demo import demo

    made = demo(settings)
    if as_json:
        _dump({name: str(path) for name, path in made.items()})
    else:
        print(made["tables"].read_text())
        print(f"page: {printable(made['page'])}")


COMMANDS = {
    "demo": Command(_demo, c.DemoConfig, "lethe demo --out demo"),
    "lab build": Command(_lab_build, c.LabConfig, "lethe lab build"),
    "lab show": Command(_lab_show, c.LabConfig, "lethe lab show --json"),
    "checkpoints": Command(_checkpoints, c.CheckpointsConfig, "lethe checkpoints lab:final", "model"),
    "affine fit": Command(_affine_fit, c.AffineConfig, "lethe affine fit --model lab:final --source lab:global_step900"),
    "affine score": Command(
        _affine_score, c.AffineScoreConfig, "lethe affine score run:ID --model lab:final --source lab:global_step900", "affine"
    ),
    "check": Command(_check, Method, "lethe check --config recipes/lab.yaml"),
    "unlearn": Command(_unlearn, Method, "lethe unlearn --config recipes/lab.yaml --remove_coef 20 --lora.r 8"),
    "evaluate": Command(_evaluate, c.EvaluateConfig, "lethe evaluate lab:final --tasks lab_forget_robust lab_retain", "model"),
    "compare": Command(_compare, c.CompareConfig, "lethe compare lab:final lab:filtered --tasks lab_forget_robust", "models"),
    "tamper": Command(_tamper, c.TamperConfig, "lethe tamper run:ID --max_steps 100", "model"),
    "tamper --suite": Command(_suite, c.SuiteConfig, "lethe tamper run:ID lab:filtered --suite standard --jobs 2", "models"),
    "sweep": Command(_sweep, c.SweepConfig, "lethe sweep --config recipes/sweeps/lab-boundary.yaml --jobs 2"),
    "sweep status": Command(_sweep_status, c.SweepStatusConfig, "lethe sweep status 1a2b3c4d", "sweep"),
    "sweep retry": Command(_sweep_retry, c.SweepRetryConfig, "lethe sweep retry 1a2b3c4d", "sweep"),
    "sweep cancel": Command(_sweep_cancel, c.SweepCancelConfig, "lethe sweep cancel 1a2b3c4d", "sweep"),
    "resume": Command(_resume, c.ResumeConfig, "lethe resume 1a2b3c4d", "run"),
    "runs": Command(_runs, c.RunsConfig, "lethe runs demo/runs", "folder"),
    "runs import": Command(_runs_import, c.ImportConfig, "lethe runs import log.md --out runs", "file"),
    "report": Command(_report, c.ReportConfig, "lethe report demo/runs --out report", "runs"),
}


if __name__ == "__main__":
    sys.exit(console())
