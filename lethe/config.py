"""Every setting of every command, as typed dataclasses.

A recipe (YAML), the command line and Python all build these same objects, and each command is one function of
one of them: `UnlearnConfig` -> `unlearn()`, `TamperConfig` -> `tamper()` and so on. The string below a field is
its help text. Nothing here imports torch, so that the command line answers at once. Checks that need only the
settings themselves live in `__post_init__`; checks that need the model or the text live in `preflight.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from lethe.errors import LetheError

Dtype = Literal["float32", "bfloat16"]
OptimizerName = Literal["adamw", "adamw_8bit", "muon"]
AttackName = Literal["finetune", "noise", "quantize", "prune", "prompt"]
STRENGTHS: dict[str, list[float]] = {"noise": [0.1, 0.2, 0.4, 0.8], "quantize": [8, 4]}
STRENGTHS |= {"prune": [0.1, 0.3, 0.5, 0.7], "prompt": [1, 2, 4]}
LAYERS = [0, 1, 2, 3, 4]
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
LAB_TASKS = ["lab_forget", "lab_forget_robust", "lab_forget_cloze", "lab_retain", "lab_retain_stem"]


@dataclass
class TextSource:
    """Text to train on: where it is and how a record becomes a document."""

    source: str
    """lab:forget, lab:retain, a .jsonl, .parquet or .txt file (one document a line), or a hub data set (name:configuration)."""
    column: str = "text"
    """The column that holds the document."""
    template: str | None = None
    """Instead of a column: a template over columns, such as "{title}\\n\\n{abstract}\\n\\n{text}"."""
    split: str = "train"
    """The split of a hub data set."""
    weight: float = 1.0
    """Share of the documents, beside the other sources of a mixture."""

    def __post_init__(self) -> None:
        _check_types(self)
        _above("weight", self.weight, 0)
        if self.template is not None and self.column != "text":
            raise LetheError(f"column: {self.column} has no effect beside a template; leave one of them out")
        if self.split != "train" and (self.source.startswith("lab:") or self.source.endswith((".jsonl", ".parquet", ".txt"))):
            raise LetheError(f"split: {self.split} has no effect on '{self.source}', which is no hub data set; leave it out")


@dataclass
class LoraSettings:
    """Low-rank adapters on the linear layers of the blocks up to the last forget layer."""

    r: int = 16
    """Rank of the adapters."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / r."""
    dropout: float = 0.05
    """Dropout on the adapters' input."""
    targets: Literal["all", "attention", "mlp"] = "all"
    """Which linear layers of a block: those of attention, those of the MLP, or all."""

    def __post_init__(self) -> None:
        _check_types(self, "lora.")
        _at_least("lora.r", self.r, 1)
        _above("lora.alpha", self.alpha, 0)
        _fraction("lora.dropout", self.dropout)


@dataclass(kw_only=True)
class AskedSettings:
    """How tasks are asked: what every setting that names tasks has beside them."""

    limit: int = 0
    """Ask only the first so many questions of a task (0: all)."""
    task_data: dict[str, str] = field(default_factory=dict)
    """Local files (.jsonl) in place of tasks' hub data sets, such as wmdp_bio_robust=FILE.jsonl."""
    num_fewshot: int | None = None
    """Examples in each prompt; null: as each task says."""
    suites: dict[str, list[str]] = field(default_factory=dict)
    """Names for lists of tasks, to be used in tasks: {biothreat: [wmdp_bio_robust, wmdp_bio_cloze]}."""

    def _asked(self, tasks: list[str], prefix: str = "") -> list[str]:
        """The tasks that names stand for.

        Raises:
            LetheError: a setting is out of range.
        """
        _at_least(f"{prefix}limit", self.limit, 0)
        _at_least(f"{prefix}num_fewshot", self.num_fewshot or 0, 0)
        return _spelled_out(tasks, self.suites)


@dataclass
class EvalSettings(AskedSettings):
    """What is evaluated during and after a run."""

    tasks: list[str] = field(default_factory=lambda: ["lab_forget_robust", "lab_retain"])
    """lm-eval tasks or groups, folders of task files, or suites."""
    every: int = 0
    """Evaluate every so many steps, too (0: only at the end)."""

    def __post_init__(self) -> None:
        _check_types(self, "eval.")
        _at_least("eval.every", self.every, 0)
        self.tasks = self._asked(self.tasks, "eval.")


