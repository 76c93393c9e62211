"""Settings of sweeps and of suites of attacks: what is varied, what is looked for, and where the runs execute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lethe.config.checks import Amount, Count, Duration, Fraction, NameTemplate, Positive, Settings, above, must_be
from lethe.errors import LetheError

MOST_SEEDS = 1000
SEEDS = f"a number from 1 to {MOST_SEEDS}, or a list of different seeds from 0 up to 2**32 - 1"


def _are_seeds(seeds: int | list[int]) -> bool:
    if isinstance(seeds, int):
        return 1 <= seeds <= MOST_SEEDS
    return 0 < len(seeds) == len(set(seeds)) and all(0 <= seed < 2**32 for seed in seeds)


@dataclass
class SlurmSettings(Settings):
    """What each Slurm job requests."""

    partition: str | None = None
    """The partition; null: the cluster's default."""
    account: str | None = None
    """The account that is charged; null: your default."""
    time: Duration = "12:00:00"
    """Time limit: minutes, or in quotes "12:00:00" or "2-00:00:00". A job that reaches it saves, is requeued and resumes."""
    nodes: Positive = 1
    """Machines per job."""
    devices: Count = 0
    """Processes of a job on each node, each with a GPU of its own if the partition has GPUs. All processes of a job work on one
    run, so an update has nodes · devices times as many documents. 0: one process on each node, and no GPU is requested."""
    cpus: Positive | None = None
    """CPU cores per process."""
    memory: str | None = None
    """Memory per node, such as 64G."""
    save_seconds: Count = 120
    """Seconds before the time limit at which a job begins to save. Slurm may signal up to a minute earlier."""
    max_timeouts: Count = 1000
    """How often a job may reach its time limit before it counts as failed."""
    setup: list[str] = field(default_factory=list)
    """Shell lines to run first, such as module load cuda."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch by their long names, such as {qos: long}; true for one without a value."""


@dataclass
class LaunchSettings(Settings):
    """How often the runs of a sweep or suite are repeated, and where they execute."""

    seeds: Annotated[int | list[int], must_be(SEEDS, _are_seeds)] = 1
    """The number of seeds (3: seeds 0, 1 and 2), or a list of seeds. Every point is run with each."""
    launcher: Literal["local", "slurm"] = "local"
    """local: worker processes on this machine; slurm: one Slurm job per trial."""
    jobs: Positive = 1
    """How many trials run at the same time."""
    slurm: SlurmSettings = field(default_factory=SlurmSettings)
    """What each Slurm job requests."""
    retries: Count = 2
    """How often to restart a run whose worker or Slurm job disappeared. Runs that end with an error are not restarted."""
    storage: str | None = None
    """The URL of a database for the Optuna study, such as postgresql://…; null: a journal file in the sweep's folder."""
    out: str = "runs"
    """The folder of runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_idle("slurm", when=self.launcher == "local", why="with launcher local")

    @property
    def processes(self) -> int | None:
        """How many processes work on each run; None if its own `devices` says that."""
        return self.slurm.nodes * max(1, self.slurm.devices) if self.launcher == "slurm" else None

    @property
    def seed_list(self) -> list[int]:
        """The seeds that every point is run with."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds


