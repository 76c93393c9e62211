"""Suites of attacks: `lethe tamper MODELS --suite NAME`. A model's score is its worst case over all attacks.

A suite is a YAML file (Lethe's own are in `lethe/attacks/suites/`):

    general_bound: 0.05             # general accuracy that an attack may lose and still count
    common: {...}                   # settings of every attack
    controls: [lab:filtered, ...]   # models attacked for comparison
    attacks:
      NAME: {...}                   # settings of `lethe tamper`; `after: OTHER` starts from the model that OTHER saved

`spelled_out` writes the suite into the configuration. `Suite` makes a plan for every attack on every model and control, and one
a seed for attacks that draw at random. The controller of sweeps runs them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lethe import config as c
from lethe import files
from lethe.attacks.check import check_tamper
from lethe.config.checks import refuse_unusable
from lethe.config.parse import build, from_settings
from lethe.errors import LetheError, nearest, printable
from lethe.models import refs
from lethe.results.attacks import attack_tasks
from lethe.results.study import Study
from lethe.runs.run import Run
from lethe.sweeps.planner import MOST_RUNS, Planner, baseline, short
from lethe.sweeps.trials import Plan, Stage, Trial

if TYPE_CHECKING:
    from lethe.sweeps.folder import Sweep

SUITES = Path(__file__).parent.parent / "attacks" / "suites"
INSTEAD = {
    "model": "name the models: models",
    "seed": "name the seeds: seeds",
    "out": "set out of the suite",
    "name": "an attack is named by its key",
}
"""Settings of `lethe tamper` that the suite sets itself, and what to set instead."""
PARTS = {"goal", "general_bound", "common", "controls", "attacks"}


def read(name: str) -> dict[str, Any]:
    """One of Lethe's own suites by its name, or a suite from a file.

    Raises:
        LetheError: there is none, or it is no suite.
    """
    path = SUITES / f"{name}.yaml" if not name.endswith((".yaml", ".yml")) else Path(name)
    if not path.exists():
        known = [file.stem for file in SUITES.glob("*.yaml")]
        raise LetheError(f"suite: there is no suite '{name}'{nearest(name, known)}; or give a file NAME.yaml")
    try:
        suite = files.yaml_of(files.text_of(path))
        refuse_unusable("", suite)
    except LetheError as error:
        raise LetheError(f"suite: '{path}' cannot be read ({str(error).removeprefix(': ')})") from error
    if not isinstance(suite, dict) or not isinstance(suite.get("attacks"), dict) or not suite["attacks"]:
        raise LetheError(f"suite: '{path}' names no attacks; it needs attacks: with settings of `lethe tamper` by name")
    if unknown := set(suite) - PARTS:
        raise LetheError(f"suite: '{path}' has an unknown part '{min(unknown)}'{nearest(min(unknown), PARTS)}")
    if not isinstance(suite.get("common") or {}, dict):
        raise LetheError(f"suite: '{path}' has no settings in common; write them as name: value")
    return suite


def spelled_out(config: c.SuiteConfig) -> c.SuiteConfig:
    """The configuration with the suite's file written into it. Its own settings override the file's.

    Raises:
        LetheError: as `read`, or `only` names an attack that the suite does not have.
    """
    if config.attacks:
        return dataclasses.replace(config, attacks=_named(config.attacks))
    suite = read(config.suite)
    attacks = _named(suite["attacks"])
    for name in config.only:
        if name not in attacks:
            raise LetheError(f"only: the suite has no attack '{name}'{nearest(name, attacks)}")
    chosen = {name: own for name, own in attacks.items() if not config.only or name in config.only}
    try:
        return dataclasses.replace(
            config,
            attacks=chosen,
            only=[],
            common=_over(suite.get("common") or {}, config.common),
            controls=(suite.get("controls") or []) if config.controls is None else config.controls,
            general_bound=suite.get("general_bound") if config.general_bound is None else config.general_bound,
            goal=config.goal or suite.get("goal") or "",
        )
    except LetheError as error:
        raise LetheError(f"suite: '{config.suite}': {error}") from error


def _named(attacks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The settings of each attack; null stands for none.

    Raises:
        LetheError: an attack is not given as settings.
    """
    for name, own in attacks.items():
        if not isinstance(own, dict | None):
            raise LetheError(f"attacks: {name}: expected settings of `lethe tamper`, got {printable(repr(own), 80)}")
    return {name: own or {} for name, own in attacks.items()}