@dataclass
class LabConfig:
    """The built-in lab; LETHE_LAB=nano chooses the small one that tests use, LETHE_HOME where it is kept."""

    def __post_init__(self) -> None:
        _check_types(self)


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
        _check_types(self)
        _above("every", self.every, 0)
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
        _check_types(self)


@dataclass
class ResumeConfig:
    """Go on with a run of any kind that was interrupted: unlearning and attacks from their last save, bit for bit."""

    run: str
    """The run: its id, a part of its folder's name that fits no other, or its folder."""
    out: str = "runs"
    """Folder of runs to look in, too."""

    def __post_init__(self) -> None:
        _check_types(self)


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
        _check_types(self)


@dataclass
class CheckpointsConfig(AskedSettings):
    """Evaluate a model's pretraining checkpoints and name the latest that is still ignorant of the topic."""

    model: str
    """The final model, such as lab:final; a folder that holds global_step… folders will do as well."""
    checkpoints: str | None = None
    """Where the checkpoints are, if elsewhere: a folder with global_step… folders, or a hub repository with such branches."""
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
        _check_types(self)
        _at_least("time_limit", self.time_limit, 0)
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
    num_examples: int = 0
    """Documents to use (0: all)."""
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
        _check_types(self)
        _at_least("time_limit", self.time_limit, 0)
        _layers(self.layers)
        _at_least("num_examples", self.num_examples, 0)
        _at_least("max_length", self.max_length, 2)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("alpha", self.alpha, 0)
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
        _check_types(self)
        _at_least("num_examples", self.num_examples, 0)
        _at_least("max_length", self.max_length, 2)
        _at_least("batch_size", self.batch_size, 1)


@dataclass
class TrainingSettings:
    """What unlearning and attacks have in common: length, batches, optimizer, type. Names as in transformers."""

    epochs: float = 1
    """Passes over the documents."""
    max_steps: int = -1
    """Optimizer updates; above 0 it overrides epochs."""
    max_length: int = 64
    """Documents are cut at so many tokens."""
    per_device_train_batch_size: int = 16
    """Documents (of each kind) a forward pass on one device."""
    gradient_accumulation_steps: int = 1
    """Forward passes an optimizer update."""
    lr: float = 1e-3
    """Peak learning rate."""
    optimizer: OptimizerName = "adamw"
    """muon: hidden matrices by Muon, all else by AdamW; adamw_8bit: AdamW with 8-bit state (torchao or bitsandbytes)."""
    newton_schulz_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of Muon's Newton-Schulz products; auto: bfloat16 on a GPU, float32 on a CPU."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after the warm-up."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Weight decay, not on norms and biases."""
    max_grad_norm: float = 1.0
    """Gradients are clipped at this norm (0: not)."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    save_every: int = 100
    """Updates between saves that a killed run goes on from (0: only at the end)."""
    divergence_factor: float = 100.0
    """A run whose loss is above so many times the mean of its first 20 updates has diverged (0: only if it is no number)."""
    on_divergence: Literal["stop", "finish"] = "stop"
    """stop: end there, with the weights of the last save; finish: train on. The run stays `diverged` either way."""
    time_limit: float = 0.0
    """Hours after which the run saves and stops (0: none)."""
    report_to: list[str] = field(default_factory=list)
    """Where else to log, as in transformers: wandb, trackio, mlflow, tensorboard."""
    seed: int = 0
    """Order of the documents, adapters' first weights, dropout."""

    def __post_init__(self) -> None:
        _check_types(self)
        _above("epochs", self.epochs, 0)
        if self.max_steps < 1 and self.max_steps != -1:
            raise LetheError(f"max_steps: must be at least 1, or -1 for epochs, got {self.max_steps}")
        _at_least("max_length", self.max_length, 2)
        _at_least("per_device_train_batch_size", self.per_device_train_batch_size, 1)
        _at_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        _above("lr", self.lr, 0)
        _at_least("warmup_steps", self.warmup_steps, 0)
        _at_least("weight_decay", self.weight_decay, 0)
        _at_least("max_grad_norm", self.max_grad_norm, 0)
        _at_least("save_every", self.save_every, 0)
        _at_least("time_limit", self.time_limit, 0)
        if self.divergence_factor != 0 and not self.divergence_factor > 1:
            raise LetheError(f"divergence_factor: must be above 1, or 0, got {self.divergence_factor}")
        _at_least("seed", self.seed, 0)
        if self.max_steps > 0 and self.epochs != 1:
            raise LetheError(f"epochs: {self.epochs} has no effect while max_steps is {self.max_steps}; set max_steps to -1")
        if self.optimizer != "muon" and self.newton_schulz_dtype != "auto":
            raise LetheError(f"newton_schulz_dtype: has no effect with optimizer {self.optimizer}; it is a setting of muon")