@dataclass
class SweepConfig(LaunchSettings):
    """Run unlearning with varied settings (a grid, a bisection or a search), and report the results."""

    kind: Literal["grid", "boundary", "pareto"] = "grid"
    """grid: every combination; boundary: bisection along one axis; pareto: search for the best trade-offs by Optuna."""
    goal: str = ""
    """The question that the sweep answers, in words. It is printed above the tables."""
    name: NameTemplate = ""
    """A template for the names of runs, such as ret{retain_coef}_rm{remove_coef}; empty: the varied settings."""
    unlearn: dict[str, Any] = field(default_factory=dict)
    """The recipe to vary: settings of `lethe unlearn`. With recipe: FILE they override that recipe."""
    tamper: dict[str, Any] | None = None
    """An attack on every result: settings of `lethe tamper`. With recipe: FILE they override that recipe. null: no attack."""
    vary: dict[str, Any] = field(default_factory=dict)
    """For each setting a list, or {low, high, log, steps}. when: {setting: value} restricts it. A / B varies a ratio."""
    find: Literal["boundary", "retained"] = "boundary"
    """boundary: where one task falls and where both are at chance; retained: the last value that loses at most `within`."""
    within: Amount | None = None
    """With find retained: the loss of retain accuracy that is allowed (0.01: one point)."""
    reference: str = "baseline"
    """With find retained: the retain accuracy that the loss is measured from: baseline, run:ID, or a number."""
    width: Annotated[float, above(1)] = 1.5
    """Bisection ends when the values on both sides of the boundary are within this factor of each other."""
    max_runs: Count = 0
    """Maximum number of runs. boundary: 0 means 10 per seed; pareto: give max_runs or hours."""
    hours: Amount = 0.0
    """With pareto: hours after which no new run starts (0: no limit)."""
    stop_early: bool = True
    """With pareto and eval.every: stop a run if two finished runs had clearly better accuracies at the same step."""
    warm_start: list[str] = field(default_factory=list)
    """With pareto: folders of earlier runs. Optuna starts from their complete runs of the same recipe."""
    sampler: Literal["gp", "tpe", "random"] = "gp"
    """With pareto: how Optuna chooses points. gp: Gaussian processes (tpe if an axis has a condition)."""
    forget_task: str = ""
    """The task that measures forgetting; empty: the first known one among unlearn.eval.tasks."""
    retain_task: str = ""
    """The task that measures what is retained; empty: the first known one among unlearn.eval.tasks."""
    retained_threshold: float = 0.9
    """A task counts as retained if the 95 % interval of its retained share reaches this value."""
    chance_threshold: float = 0.1
    """A task counts as at chance if the 95 % interval of its retained share reaches down to this value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.vary:
            raise LetheError("vary: name at least one setting to vary, such as vary: {retain_coef: [1, 5, 20]}")
        if not 0 <= self.chance_threshold < self.retained_threshold <= 1:
            raise LetheError(
                f"chance_threshold: must be at least 0 and below retained_threshold, which is at most 1, "
                f"got {self.chance_threshold} and {self.retained_threshold}"
            )
        kind = f"with kind {self.kind}"
        self.refuse_idle("find", "width", "within", "reference", when=self.kind != "boundary", why=kind)
        self.refuse_idle("hours", "warm_start", "sampler", "stop_early", when=self.kind != "pareto", why=kind)
        self.refuse_idle("max_runs", when=self.kind == "grid", why=kind)
        self.refuse_idle("within", "reference", when=self.find != "retained", why="without find retained")
        if self.find == "retained" and self.within is None:
            raise LetheError("within: find retained needs the allowed loss, such as within: 0.01 for one point")
        if self.kind == "pareto" and not self.max_runs and not self.hours:
            raise LetheError("max_runs: a pareto sweep needs a budget; give max_runs or hours")


@dataclass
class SuiteConfig(LaunchSettings):
    """Attack models with a suite of attacks, or with one attack and several seeds. The worst case is the score."""

    models: list[str] = field(default_factory=list)
    """The models to attack: any model references."""
    suite: str = ""
    """The suite: one of Lethe's own (standard), or a file NAME.yaml."""
    goal: str = ""
    """The question that the attacks answer, in words."""
    only: list[str] = field(default_factory=list)
    """Run only these of the suite's attacks."""
    controls: list[str] | None = None
    """Models that never knew the topic, attacked for comparison; null: those that the suite names."""
    common: dict[str, Any] = field(default_factory=dict)
    """Settings of every attack, such as forget=FILE.jsonl. They override the suite's; an attack's own override these."""
    general_bound: Fraction | None = None
    """How much general accuracy an attack may cost and still count (0.05: five points); null: the suite's, or 0.05."""
    attacks: dict[str, Any] = field(default_factory=dict)
    """Attacks in place of a suite: for each name, settings of `lethe tamper`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.models:
            raise LetheError("models: name the models to attack, such as run:ID or lab:filtered")
        for name, models in (("models", self.models), ("controls", self.controls or [])):
            if not all(model.strip() for model in models):
                raise LetheError(f"{name}: an empty name is no model; leave it out")
        if len(set(self.models)) < len(self.models):
            raise LetheError(f"models: {self.models} names a model twice; name each once")
        if not self.suite and not self.attacks:
            raise LetheError("suite: name a suite, such as standard, or a file")


@dataclass
class SweepStatusConfig(Settings):
    """Show every run of a sweep with its job, status and results."""

    sweep: str
    """The sweep: its id, a unique part of its folder's name, or its folder."""
    out: str = "runs"
    """The folder to look for it in."""
    trust_record: bool = False
    """true: run the shell lines and files of methods, and open the database, that the sweep's record names, even if you started
    nothing with them."""


@dataclass
class SweepRetryConfig(SweepStatusConfig):
    """Retry a sweep's failed and cancelled runs from their last saves, and resume the sweep."""


@dataclass
class SweepCancelConfig(SweepStatusConfig):
    """Cancel a sweep: its queued runs, its running runs and their jobs."""
