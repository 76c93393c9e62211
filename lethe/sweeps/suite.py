"""Suites of attacks: `lethe tamper MODELS --suite NAME`. A model's score is its worst case over all attacks.

A suite is a YAML file (Lethe's own are in `lethe/attacks/suites/`) with some of the settings of `SuiteConfig`:

    general_bound: 0.05             # general accuracy that an attack may lose and still count
    common: {...}                   # settings of every attack
    controls: [lab:filtered, ...]   # models attacked for comparison
    attacks:
      NAME: {...}                   # settings of `lethe tamper`; `after: OTHER` starts from the model that OTHER saved

`spelled_out` writes the suite into the configuration. For a run of layered unlearning, `with_parts` adds attacks with each part
of its forget text. `Suite` makes a plan for every attack on every model and control, and one
a seed for attacks that draw at random. The controller of sweeps runs them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lethe import config as c
from lethe.attacks.tampering import check_tamper
from lethe.config.parse import build, from_recipe
from lethe.errors import LetheError, nearest, printable
from lethe.models import refs
from lethe.results.attacks import attack_tasks
from lethe.results.study import Study
from lethe.runs.run import Run
from lethe.sweeps.planner import MOST_RUNS, Planner, baseline, refuse_devices, section, short
from lethe.sweeps.trials import Plan, Stage, Trial

if TYPE_CHECKING:
    from lethe.sweeps.folder import Sweep

SUITES = Path(__file__).parent.parent / "attacks" / "suites"
PARTS = {"goal", "general_bound", "common", "controls", "attacks"}


def spelled_out(config: c.SuiteConfig) -> c.SuiteConfig:
    """The configuration with the suite's file written into it. Its own settings override the file's.

    Raises:
        LetheError: there is no such suite, its file is not one, or `only` names an attack that it does not have.
    """
    name = config.suite
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.exists():
        known = [file.stem for file in SUITES.glob("*.yaml")]
        raise LetheError(f"suite: there is no suite '{name}'{nearest(name, known)}; or give a file NAME.yaml")
    try:
        suite: c.SuiteConfig = from_recipe(c.SuiteConfig, path, models=config.models, suite=name)
    except LetheError as error:
        where = "" if str(error).startswith("config: ") else f"'{path}': "
        raise LetheError(f"suite: {where}{str(error).removeprefix('config: ')}") from error
    if others := set(suite.changed()) - PARTS - {"models", "suite"}:
        raise LetheError(f"suite: '{path}' sets {min(others)}; a suite has {', '.join(sorted(PARTS))}")
    if not suite.attacks:
        raise LetheError(f"suite: '{path}' names no attacks; it needs attacks: with settings of `lethe tamper` by name")
    if unknown := [each for each in config.only if each not in suite.attacks]:
        raise LetheError(f"only: the suite has no attack '{unknown[0]}'{nearest(unknown[0], suite.attacks)}")
    chosen = {each: own for each, own in suite.attacks.items() if not config.only or each in config.only}
    given = {each: getattr(config, each) for each in config.changed()}
    common = _over(suite.common, config.common)
    both = {"attacks": with_parts(chosen, common, config.models, config.out), "only": [], "common": common}
    return dataclasses.replace(suite, **(given | both))


def with_parts(attacks: dict[str, Any], common: dict[str, Any], models: list[str], out: str) -> dict[str, Any]:
    """The attacks and, for each layered run among the models, fine-tuning with each part and with all of its forget text.

    Each fine-tuning attack of the suite is repeated with every part, except those with a text of their own and those that
    follow another attack.
    """
    repeated = {
        name: own or {}
        for name, own in attacks.items()
        if isinstance(own or {}, dict)
        and (common | (own or {})).get("attack", "finetune") == "finetune"
        and not {"forget", "after"} & set(own or {})
    }
    made = dict(attacks)
    for run in filter(None, (refs.run_of(model, out) for model in models)):
        if not run.record["config"].get("layered") or "forget" not in (run.record.get("parents") or {}):
            continue
        count, parts = run.record["parents"]["forget"]["documents"], run.record["config"]["layered"]["parts"]
        text = c.to_dict(c.as_text_source(build(c.TextSource | str, run.record["config"]["forget"]))) | {"first": count}
        pieces = {f"part{i}of{parts}": text | {"part": f"{i}/{parts}"} for i in range(1, parts + 1)} | {"all": text}
        for (name, own), (piece, forget) in itertools.product(repeated.items(), pieces.items()):
            most = count if piece == "all" else count // parts
            given = (common | own).get("num_train_examples")
            few = {"num_train_examples": min(given, most)} if given else {}
            attack = {key: value for key, value in own.items() if key != "save_model"}
            attack |= few | {"forget": forget, "overlap": "allow"}
            known = made.setdefault(f"{name}-{piece}", attack)
            if known != attack:
                made[f"{name}-{piece}-{run.id}"] = attack
    return made


class Suite(Planner):
    """Every attack on every model."""

    def __init__(self, config: c.SuiteConfig):
        self.config: Any = config
        self.title = Path(config.suite).stem if config.suite else next(iter(config.attacks), "attack")
        self.axes = []

    @property
    def models(self) -> list[str]:
        """The models under attack, then the controls."""
        return list(dict.fromkeys([*self.config.models, *(self.config.controls or [])]))

    @property
    def devices(self) -> int:
        return max(attack.devices or 1 for attack in self.attacks.values())

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Of the highest forget accuracy: the attacker maximizes it."""
        return ["maximize"]

    def checked(self) -> Any:
        """The configuration with the suite written into it, after every attack was checked.

        Raises:
            LetheError: an attack could not work, or the results of two attacks could not be compared.
        """
        if not self.config.attacks:
            self.config = spelled_out(self.config)
        elif self.config.suite or self.config.only:
            raise LetheError("suite, only: have no effect beside attacks; leave them out, or attacks")
        if (count := len(self.models) * len(self.attacks) * len(self.config.seed_list)) > MOST_RUNS:
            raise LetheError(f"attacks: {count} runs, at most {MOST_RUNS} are allowed; give fewer seeds, models or attacks")
        first = next(iter(self.attacks))
        for name, attack in self.attacks.items():
            for key in ("limit", "task_data", "num_fewshot"):
                one, other = (getattr(each.eval, key) for each in (self.attacks[first], attack))
                if one != other:
                    raise LetheError(
                        f"eval.{key}: {first} has {one}, {name} has {other}, and their results could not be compared; "
                        f"set it for all, in common"
                    )
        known: dict[str, str] = {}
        for name, attack in self.attacks.items():
            settings = c.to_dict(dataclasses.replace(attack, name="attack"))
            after = (self.config.attacks[name] or {}).get("after")
            if (same := known.setdefault(json.dumps([settings, after], sort_keys=True), name)) != name:
                raise LetheError(f"attacks: {name} has the settings of {same}; leave one of them out")
        for plan in self.plans:
            try:
                for _, settings in plan.stages:
                    refuse_devices(self.config, settings["devices"])
                check_tamper(build(c.TamperConfig, plan.stages[0][1]))
            except LetheError as error:
                raise LetheError(f"{plan.name}: {error}") from error
        return self.config

    @cached_property
    def attacks(self) -> dict[str, c.TamperConfig]:
        """The settings of each attack, without its model.

        Raises:
            LetheError: a setting is unknown or has no effect.
        """
        made = {}
        for name, own in self.config.attacks.items():
            if not isinstance(own, dict | None):
                raise LetheError(f"attacks: {name}: expected settings of `lethe tamper`, got {printable(repr(own), 80)}")
            settings = {each: value for each, value in (own or {}).items() if each != "after"}
            made[name] = section("tamper", _over(self.config.common, settings), self.config.out, name)
        return made

    @property
    def chains(self) -> list[list[str]]:
        """The attacks in their order, each with those that start from the model that it saves.

        Raises:
            LetheError: an attack follows one that is not there, saves no model, or follows another one itself.
        """
        given = {name: self.config.attacks[name] or {} for name in self.attacks}
        after = {name: own["after"] for name, own in given.items() if own.get("after") is not None}
        for name, first in after.items():
            if str(first) not in self.attacks:
                raise LetheError(f"{name}: after: there is no attack '{first}'{nearest(str(first), self.attacks)}")
            if first in after or not self.attacks[first].save_model:
                raise LetheError(f"{name}: after: '{first}' must save its model (save_model: true), and follow no other attack")
        firsts = [name for name in self.attacks if name not in after]
        return [[name, *(other for other, first in after.items() if first == name)] for name in firsts]

    @cached_property
    def plans(self) -> list[Plan]:
        """One plan for every attack, model and seed. Attacks that follow another one are later stages of its plan."""
        plans = []
        seeds = self.config.seed_list
        for model, chain in itertools.product(self.models, self.chains):
            draws = any(self.attacks[name].draws for name in chain)
            for seed in seeds if draws else seeds[:1]:
                stages: list[Stage] = []
                for name in chain:
                    own = {"model": "@0" if stages else model} | ({"seed": seed} if self.attacks[name].draws else {})
                    stages.append(("tamper", c.to_dict(self.attacks[name]) | own))
                seeded = f", seed {seed}" if len(seeds) > 1 else ""
                facts = {"model": model, "bound": self.config.general_bound}
                plans.append(Plan(f"{chain[0]} on {model}{seeded}", stages, {}, seed, facts=facts))
        return plans

    def references(self) -> list[Plan]:
        """The original of each unlearned model: an attack could recover its accuracy."""
        evaluation = c.to_dict(next(iter(self.attacks.values())))["eval"]
        found = {}
        for model in self.config.models:
            run = refs.run_of(model, self.config.out)
            if run is not None and run.record["kind"] == "unlearn":
                found[run.record["config"]["model"]] = run.record["config"]["dtype"]
        return [baseline(model, evaluation, dtype, self.config.out) for model, dtype in found.items()]

    def facts_of(self, trial: Trial, settings: dict[str, Any]) -> dict[str, Any]:
        if trial.is_reference:
            return {}
        bound = {} if self.config.general_bound is None else {"general_bound": self.config.general_bound}
        return {"suite": {"name": self.title, "attack": settings["name"]} | bound}

    def values(self, runs: list[Run]) -> list[float]:
        """The highest forget accuracy over the trial's attacks."""
        attacks = Study(runs).attacks
        forget = attack_tasks(attacks)[0]
        known = [point.value for attack in attacks for point in attack.points_of(forget or "")]
        if not known:
            raise LetheError(f"no accuracy on {forget or 'a forget task'} in {runs[0].path.name}")
        return [max(known)]

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
            point, lost = worst.point, 100 * worst.general_lost
            sentences.append(
                f"{model}: worst case {100 * point.value:.1f} % ({100 * point.low:.1f} to {100 * point.high:.1f}), "
                f"from {100 * worst.start.value:.1f} %, {how}{share}{above}; general accuracy lost {lost:.1f} points{lacking}."
            )
        return sentences


def _over(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The second's settings override the first's; those inside `eval` one by one."""
    both = first | second
    if isinstance(first.get("eval"), dict) and isinstance(second.get("eval"), dict):
        both["eval"] = first["eval"] | second["eval"]
    return both
