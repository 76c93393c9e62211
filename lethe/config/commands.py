"""Settings of the commands that do not train: the lab, maps, checkpoints, evaluation, runs, reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lethe.config.checks import at_least, check_layers, check_seed, check_types
from lethe.config.training import LAB_TASKS, LAYERS, AskedSettings, Dtype, TextSource, refuse_weight
from lethe.errors import LetheError


@dataclass
class LabConfig:
    """The built-in lab; LETHE_LAB=nano chooses the small one that tests use, LETHE_HOME where it is kept."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class CheckpointsConfig(AskedSettings):
    """Evaluate a model's pretraining checkpoints and name the latest that is still ignorant of the topic."""

    model: str
    """The final model, such as lab:final; a folder that holds global_step…, step… or checkpoint-… folders will do as well."""
    checkpoints: str | None = None
    """Where the checkpoints are, if elsewhere: a folder with such folders, or a hub repository with such branches."""
    tasks: list[str] = field(default_factory=lambda: ["lab_forget_robust", "lab_retain"])
    """lm-eval tasks or groups, folders of task files, or suites; the first task decides about ignorance."""
    search: Literal["bisect", "all"] = "bisect"
    """bisect: halve the history until the answer and its neighbours are measured; all: measure every checkpoint."""
    source: str | None = None
    """The checkpoint that is used as source now, marked in the table: its name or a reference."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    time_limit: float = 0.0
    """Hours after which the run stops as failed (0: none)."""
    out: str = "runs"
    """Folder of runs."""
    name: str = "checkpoints"
    """Name of the run."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least("time_limit", self.time_limit, 0)
        self.tasks = self._asked(self.tasks)


@dataclass
class AffineConfig:
    """Fit one affine map per layer from the source's activations to the model's, by streaming ridge regression."""

    model: str
    """The model whose activations are predicted."""
    source: str
    """The ignorant checkpoint whose activations are mapped."""
    text: str | TextSource = "lab:retain"
    """Text to fit on. Never forget text: that would map the topic back in."""
    layers: list[int] = field(default_factory=lambda: list(LAYERS))
    """Layer L is the residual stream after block L (from 0)."""
    alpha: float = 0.01
    """Ridge penalty, added to the Gram matrix's diagonal (as in scikit-learn's Ridge)."""
    num_examples: int | None = None
    """Documents to use (0: all); null: as many as there are, up to 100,000."""
    held_out: float = 0.1
    """Share of the documents kept out of the fit and used for the scores."""
    max_length: int = 64
    """Documents are cut at so many tokens."""
    batch_size: int = 32
    """Documents a forward pass."""
    dtype: Dtype = "float32"
    """Type of both models' weights."""
    time_limit: float = 0.0
    """Hours after which the run stops as failed (0: none)."""
    out: str = "runs"
    """Folder of runs."""
    name: str = "maps"
    """Name of the run."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least("time_limit", self.time_limit, 0)
        check_layers(self.layers)
        refuse_weight("text", self.text)
        at_least("num_examples", self.num_examples or 0, 0)
        at_least("max_length", self.max_length, 2)
        at_least("batch_size", self.batch_size, 1)
        at_least("alpha", self.alpha, 0)
        if not 0 < self.held_out < 1:
            raise LetheError(f"held_out: must lie between 0 and 1 (both excluded), got {self.held_out}")


@dataclass
class AffineScoreConfig:
    """Score fitted maps on text, beside the score of no map."""

    affine: str
    """A folder or hub id of fitted maps, or an affine run."""
    model: str
    """The model whose activations are predicted."""
    source: str
    """The checkpoint whose activations are mapped."""
    text: str | TextSource = "lab:retain"
    """Text to score on."""
    num_examples: int = 0
    """Documents to use, of those that the maps were not fitted on (0: all)."""
    max_length: int = 64
    """Documents are cut at so many tokens."""
    batch_size: int = 32
    """Documents a forward pass."""
    dtype: Dtype = "float32"
    """Type of both models' weights."""

    def __post_init__(self) -> None:
        check_types(self)
        refuse_weight("text", self.text)
        at_least("num_examples", self.num_examples, 0)
        at_least("max_length", self.max_length, 2)
        at_least("batch_size", self.batch_size, 1)


