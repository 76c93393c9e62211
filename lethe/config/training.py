"""Settings of training: text, adapters, batches and optimizer, and those of unlearning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lethe.config.checks import Dtype, above, at_least, check_layers, check_seed, check_types, fraction
from lethe.config.evaluation import EvalSettings
from lethe.errors import LetheError

OptimizerName = Literal["adamw", "adamw_8bit", "muon"]
LAYERS = [0, 1, 2, 3, 4]
UNLEARNED, MAPPED = 2048, 100_000
"""Documents, at most, that unlearning (of each kind) and a fit of affine maps take where no number is given."""


@dataclass
class TextSource:
    """Text to train on: where it is and how a record becomes a document."""

    source: str
    """lab:forget, lab:retain, a .jsonl, .parquet or .txt file (one document a line), or a hub data set (NAME:CONFIGURATION)."""
    column: str = "text"
    """The column that holds the document."""
    template: str | None = None
    """A template over columns that makes the document, instead of one column, such as "{title}\\n\\n{abstract}\\n\\n{text}"."""
    split: str = "train"
    """The split of a hub data set that is read."""
    weight: float = 1.0
    """How many documents come from this source, relative to the weights of the other sources of a mixture."""

    def __post_init__(self) -> None:
        check_types(self)
        above("weight", self.weight, 0)
        if self.template is not None and self.column != "text":
            raise LetheError(f"column: {self.column} has no effect beside a template; leave one of them out")
        if self.split != "train" and (self.source.startswith("lab:") or self.source.endswith((".jsonl", ".parquet", ".txt"))):
            raise LetheError(f"split: {self.split} has no effect on '{self.source}', which is no hub data set; leave it out")


def refuse_weight(name: str, text: str | TextSource | list[TextSource]) -> None:
    """Refuse a weight of a text that is not part of a mixture."""
    if isinstance(text, TextSource) and text.weight != 1:
        raise LetheError(f"{name}.weight: {text.weight} has no effect on a text alone; it is for mixtures of retain text")


def as_text_source(text: str | TextSource) -> TextSource:
    """`text` as a `TextSource`; a bare string is its `source`."""
    return TextSource(text) if isinstance(text, str) else text


@dataclass
class LoraSettings:
    """Low-rank adapters on the linear layers of the blocks up to the last forget layer."""

    r: int = 16
    """Rank of the adapters. A higher rank can change the model in more directions, and takes more memory."""
    alpha: float = 16.0
    """The adapters' output is scaled by alpha / r."""
    dropout: float = 0.05
    """Share of the adapters' inputs that is set to 0 in training."""
    targets: Literal["all", "attention", "mlp"] = "all"
    """Which linear layers of a block get adapters: those of attention, those of the MLP, or all."""

    def __post_init__(self) -> None:
        check_types(self, "lora.")
        at_least("lora.r", self.r, 1)
        above("lora.alpha", self.alpha, 0)
        fraction("lora.dropout", self.dropout)