@dataclass
class UnlearnConfig(TrainingSettings):
    """Unlearn by checkpoint transfer: loss = remove_coef(t) · cb_loss + retain_coef(t) · retain loss."""

    model: str = "lab:final"
    """The target: the model to unlearn. It is also the frozen reference of the retain loss."""
    source: str = ""
    """The ignorant checkpoint, such as lab:global_step900; auto: the latest one, found by a sweep over the model's checkpoints
    (auto:WHERE, if they are published elsewhere)."""
    affine: str = "fit"
    """fit: fit maps first, on retain text; none: compare activations as they are; or a folder, run or hub id of maps."""
    affine_convention: Literal["auto", "block_output", "hidden_states"] = "auto"
    """What layer N of maps without a record means: output of block N, or hidden_states[N] (of block N - 1); auto: by score."""
    forget: str | TextSource = "lab:forget"
    """Text to unlearn."""
    retain: str | TextSource | list[TextSource] = "lab:retain"
    """Text whose next-token distributions are to stay; several sources are mixed by their weight."""
    packing: Literal["none", "blocks"] = "none"
    """none: one document an example, cut at max_length; blocks: documents one after the other, in blocks of max_length."""
    rewind: float = 0.0
    """Start from (1 - rewind) model + rewind source, weight by weight."""
    forget_loss: Literal["transfer", "distill", "both"] = "transfer"
    """transfer: cb_loss; distill: KL(source ‖ model) on forget text; both: cb_loss + forget_kl_coef · that KL."""
    forget_kl_coef: float = 1.0
    """Weight of forget_kl_loss beside cb_loss, with forget_loss both."""
    layers: list[int] = field(default_factory=lambda: list(LAYERS))
    """Layers whose activations are moved. Layer L is the residual stream after block L (from 0)."""
    remove_coef: float = 5.0
    """Weight of the forget term."""
    retain_coef: float = 5.0
    """Weight of the retain loss (0: unconstrained)."""
    retain_loss: Literal["kl", "ce", "mse"] = "kl"
    """kl: KL(reference ‖ model); ce: cross-entropy on the text; mse: distance of activations to the reference's."""
    schedule: Literal["ramp", "constant"] = "ramp"
    """ramp: retain_coef rises from 0 over the first epoch while remove_coef falls by a quarter; constant: neither moves."""
    num_train_examples: int = 2048
    """Documents of each kind (0: all)."""
    lora: LoraSettings | None = field(default_factory=LoraSettings)
    """Adapters, kept apart from the model; null: full-rank."""
    merge: bool = False
    """Merge the adapters into the model at the end and save the model."""
    dtype: Dtype = "float32"
    """Type of the model's weights."""
    teacher_dtype: Dtype | None = None
    """Type of the teachers' weights; null: the model's. A coarser one measures rounding, and is refused unless named here."""
    teacher_cache: Literal["auto", "live", "cached"] = "auto"
    """Teachers' states computed at every step, or once and kept on disk; auto: cached where documents are seen again."""
    eval: EvalSettings = field(default_factory=EvalSettings)
    """Evaluation during and after the run."""
    out: str = "runs"
    """Folder of runs."""
    name: str = "unlearn"
    """Name of the run."""

    def __post_init__(self) -> None:
        _check_types(self)
        super().__post_init__()
        if not self.source:
            raise LetheError("source: name the ignorant checkpoint, or auto; `lethe checkpoints MODEL` finds it")
        _layers(self.layers)
        if self.retain == []:
            raise LetheError("retain: name at least one text")
        if not 0 <= self.rewind <= 1:
            raise LetheError(f"rewind: must lie between 0 (the model) and 1 (the source), got {self.rewind}")
        _at_least("forget_kl_coef", self.forget_kl_coef, 0)
        self._refuse_idle()
        _at_least("remove_coef", self.remove_coef, 0)
        _at_least("retain_coef", self.retain_coef, 0)
        _at_least("num_train_examples", self.num_train_examples, 0)
        if self.remove_coef == 0 and self.retain_coef == 0:
            raise LetheError("remove_coef and retain_coef are both 0, so nothing would be trained; raise one of them")

    def _refuse_idle(self) -> None:
        """Refuse settings that nothing would read."""
        given = self.affine not in {"fit", "none"}
        for name in ("forget", "retain"):
            text = getattr(self, name)
            if isinstance(text, TextSource) and text.weight != 1:
                raise LetheError(
                    f"{name}.weight: {text.weight} has no effect on a text alone; it is for mixtures of retain text"
                )
        nobody = self.remove_coef == 0 and self.retain_loss == "ce"
        idle = {
            "teacher_cache": nobody and self.teacher_cache != "auto" and "on a recipe whose terms ask no teacher",
            "forget_kl_coef": self.forget_loss != "both"
            and self.forget_kl_coef != 1
            and f"with forget_loss {self.forget_loss}",
            "affine": self.forget_loss == "distill" and given and "with forget_loss distill, which compares distributions",
            "affine_convention": not given and self.affine_convention != "auto" and f"with affine {self.affine}",
            "layers": not self.reads_layers and self.layers != LAYERS and "on a full-rank run that compares distributions",
            "merge": self.merge and self.lora is None and "in full-rank training (lora: null), where there is no adapter",
            "retain_loss": self.retain_coef == 0 and self.retain_loss != "kl" and "while retain_coef is 0",
            "forget_loss": self.remove_coef == 0 and self.forget_loss != "transfer" and "while remove_coef is 0",
        }
        for name, why in idle.items():
            if why:
                raise LetheError(f"{name}: {getattr(self, name)} has no effect {why}; leave it out")
        if self.forget_loss == "both" and self.forget_kl_coef == 0:
            raise LetheError("forget_kl_coef: 0 leaves forget_loss both without its KL term; use forget_loss transfer")

    @property
    def finds_source(self) -> bool:
        """Whether the source is yet to be found, by a sweep over the model's checkpoints."""
        return self.source == "auto" or self.source.startswith("auto:")

    @property
    def reads_layers(self) -> bool:
        """Whether `layers` means anything: to a term that compares activations, or to where adapters sit."""
        return self.forget_loss != "distill" or self.retain_loss == "mse" or self.lora is not None


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
        _check_types(self)
        _at_least("time_limit", self.time_limit, 0)
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
        _check_types(self)
        self.tasks = self._asked(self.tasks)
        if len(self.models) != 2:
            raise LetheError(f"models: two are compared, got {len(self.models)}; give two references or runs")


