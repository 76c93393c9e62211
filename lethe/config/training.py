"""Settings of unlearning, of one attack, and of what both are made of: text, adapters, optimizer, evaluation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from lethe.config.checks import above, at_least, check_seed, check_types, fraction
from lethe.errors import LetheError

Dtype = Literal["float32", "bfloat16"]
OptimizerName = Literal["adamw", "adamw_8bit", "muon"]
AttackName = Literal["finetune", "noise", "quantize", "prune", "prompt"]
STRENGTHS: dict[str, list[float]] = {"noise": [0.1, 0.2, 0.4, 0.8], "quantize": [8, 4]}
STRENGTHS |= {"prune": [0.1, 0.3, 0.5, 0.7], "prompt": [1, 2, 4]}
LAYERS = [0, 1, 2, 3, 4]
UNLEARNED, ATTACKED, MAPPED = 2048, 512, 100_000
"""Documents, at most, that unlearning (of each kind), an attack and a fit of maps take where no number is given."""
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
        check_types(self)
        above("weight", self.weight, 0)
        if self.template is not None and self.column != "text":
            raise LetheError(f"column: {self.column} has no effect beside a template; leave one of them out")
        if self.split != "train" and (self.source.startswith("lab:") or self.source.endswith((".jsonl", ".parquet", ".txt"))):
            raise LetheError(f"split: {self.split} has no effect on '{self.source}', which is no hub data set; leave it out")


def refuse_weight(name: str, text: str | TextSource | list[TextSource]) -> None:
    """Refuse a weight where there is nothing to weigh the text against."""
    if isinstance(text, TextSource) and text.weight != 1:
        raise LetheError(f"{name}.weight: {text.weight} has no effect on a text alone; it is for mixtures of retain text")


def as_text_source(text: str | TextSource) -> TextSource:
    """`text` as a `TextSource`; a bare string is its `source`."""
    return TextSource(text) if isinstance(text, str) else text


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
        check_types(self, "lora.")
        at_least("lora.r", self.r, 1)
        above("lora.alpha", self.alpha, 0)
        fraction("lora.dropout", self.dropout)


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
        at_least(f"{prefix}limit", self.limit, 0)
        at_least(f"{prefix}num_fewshot", self.num_fewshot or 0, 0)
        return _spelled_out(tasks, self.suites)


def _spelled_out(tasks: list[str], suites: dict[str, list[str]]) -> list[str]:
    """Task names with commas taken apart and suites replaced by what they stand for, each name once."""
    names = [name.strip() for word in tasks for name in word.split(",") if name.strip()]
    return list(dict.fromkeys(task for name in names for task in suites.get(name, [name])))


@dataclass
class EvalSettings(AskedSettings):
    """What is evaluated during and after a run."""

    tasks: list[str] = field(default_factory=lambda: ["lab_forget_robust", "lab_retain"])
    """lm-eval tasks or groups, folders of task files, or suites."""
    every: int = 0
    """Evaluate every so many steps, too (0: only at the end)."""

    def __post_init__(self) -> None:
        check_types(self, "eval.")
        at_least("eval.every", self.every, 0)
        self.tasks = self._asked(self.tasks, "eval.")


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
        check_types(self)
        above("epochs", self.epochs, 0)
        if self.max_steps < 1 and self.max_steps != -1:
            raise LetheError(f"max_steps: must be at least 1, or -1 for epochs, got {self.max_steps}")
        at_least("max_length", self.max_length, 2)
        at_least("per_device_train_batch_size", self.per_device_train_batch_size, 1)
        at_least("gradient_accumulation_steps", self.gradient_accumulation_steps, 1)
        above("lr", self.lr, 0)
        at_least("warmup_steps", self.warmup_steps, 0)
        at_least("weight_decay", self.weight_decay, 0)
        at_least("max_grad_norm", self.max_grad_norm, 0)
        at_least("save_every", self.save_every, 0)
        at_least("time_limit", self.time_limit, 0)
        if self.divergence_factor != 0 and not self.divergence_factor > 1:
            raise LetheError(f"divergence_factor: must be above 1, or 0, got {self.divergence_factor}")
        check_seed(self.seed)
        if self.max_steps > 0 and self.epochs != 1:
            raise LetheError(f"epochs: {self.epochs} has no effect while max_steps is {self.max_steps}; set max_steps to -1")
        if self.optimizer != "muon" and self.newton_schulz_dtype != "auto":
            raise LetheError(f"newton_schulz_dtype: has no effect with optimizer {self.optimizer}; it is a setting of muon")


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
    num_train_examples: int | None = None
    """Documents of the attack (0: all); null: as many as there are, up to 512. A prompt's are drawn from these."""
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
        check_types(self)
        if self.attack != "finetune":
            self._refuse_training()
        super().__post_init__()
        refuse_weight("forget", self.forget)
        if not self.model:
            raise LetheError("model: name the model to attack, such as run:ID or lab:filtered")
        if self.adapter == "train" and self.lora is not None:
            raise LetheError("lora: has no effect with adapter train, which trains the adapter that is there; leave one out")
        at_least("num_train_examples", self.num_train_examples or 0, 0)
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
        documents = ATTACKED if self.num_train_examples is None else self.num_train_examples
        if self.attack == "prompt" and documents and max(self.strengths) > documents:
            raise LetheError(f"strengths: {max(self.strengths):g} documents are more than num_train_examples, {documents}")


def _default(each: dataclasses.Field[Any]) -> Any:
    return each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