@dataclass
class TrainingSettings:
    """What unlearning and attacks have in common: length, batches, optimizer. Names are those of transformers."""

    epochs: float = 1
    """Passes over the documents."""
    max_steps: int = -1
    """Optimizer updates, instead of epochs; -1: as many as epochs has."""
    max_length: int = 64
    """Tokens of a document, at most; what comes after is cut off. More tokens take more time and memory."""
    per_device_train_batch_size: int = 16
    """Documents (of each kind) in one forward pass on one device. More documents need more memory."""
    gradient_accumulation_steps: int = 1
    """Forward passes in one optimizer update. The update has this many times more documents, at the same memory."""
    lr: float = 1e-3
    """Peak learning rate."""
    optimizer: OptimizerName = "adamw"
    """muon: Muon for hidden matrices, AdamW for the rest; adamw_8bit: AdamW with 8-bit state (torchao or bitsandbytes)."""
    newton_schulz_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matmuls in Muon's Newton-Schulz iteration; auto: bfloat16 on a GPU, float32 on a CPU."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Updates in which the learning rate rises from 0 to its peak."""
    weight_decay: float = 0.0
    """Weight decay of all weights but norms and biases. A higher value pulls weights more strongly towards 0."""
    max_grad_norm: float = 1.0
    """Norm at which the gradient is clipped (0: no clipping)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of storing them: less memory, more time."""
    save_every: int = 100
    """Updates between two saves, from which an interrupted run is resumed (0: save at the end only)."""
    divergence_factor: float = 100.0
    """The run has diverged once its loss is this many times the mean of its first 20 updates (0: only if the loss is NaN)."""
    on_divergence: Literal["stop", "finish"] = "stop"
    """stop: a diverged run ends with the weights of its last save; finish: it trains on. It stays `diverged` either way."""
    time_limit: float = 0.0
    """Hours after which the run saves and stops (0: no limit)."""
    report_to: list[str] = field(default_factory=list)
    """Other loggers that get the metrics, by their names in transformers: wandb, trackio, mlflow, tensorboard."""
    seed: int = 0
    """Seed of the order of documents, the first weights of adapters, and dropout."""

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
class UnlearnConfig(TrainingSettings):
    """Unlearn by checkpoint transfer: loss = remove_coef(t) · cb_loss + retain_coef(t) · retain loss."""

    model: str = "lab:final"
    """The target: the model to unlearn. It is also the frozen reference of the retain loss."""
    source: str = ""
    """The ignorant checkpoint, such as lab:global_step900; auto: the latest one, found by a sweep over the model's checkpoints
    (auto:WHERE, if they are published elsewhere)."""
    affine: str = "fit"
    """fit: fit maps first, on retain text; none: compare activations as they are; or a folder, run or hub id of maps."""
    affine_examples: int = MAPPED
    """Documents of the retain text that affine fit uses, at most (0: all)."""
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
    cb_scale: Literal["raw", "relative"] = "raw"
    """raw: cb_loss as it is; relative: each layer's is divided by the variance of its target, so that coefficients carry over
    from one model to another."""
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
    num_train_examples: int | None = None
    """Documents of each kind (0: all); null: as many as there are, up to 2,048."""
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
        check_types(self)
        super().__post_init__()
        if not self.source:
            raise LetheError("source: name the ignorant checkpoint, or auto; `lethe checkpoints MODEL` finds it")
        check_layers(self.layers)
        if self.retain == []:
            raise LetheError("retain: name at least one text")
        if not 0 <= self.rewind <= 1:
            raise LetheError(f"rewind: must lie between 0 (the model) and 1 (the source), got {self.rewind}")
        at_least("forget_kl_coef", self.forget_kl_coef, 0)
        self._refuse_idle()
        at_least("remove_coef", self.remove_coef, 0)
        at_least("retain_coef", self.retain_coef, 0)
        at_least("num_train_examples", self.num_train_examples or 0, 0)
        at_least("affine_examples", self.affine_examples, 0)
        if self.remove_coef == 0 and self.retain_coef == 0:
            raise LetheError("remove_coef and retain_coef are both 0, so nothing would be trained; raise one of them")

    def _refuse_idle(self) -> None:
        """Refuse settings that nothing would read."""
        given = self.affine not in {"fit", "none"}
        for name in ("forget", "retain"):
            refuse_weight(name, getattr(self, name))
        nobody = self.remove_coef == 0 and self.retain_loss == "ce"
        idle = {
            "teacher_cache": nobody and self.teacher_cache != "auto" and "on a recipe whose terms ask no teacher",
            "forget_kl_coef": self.forget_loss != "both"
            and self.forget_kl_coef != 1
            and f"with forget_loss {self.forget_loss}",
            "affine": self.forget_loss == "distill" and given and "with forget_loss distill, which compares distributions",
            "affine_examples": not self.fits_maps and self.affine_examples != MAPPED and "where no maps are fitted",
            "cb_scale": (self.forget_loss == "distill" or self.remove_coef == 0)
            and self.cb_scale != "raw"
            and "on a recipe without cb_loss",
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
    def fits_maps(self) -> bool:
        """Whether maps are fitted before training."""
        return self.affine == "fit" and self.forget_loss != "distill"

    @property
    def reads_layers(self) -> bool:
        """Whether `layers` means anything: to a term that compares activations, or to where adapters sit."""
        return self.forget_loss != "distill" or self.retain_loss == "mse" or self.lora is not None