class Suite(Planner):
    """Every attack on every model."""

    def __init__(self, config: c.SuiteConfig):
        self.config: Any = config
        self.title = Path(config.suite).stem if config.suite else next(iter(config.attacks), "attack")
        self.axes = []
        self._attacks: dict[str, c.TamperConfig] = {}

    @property
    def models(self) -> list[str]:
        """The models under attack, then the controls."""
        return list(dict.fromkeys([*self.config.models, *(self.config.controls or [])]))

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Of the highest forget accuracy: the attacker maximizes it."""
        return ["maximize"]

    @property
    def expected(self) -> int:
        return len(self.plans_of_all())

    def checked(self) -> Any:
        """The configuration with the suite written into it, after every attack was checked.

        Raises:
            LetheError: an attack could not work.
        """
        if self.config.attacks and (self.config.suite or self.config.only):
            raise LetheError("suite, only: have no effect beside attacks; leave them out, or attacks")
        self.config = spelled_out(self.config)
        seeds = [len(self.config.seed_list) if self.attack_named(name).draws else 1 for name in self.config.attacks]
        if (count := len(self.models) * sum(seeds)) > MOST_RUNS:
            raise LetheError(f"attacks: {count} runs, at most {MOST_RUNS} are allowed; give fewer seeds, models or attacks")
        self._refuse_unlike()
        for plan in self.plans_of_all():
            for _, settings in plan.stages:
                if str(settings["model"]).startswith("@"):
                    continue
                try:
                    check_tamper(build(c.TamperConfig, settings))
                except LetheError as error:
                    raise LetheError(f"{settings['name']} on {settings['model']}: {error}") from error
        return self.config

    def _refuse_unlike(self) -> None:
        """Refuse attacks whose results could not be compared, and one that is given twice."""
        first = next(iter(self.config.attacks))
        known: dict[str, str] = {}
        for name, own in self.config.attacks.items():
            settings = c.to_dict(dataclasses.replace(self.attack_named(name), name="attack"))
            for key in ("limit", "task_data", "num_fewshot"):
                values = [self.settings(one, "@0", 0)["eval"][key] for one in (first, name)]
                if values[0] != values[1]:
                    raise LetheError(
                        f"eval.{key}: {first} has {values[0]}, {name} has {values[1]}, and their results could not be "
                        f"compared; set it for all, in common"
                    )
            same = known.setdefault(json.dumps([settings, own.get("after")], sort_keys=True), name)
            if same != name:
                raise LetheError(f"attacks: {name} has the settings of {same}; leave one of them out")

    def attack_named(self, name: str) -> c.TamperConfig:
        """An attack's settings, without its model.

        Raises:
            LetheError: a setting is unknown or has no effect.
        """
        if name not in self._attacks:
            own = {key: value for key, value in self.config.attacks[name].items() if key != "after"}
            given = _over(self.config.common, own)
            if idle := next((key for key in INSTEAD if key in given), None):
                raise LetheError(f"{name}: {idle}: has no effect in a suite; {INSTEAD[idle]}")
            given |= {"model": "@0", "out": self.config.out, "name": name}
            try:
                self._attacks[name] = from_settings(c.TamperConfig, given)
            except LetheError as error:
                raise LetheError(f"{name}: {error}") from error
        return self._attacks[name]

    def settings(self, name: str, model: str, seed: int) -> dict[str, Any]:
        """All settings of an attack on a model."""
        made = dataclasses.replace(self.attack_named(name), model=model)
        return c.to_dict(dataclasses.replace(made, seed=seed) if made.draws else made)

    def plans_of_all(self) -> list[Plan]:
        """One plan for every attack, model and seed. Attacks that follow another one are later stages of its plan."""
        followers = self._followers()
        later = {name for names in followers.values() for name in names}
        chains = [[name, *followers.get(name, [])] for name in self.config.attacks if name not in later]
        plans = []
        for model in self.models:
            for name, *rest in chains:
                draws = any(self.attack_named(one).draws for one in (name, *rest))
                for seed in self.config.seed_list if draws else self.config.seed_list[:1]:
                    stages: list[Stage] = [("tamper", self.settings(name, model, seed))]
                    stages += [("tamper", self.settings(one, "@0", seed)) for one in rest]
                    seeded = f", seed {seed}" if len(self.config.seed_list) > 1 else ""
                    facts = {"model": model, "bound": self.config.general_bound}
                    plans.append(Plan(f"{name} on {model}{seeded}", stages, {}, seed, facts=facts))
        return plans

    def _followers(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, own in self.config.attacks.items():
            first = own.get("after")
            if first is None:
                continue
            if not isinstance(first, str) or first not in self.config.attacks:
                raise LetheError(f"{name}: after: there is no attack '{first}'{nearest(str(first), self.config.attacks)}")
            before = self.config.attacks[first]
            if "after" in before or not before.get("save_model"):
                raise LetheError(f"{name}: after: '{first}' must save its model (save_model: true), and follow no other attack")
            found.setdefault(first, []).append(name)
        return found

    def references(self) -> list[Plan]:
        """The original of each unlearned model: an attack could recover its accuracy."""
        evaluation = self.settings(next(iter(self.config.attacks)), self.models[0], 0)["eval"]
        found = {}
        for model in self.config.models:
            run = refs.run_of(model, self.config.out)
            if run is not None and run.record["kind"] == "unlearn":
                found[run.record["config"]["model"]] = run.record["config"]["dtype"]
        return [baseline(model, evaluation, dtype, self.config.out) for model, dtype in found.items()]

    def begin(self, sweep: Sweep) -> None:
        sweep.add(self.plans_of_all(), sweep.study)

    def facts_of(self, trial: Trial, settings: dict[str, Any]) -> dict[str, Any]:
        if trial.is_reference:
            return {}
        bound = {} if self.config.general_bound is None else {"general_bound": self.config.general_bound}
        return {"suite": {"name": self.title, "attack": settings["name"]} | bound}

    def values(self, runs: list[Run]) -> list[float | str]:
        """The highest forget accuracy over the trial's attacks."""
        attacks = Study(runs).attacks
        forget = attack_tasks(attacks)[0]
        known = [point.value for attack in attacks for point in attack.points_of(forget or "")]
        return [max(known) if known else f"no accuracy on {forget or 'a forget task'} in {runs[0].path.name}"]

    def results(self, sweep: Sweep, trial: Trial, runs: list[Run]) -> dict[str, Any]:
        """A trial's results for tables: those at the end of its last attack."""
        if not runs or trial.status != "complete":
            return {"evals": {}}
        evals = {name: short(result) for name, result in (runs[-1].record.get("evals") or {}).items()}
        return {"evals": evals} | ({} if trial.is_reference else {"after_attack": trial.frozen.values[0]})

    def study(self, sweep: Sweep) -> Study:
        """All runs of the suite, with those that its models come from, as a report reads them."""
        runs = {run.path.name: run for trial in sweep.trials() if not trial.is_retried for run in trial.runs(sweep.out)}
        for model in self.config.models:
            if (run := refs.run_of(model, self.config.out)) is not None:
                runs.setdefault(run.path.name, run)
        return Study(sorted(runs.values(), key=lambda run: (run.record.get("created") or "", run.id)))

    def conclusions(self, sweep: Sweep) -> list[str]:
        sentences = []
        for model, worst in self.study(sweep).worst_cases.items():
            if worst is None:
                sentences.append(f"{model}: nothing is measured.")
                continue
            how = f"by {worst.attack} at {worst.point.place}" if worst.attack else "before any attack"
            above = f", {100 * worst.above.final:+.1f} points above the filtered twin" if worst.above else ""
            share = "" if worst.recovered is None else f", {100 * worst.recovered:.0f} % of the gap"
            lacking = f"; not measured: {', '.join(worst.not_measured)}" if worst.not_measured else ""
            numbers = (worst.point.value, worst.point.low, worst.point.high, worst.start.value)
            value, low, high, start = (100 * number for number in numbers)
            sentences.append(
                f"{model}: worst case {value:.1f} % ({low:.1f} to {high:.1f}), from {start:.1f} %, {how}{share}{above}; "
                f"general accuracy lost {100 * worst.general_lost:.1f} points{lacking}."
            )
        return sentences


def _over(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The second's settings override the first's; those inside `eval` one by one."""
    both = first | second
    if isinstance(first.get("eval"), dict) and isinstance(second.get("eval"), dict):
        both["eval"] = first["eval"] | second["eval"]
    return both
