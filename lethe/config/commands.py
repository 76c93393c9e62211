"""Settings of the commands that neither train nor evaluate: the lab, affine maps, runs, recipes, reports, the demo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from lethe.config.checks import Amount, Count, Dtype, Layers, Length, Positive, RunName, Seed, Settings, must_be
from lethe.config.training import LAYERS, Text


@dataclass
class LabConfig(Settings):
    """The built-in lab. LETHE_LAB=nano selects the small lab that the tests use. LETHE_HOME is the folder that holds it."""


@dataclass
class AffineConfig(Settings):
    """Fit one affine map per layer that predicts the model's activations from the source's, by streaming ridge regression."""

    model: str
    """The model whose activations are predicted."""
    source: str
    """The ignorant checkpoint whose activations are mapped."""
    text: Text = "lab:retain"
    """Text to fit on. Never forget text: the maps would carry the topic."""
    layers: Layers = field(default_factory=lambda: list(LAYERS))
    """Layers that get a map. Layer L is the residual stream after block L, from 0."""
    alpha: Amount = 0.01
    """Ridge penalty, added to the Gram matrix's diagonal as in scikit-learn's Ridge. A higher value gives smaller maps."""
    num_examples: Count | None = None
    """Documents to use (0: all); null: all, up to 100,000."""
    held_out: Annotated[float, must_be("between 0 and 1 (both excluded)", lambda share: 0 < share < 1)] = 0.1
    """Share of the documents that is used for the scores instead of the fit."""
    max_length: Length = 64
    """Maximum number of tokens per document; the rest is cut off."""
    batch_size: Positive = 32
    """Documents in one forward pass. More documents need more memory."""
    dtype: Dtype = "float32"
    """Type of both models' weights."""
    time_limit: Amount = 0.0
    """Hours after which the run stops with status failed (0: no limit)."""
    out: str = "runs"
    """Folder of runs."""
    name: RunName = "maps"
    """Name of the run."""


@dataclass
class AffineScoreConfig(Settings):
    """Score fitted affine maps on text, beside the score without a map."""

    affine: str
    """The maps: a folder, a hub repository, or an affine run."""
    model: str
    """The model whose activations are predicted."""
    source: str
    """The checkpoint whose activations are mapped."""
    text: Text = "lab:retain"
    """Text to score on."""
    num_examples: Count = 0
    """How many of the documents that the maps were not fitted on to score on (0: all)."""
    max_length: Length = 64
    """Maximum number of tokens per document; the rest is cut off."""
    batch_size: Positive = 32
    """Documents in one forward pass. More documents need more memory."""
    dtype: Dtype = "float32"
    """Type of both models' weights."""


@dataclass
class ResumeConfig(Settings):
    """Resume an interrupted run of any kind. Training continues from its last save. On a CPU the result is bit-identical, with
    the same number of processes and threads."""

    run: str
    """The run: its id, a part of its folder's name that fits only this run, or its folder."""
    out: str = "runs"
    """Another folder of runs to look in."""
    devices: Positive | None = None
    """Number of processes to start on this machine; null: the run's own setting `devices`, or one if it has none."""
    trust_record: bool = False
    """true: run what the record names even if you have started nothing with it: the file of a run's method, the shell lines of
    a sweep's jobs, its database."""


@dataclass
class RunsConfig(Settings):
    """List the runs in a folder: status, progress and results."""

    folder: str = "runs"
    """A folder of runs, or one that has a folder runs/."""
    where: list[str] = field(default_factory=list)
    """Conditions that a run must meet: status=running kind=unlearn lr=1e-4 name=ret5* "mmlu>=0.42" (also !=, <, >, <=)."""
    sort: str = ""
    """Field to sort by, any that columns can name; empty: the time of creation."""
    reverse: bool = False
    """Reverse the order: the largest or the newest run comes first."""
    columns: list[str] = field(default_factory=list)
    """Fields of run.json to show: status, age, eta, lr, config.lora.r, evals.lab_retain.acc, losses.cb_loss, …"""
    watch: bool = False
    """Show the list again and again, until Ctrl-C."""
    every: Annotated[float, must_be("above 0 and at most a day (86400 seconds)", lambda every: 0 < every <= 86400)] = 5.0
    """Seconds between two lists, with watch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_idle("every", when=not self.watch, why="without watch")


@dataclass
class ImportConfig(Settings):
    """Import the tables of a hand-written experiment log (markdown). Each row becomes a run."""

    file: str
    """The log. A second import updates rows that have changed and adds new ones."""
    out: str = "runs"
    """Folder of runs."""
    tasks: dict[str, str] = field(default_factory=dict)
    """The task that a name in the log stands for, such as WMDP=wmdp_bio_robust."""


@dataclass
class RecipesConfig(Settings):
    """List the recipes that come with Lethe, or print one of them."""

    recipe: str = ""
    """The recipe to print, such as lab or tamper/lab; empty: list all."""


@dataclass
class ReportConfig(Settings):
    """Write tables (markdown), charts (SVG) and one self-contained web page from runs."""

    runs: list[str] = field(default_factory=lambda: ["runs"])
    """Runs, or folders of runs."""
    out: str = "report"
    """Folder to write to."""
    title: str = "Unlearning report"
    """Title of the page."""


@dataclass
class DemoConfig(Settings):
    """Run everything on the built-in lab, and write a report."""

    out: str = "demo"
    """Folder for runs/ and report/. If you start an interrupted demo again, it continues with the interrupted step."""
    seed: Seed = 0
    """Seed of the unlearning runs and of the attacks."""