@dataclass
class TamperConfig(TrainingSettings):
    """Attack a model: fine-tune it on forget text, or disturb or prompt it, and watch what comes back."""

    model: str = ""
    """The model under attack: any reference, such as run:ID, lab:filtered or random:lab:final."""
    attack: AttackName = "finetune"
    """finetune on forget text; without training: noise, quantize or prune its matrices, or prompt with forget text."""
    strengths: list[float] = field(default_factory=list)
    """noise: shares of a matrix's spread; quantize: bits, 8 or 4; prune: shares of weights; prompt: documents. []: usual."""
    forget: str | TextSource = "lab:forget"
    """The attacker's text. Documents are taken from the end that unlearning does not use."""
    num_train_examples: int = 512
    """Documents of the attack (0: all); a prompt's are drawn from these."""
    overlap: Literal["refuse", "allow"] = "refuse"
    """Whether the attack may use documents that the model was unlearned with; the run records how many it did."""
    lora: LoraSettings | None = None
    """Attack by adapters on the linear layers of all blocks; null: full-rank."""
    adapter: Literal["merge", "train"] = "merge"
    """A model that is an adapter on another: merge: merged first; train: the attack trains the adapter's own weights."""
    save_model: bool = False
    """Keep the attacked model (at the last strength), to be evaluated or attacked again."""
    max_steps: int = 60
    """Optimizer updates; -1: by epochs."""
    lr: float = 3e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "constant"
    """How the learning rate goes on after the warm-up."""
    eval: EvalSettings = field(default_factory=lambda: EvalSettings(every=10))
    """Evaluation at step 0, every so many steps and at the end; without training, at each strength."""
    out: str = "runs"
    """Folder of runs."""
    name: str = "attack"
    """Name of the run."""

    def __post_init__(self) -> None:
        _check_types(self)
        if self.attack != "finetune":
            self._refuse_training()
        super().__post_init__()
        if not self.model:
            raise LetheError("model: name the model to attack, such as run:ID or lab:filtered")
        if self.adapter == "train" and self.lora is not None:
            raise LetheError("lora: has no effect with adapter train, which trains the adapter that is there; leave one out")
        _at_least("num_train_examples", self.num_train_examples, 0)
        if self.attack == "finetune":
            if self.strengths:
                raise LetheError(f"strengths: {self.strengths} has no effect with attack finetune; leave it out")
            return
        self.strengths = self.strengths or [float(strength) for strength in STRENGTHS[self.attack]]
        self._refuse_strengths()

    @property
    def reads_text(self) -> bool:
        """Whether the attacker uses text at all."""
        return self.attack in {"finetune", "prompt"}

    @property
    def draws(self) -> bool:
        """Whether anything in the attack is random, so that another seed is another attack."""
        return self.attack not in {"quantize", "prune"}

    def _refuse_training(self) -> None:
        """Refuse settings that an attack without training would not read."""
        read = {"model", "attack", "strengths", "eval", "out", "name", "time_limit"}
        read |= {"forget", "num_train_examples", "overlap", "max_length"} if self.reads_text else {"save_model"}
        read |= {"seed"} if self.draws else set()
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name not in read and value != _default(each):
                raise LetheError(f"{each.name}: {value} has no effect with attack {self.attack}; leave it out")
        if self.eval.every not in {0, 10}:
            raise LetheError(f"eval.every: {self.eval.every} has no effect with attack {self.attack}; leave it out")

    def _refuse_strengths(self) -> None:
        bounds = {
            "noise": ("above 0", lambda s: s > 0),
            "quantize": ("8 or 4 (bits)", lambda s: s in {8, 4}),
            "prune": ("above 0 and below 1", lambda s: 0 < s < 1),
            "prompt": ("whole numbers of documents, at least 1", lambda s: s >= 1 and s == int(s)),
        }
        expected, fits = bounds[self.attack]
        wrong = [strength for strength in self.strengths if not fits(strength)]
        if wrong:
            raise LetheError(f"strengths: with attack {self.attack} they are {expected}, got {wrong[0]:g}")
        rising = sorted(set(self.strengths), reverse=self.attack == "quantize")
        if self.strengths != rising:
            wanted = ", ".join(f"{strength:g}" for strength in rising)
            raise LetheError(f"strengths: name each once, the weakest first: [{wanted}]")
        documents = self.num_train_examples
        if self.attack == "prompt" and documents and max(self.strengths) > documents:
            raise LetheError(f"strengths: {max(self.strengths):g} documents are more than num_train_examples, {documents}")


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
        _check_types(self, "slurm.")
        minutes(self.time)
        _at_least("slurm.devices", self.devices, 0)
        _at_least("slurm.cpus", 1 if self.cpus is None else self.cpus, 1)
        _at_least("slurm.save_seconds", self.save_seconds, 0)
        _at_least("slurm.max_timeouts", self.max_timeouts, 0)


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
        _check_types(self)
        _at_least("jobs", self.jobs, 1)
        _at_least("retries", self.retries, 0)
        if self.seeds == [] or (isinstance(self.seeds, int) and self.seeds < 1):
            raise LetheError(f"seeds: give a number of at least 1, or a list of seeds, got {self.seeds}")
        if isinstance(self.seeds, list) and (len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0):
            raise LetheError(f"seeds: each must be named once and be at least 0, got {self.seeds}")
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
        _check_types(self)
        super().__post_init__()
        if not self.vary:
            raise LetheError("vary: name at least one setting to vary, such as vary: {retain_coef: [1, 5, 20]}")
        _above("width", self.width, 1)
        _at_least("max_runs", self.max_runs, 0)
        _at_least("hours", self.hours, 0)
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
            _at_least("within", self.within, 0)
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
        _check_types(self)
        super().__post_init__()
        if not self.models:
            raise LetheError("models: name the models to attack, such as run:ID or lab:filtered")
        if len(set(self.models)) < len(self.models):
            raise LetheError(f"models: {self.models} names a model twice; name each once")
        if not self.suite and not self.attacks:
            raise LetheError("suite: name a suite, such as standard, or a file")
        if self.general_bound is not None:
            _fraction("general_bound", self.general_bound)