@dataclass
class EvaluateConfig(AskedSettings):
    """Evaluate a model on lm-eval tasks."""

    model: str
    """Any model reference."""
    tasks: list[str] = field(default_factory=lambda: list(LAB_TASKS))
    """lm-eval tasks or groups, folders of task files, or suites."""
    samples: bool = False
    """Write each question's log-likelihoods to samples.jsonl."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    time_limit: float = 0.0
    """Hours after which the run stops as failed (0: none)."""
    out: str = "runs"
    """Folder of runs."""
    name: str = "eval"
    """Name of the run."""

    def __post_init__(self) -> None:
        check_types(self)
        at_least("time_limit", self.time_limit, 0)
        self.tasks = self._asked(self.tasks)


@dataclass
class CompareConfig(AskedSettings):
    """Compare two models on the same questions: difference, exact McNemar test, and which answers flipped."""

    models: list[str]
    """Two model references, or two evaluate runs (those made with samples are not computed again)."""
    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks or groups, folders of task files, or suites; none: those of the runs, or lab_forget_robust lab_retain."""
    dtype: Dtype = "float32"
    """Type of the weights."""
    out: str = "runs"
    """Folder that runs are looked for in."""

    def __post_init__(self) -> None:
        check_types(self)
        self.tasks = self._asked(self.tasks)
        if len(self.models) != 2:
            raise LetheError(f"models: two are compared, got {len(self.models)}; give two references or runs")


@dataclass
class ResumeConfig:
    """Go on with a run of any kind that was interrupted: unlearning and attacks from their last save, bit for bit."""

    run: str
    """The run: its id, a part of its folder's name that fits no other, or its folder."""
    out: str = "runs"
    """Folder of runs to look in, too."""
    trust_record: bool = False
    """true: run the shell lines and open the database that a sweep's record names, though you have started none with them."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class RunsConfig:
    """List the runs in a folder: status, progress and what came out."""

    folder: str = "runs"
    """A folder of runs, or one that has a folder runs/."""
    where: list[str] = field(default_factory=list)
    """Only runs that meet all of these: status=running kind=unlearn lr=1e-4 name=ret5* "mmlu>=0.42" (also !=, <, >, <=)."""
    sort: str = ""
    """Order by this field (any that can be a column); without it, oldest first."""
    reverse: bool = False
    """The other way round: the largest, or the youngest, first."""
    columns: list[str] = field(default_factory=list)
    """Fields of run.json to show: status, age, eta, lr, config.lora.r, evals.lab_retain.acc, losses.cb_loss, …"""
    watch: bool = False
    """Show the list again and again, until Ctrl-C."""
    every: float = 5.0
    """Seconds between two lists, with watch."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.every <= 86400:
            raise LetheError(f"every: must be above 0 and at most a day (86400 seconds), got {self.every:g}")
        if self.every != 5.0 and not self.watch:
            raise LetheError(f"every: {self.every} has no effect without watch; leave it out")


@dataclass
class ImportConfig:
    """Take the tables of a hand-kept experiment log (markdown) into the ledger, one run a row."""

    file: str
    """The log. Importing it again updates rows that have changed and adds new ones."""
    out: str = "runs"
    """Folder of runs."""
    tasks: dict[str, str] = field(default_factory=dict)
    """Tasks that the log's names stand for, where they are not told by the name: WMDP=wmdp_bio_robust."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class RecipesConfig:
    """List the recipes that come with Lethe, or print one of them."""

    recipe: str = ""
    """The recipe to print, such as lab or tamper/lab; empty: list all."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class ReportConfig:
    """Write tables (markdown), charts (SVG) and one self-contained web page from runs."""

    runs: list[str] = field(default_factory=lambda: ["runs"])
    """Folders of runs, or runs."""
    out: str = "report"
    """Folder to write to."""
    title: str = "Unlearning report"
    """Title of the page."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class DemoConfig:
    """Run the whole job on the built-in lab and write a report."""

    out: str = "demo"
    """Folder for runs/ and report/. A demo that was interrupted goes on where it was."""
    seed: int = 0
    """Seed of the unlearning runs and of the attacks."""

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
