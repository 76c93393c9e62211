"""Settings of sweeps and suites: what varies, what is looked for, and where the runs execute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lethe.config.checks import above, at_least, check_seed, check_types, fraction, minutes
from lethe.errors import LetheError

MOST_SEEDS = 1000


@dataclass
class SlurmSettings:
    """What a Slurm job asks for."""

    partition: str | None = None
    """The partition (unset: the cluster's default)."""
    account: str | None = None
    """The account that is charged."""
    time: str | int = "12:00:00"
    """Time limit: minutes, or, in quotes, "12:00:00" or "2-00:00:00". A job that runs out of time saves and is requeued."""
    devices: int = 0
    """GPUs of a job."""
    cpus: int | None = None
    """CPU cores of a job."""
    memory: str | None = None
    """Memory of a job, such as 64G."""
    save_seconds: int = 120
    """How long before the time limit a job is asked to save (Slurm may ask up to a minute earlier)."""
    max_timeouts: int = 1000
    """How many times a job may run out of time before it counts as failed."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the work: module load, source activate and the like."""
    extra: dict[str, Any] = field(default_factory=dict)
    """More options of sbatch, by their long names: {qos: long, constraint: a100}; true for one without a value."""

    def __post_init__(self) -> None:
        check_types(self, "slurm.")
        minutes(self.time)
        at_least("slurm.devices", self.devices, 0)
        at_least("slurm.cpus", 1 if self.cpus is None else self.cpus, 1)
        at_least("slurm.save_seconds", self.save_seconds, 0)
        at_least("slurm.max_timeouts", self.max_timeouts, 0)


@dataclass
class LaunchSettings:
    """Where the runs of a sweep or of a suite execute."""

    seeds: int | list[int] = 1
    """Repeat every setting so many times (seeds 0, 1, …), or with these seeds."""
    launcher: Literal["local", "slurm"] = "local"
    """local: processes on this machine; slurm: one Slurm job a run."""
    jobs: int = 1
    """Runs at work at the same time."""
    slurm: SlurmSettings = field(default_factory=SlurmSettings)
    """How a Slurm job is asked for."""
    retries: int = 2
    """Times that a run is taken up again whose process or job was lost; one that failed by itself is not."""
    storage: str | None = None
    """Where Optuna keeps the study; null: a journal file in the sweep's folder; or a database's URL, such as postgresql://…"""
    out: str = "runs"
    """Folder of runs."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least("jobs", self.jobs, 1)
        at_least("retries", self.retries, 0)
        if isinstance(self.seeds, int) and self.seeds > MOST_SEEDS:
            raise LetheError(f"seeds: {self.seeds} are more than {MOST_SEEDS}; give fewer")
        if self.seeds == [] or (isinstance(self.seeds, int) and self.seeds < 1):
            raise LetheError(f"seeds: give a number of at least 1, or a list of seeds, got {self.seeds}")
        if isinstance(self.seeds, list) and (len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0):
            raise LetheError(f"seeds: each must be named once and be at least 0, got {self.seeds}")
        check_seed(max(self.seed_list), "seeds")
        if self.launcher == "local" and self.slurm != SlurmSettings():
            raise LetheError("slurm: has no effect with launcher local; leave it out, or set launcher to slurm")

    @property
    def seed_list(self) -> list[int]:
        """The seeds that every setting is run with."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


@dataclass
class SweepConfig(LaunchSettings):
    """Vary settings of unlearning: every combination, the boundary between neither and both, or the best trade-offs."""

    kind: Literal["grid", "boundary", "pareto"] = "grid"
    """grid: every combination; boundary: bisection along one axis; pareto: forget accuracy down and retain accuracy up."""
    goal: str = ""
    """What the sweep is to find out, in words; stands above its tables."""
    name: str = ""
    """Names of the runs, as a template over fields, such as ret{retain_coef}_rm{remove_coef}; empty: from what is varied."""
    unlearn: dict[str, Any] = field(default_factory=dict)
    """The recipe that is varied: settings of `lethe unlearn`, with recipe: FILE to start from a file."""
    tamper: dict[str, Any] | None = None
    """An attack on every result: settings of `lethe tamper`, with recipe: FILE to start from a file; null: none."""
    vary: dict[str, Any] = field(default_factory=dict)
    """By field: a list; or {low, high, log, steps}; with when: {field: value} only there. A / B varies a ratio through A."""
    find: Literal["boundary", "keeps"] = "boundary"
    """boundary: where neither ends and where both begins; keeps: how far the axis may go until retain lost `within`."""
    within: float | None = None
    """With find keeps: the loss of retain accuracy that is allowed (0.01: one point)."""
    reference: str = "baseline"
    """With find keeps: the retain accuracy that losses count from: baseline, run:ID, or a number."""
    width: float = 1.5
    """A boundary is known well enough when its two sides are within this factor of each other."""
    max_runs: int = 0
    """Runs to spend: boundary (0: 10 a seed) and pareto (there it has to be given, or hours)."""
    hours: float = 0.0
    """Hours to spend, with pareto (0: no limit): no run is begun after that."""
    prune: bool = True
    """With pareto and eval.every: stop a run that finished ones were clearly better than, in both accuracies, at that step."""
    warm_start: list[str] = field(default_factory=list)
    """With pareto: folders whose complete runs of the same recipe count as known."""
    sampler: Literal["gp", "tpe", "random"] = "gp"
    """With pareto: how settings are chosen. gp: Gaussian processes (tpe, where an axis has a condition)."""
    forget_task: str = ""
    """The task that says what was forgotten; empty: the first known one among unlearn.eval.tasks."""
    retain_task: str = ""
    """The task that says what was kept; empty: the first known one among unlearn.eval.tasks."""
    kept_threshold: float = 0.9
    """A task whose share kept may be this has not fallen."""
    chance_threshold: float = 0.1
    """A task whose share kept may be this is at chance."""

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        if not self.vary:
            raise LetheError("vary: name at least one setting to vary, such as vary: {retain_coef: [1, 5, 20]}")
        above("width", self.width, 1)
        at_least("max_runs", self.max_runs, 0)
        at_least("hours", self.hours, 0)
        if not 0 <= self.chance_threshold < self.kept_threshold <= 1:
            raise LetheError(
                f"chance_threshold: must be at least 0 and below kept_threshold, which is at most 1, "
                f"got {self.chance_threshold} and {self.kept_threshold}"
            )
        idle = {
            "find": self.find != "boundary" and self.kind != "boundary" and f"with kind {self.kind}",
            "width": self.width != 1.5 and self.kind != "boundary" and f"with kind {self.kind}",
            "within": self.within is not None and (self.kind, self.find) != ("boundary", "keeps") and "without find keeps",
            "reference": self.reference != "baseline"
            and (self.kind, self.find) != ("boundary", "keeps")
            and "without find keeps",
            "max_runs": self.max_runs != 0
            and self.kind == "grid"
            and "with kind grid, which has as many runs as it has settings",
            "hours": self.hours != 0 and self.kind != "pareto" and f"with kind {self.kind}",
            "warm_start": self.warm_start != [] and self.kind != "pareto" and f"with kind {self.kind}",
            "sampler": self.sampler != "gp" and self.kind != "pareto" and f"with kind {self.kind}",
            "prune": not self.prune and self.kind != "pareto" and f"with kind {self.kind}",
        }
        for name, why in idle.items():
            if why:
                raise LetheError(f"{name}: {getattr(self, name)} has no effect {why}; leave it out")
        if self.find == "keeps" and self.within is None:
            raise LetheError("within: find keeps needs the loss that is allowed, such as within: 0.01 for one point")
        if self.within is not None:
            at_least("within", self.within, 0)
        if self.kind == "pareto" and not self.max_runs and not self.hours:
            raise LetheError("max_runs: a pareto sweep needs a budget; give max_runs or hours")


@dataclass
class SuiteConfig(LaunchSettings):
    """Attack models with a whole suite of attacks, or with one attack and several seeds; the worst case is the score."""

    models: list[str] = field(default_factory=list)
    """The models under attack: any references."""
    suite: str = ""
    """The suite: one that comes with Lethe (standard), or a file NAME.yaml."""
    goal: str = ""
    """What the attacks are to find out, in words."""
    only: list[str] = field(default_factory=list)
    """Only these of the suite's attacks."""
    controls: list[str] | None = None
    """Models that never knew, attacked beside; null: those that the suite names."""
    common: dict[str, Any] = field(default_factory=dict)
    """Settings of every attack over those of the suite, such as forget=FILE.jsonl; an attack's own come first."""
    general_bound: float | None = None
    """General accuracy (a share of 1) that an attack may cost where it counts; null: the suite's, or 0.05."""
    attacks: dict[str, Any] = field(default_factory=dict)
    """Instead of a suite: settings of `lethe tamper` by name of the attack."""

    def __post_init__(self) -> None:
        check_types(self)
        super().__post_init__()
        if not self.models:
            raise LetheError("models: name the models to attack, such as run:ID or lab:filtered")
        for name, models in (("models", self.models), ("controls", self.controls or [])):
            if not all(model.strip() for model in models):
                raise LetheError(f"{name}: an empty one names no model; leave it out")
        if len(set(self.models)) < len(self.models):
            raise LetheError(f"models: {self.models} names a model twice; name each once")
        if not self.suite and not self.attacks:
            raise LetheError("suite: name a suite, such as standard, or a file")
        if self.general_bound is not None:
            fraction("general_bound", self.general_bound)


@dataclass
class SweepStatusConfig:
    """Show how a sweep stands: every run with its job, status and results."""

    sweep: str
    """The sweep: its id, a unique part of its folder's name, or its folder."""
    out: str = "runs"
    """Folder that it is looked for in."""
    trust_record: bool = False
    """true: run the shell lines and open the database that its record names, though you have started no sweep with them."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class SweepRetryConfig(SweepStatusConfig):
    """Take up a sweep's failed and cancelled runs again, from their last saves, and go on with it."""


@dataclass
class SweepCancelConfig(SweepStatusConfig):
    """Cancel a sweep: its waiting runs, its running ones and their jobs."""