@dataclass
class SweepStatusConfig:
    """Show how a sweep stands: every run with its job, status and results."""

    sweep: str
    """The sweep: its id, a unique part of its folder's name, or its folder."""
    out: str = "runs"
    """Folder that it is looked for in."""

    def __post_init__(self) -> None:
        _check_types(self)


@dataclass
class SweepRetryConfig(SweepStatusConfig):
    """Take up a sweep's failed and cancelled runs again, from their last saves, and go on with it."""


@dataclass
class SweepCancelConfig(SweepStatusConfig):
    """Cancel a sweep: its waiting runs, its running ones and their jobs."""


@dataclass
class DemoConfig:
    """Run the whole job on the built-in lab and write a report."""

    out: str = "demo"
    """Folder for runs/ and report/. A demo that was interrupted goes on where it was."""
    seed: int = 0
    """Seed of the unlearning runs and of the attacks."""

    def __post_init__(self) -> None:
        _check_types(self)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain data, in the form of a recipe."""
    return dataclasses.asdict(config)


def as_text_source(text: str | TextSource) -> TextSource:
    """`text` as a `TextSource`; a bare string is its `source`."""
    return TextSource(text) if isinstance(text, str) else text


def _spelled_out(tasks: list[str], suites: dict[str, list[str]]) -> list[str]:
    """Task names with commas taken apart and suites replaced by what they stand for, each name once."""
    names = [name.strip() for word in tasks for name in word.split(",") if name.strip()]
    return list(dict.fromkeys(task for name in names for task in suites.get(name, [name])))


def minutes(time: str | int) -> int:
    """Slurm's forms of a time in whole minutes, rounded up: 90, "90", "90:00", "1:30:00", "1-12", "1-12:00", "1-12:00:00".

    Raises:
        LetheError: it is none of them, or no time at all.
    """
    if isinstance(time, int) and time > 1440:  # YAML reads 12:00:00 without quotes as the number 43200
        raise LetheError(f'time: {time} minutes are more than a day; write it in quotes, such as "12:00:00" or "2-00:00:00"')
    parts = _TIME.fullmatch(str(time).strip())
    if parts:
        days, first, second, third = (int(part) if part else 0 for part in parts.groups())
        with_hours = parts[1] or parts[4]
        seconds = 86400 * days + 3600 * first + 60 * second + third if with_hours else 60 * first + second
        if seconds:
            return -(-seconds // 60)
    raise LetheError(f'slurm.time: expected minutes, or one of Slurm\'s forms such as "12:00:00" or "2-00:00:00", got {time!r}')


def _layers(layers: list[int]) -> None:
    if not layers:
        raise LetheError("layers: name at least one layer, such as [0, 1, 2]")
    if min(layers) < 0:
        raise LetheError(f"layers: {min(layers)} is negative; layer L is the residual stream after block L, from 0")
    if len(set(layers)) < len(layers):
        raise LetheError(f"layers: {layers} names a layer twice; name each once")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise LetheError(f"{name}: must be at least {least}, got {value}")


def _above(name: str, value: float, bound: float) -> None:
    if not value > bound:
        raise LetheError(f"{name}: must be above {bound}, got {value}")


def _fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise LetheError(f"{name}: must be at least 0 and below 1, got {value}")


def _default(each: dataclasses.Field[Any]) -> Any:
    return each.default if each.default_factory is dataclasses.MISSING else each.default_factory()


def _check_types(config: Any, prefix: str = "") -> None:
    """Refuse a field whose value is not of its declared type: Python, recipes and the command line promise the same."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _fits(value, kind):
            raise LetheError(f"{prefix}{name}: expected {spoken(kind)}, got {value!r}")


def options(kind: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if len(options(kind)) > 1:
        return any(_fits(value, option) for option in options(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if typing.get_origin(kind) is dict:
        inner = typing.get_args(kind)[1]
        return isinstance(value, dict) and all(isinstance(key, str) and _fits(item, inner) for key, item in value.items())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type(None) if kind is None else kind)


def spoken(kind: Any) -> str:
    """A type in words."""
    if len(options(kind)) > 1:
        return " or ".join(spoken(option) for option in options(kind))
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is list:
        return f"a list ({spoken(typing.get_args(kind)[0])} each)"
    if typing.get_origin(kind) is dict:
        return f"name: value pairs ({spoken(typing.get_args(kind)[1])} each)"
    if dataclasses.is_dataclass(kind):
        return "settings " + ", ".join(f.name for f in dataclasses.fields(kind))
    names = {Any: "any value", int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
