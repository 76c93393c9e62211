"""Settings that every unlearning method has. Those of one method stand in its own file, `lethe/methods/NAME.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lethe.config.checks import (
    Amount,
    Count,
    Dtype,
    Fraction,
    Layers,
    Memory,
    Positive,
    RunName,
    Settings,
    above,
    at_least,
    must_be,
)
from lethe.config.evaluation import EvalSettings
from lethe.config.training import LoraSettings, Text, Texts, TextSource, TrainingSettings
from lethe.errors import LetheError


@dataclass
class SamSettings(Settings):
    """Sharpness-aware minimisation of the forget loss (Fan et al., https://arxiv.org/abs/2502.05374)."""

    rho: Annotated[float, above(0)] = 0.01
    """How far the weights move up the forget loss before its gradient is taken, as a norm over all trained weights. A higher
    value makes forgetting hold over a wider region."""


@dataclass
class LayeredSettings(Settings):
    """Layered unlearning (Qian et al., https://arxiv.org/abs/2505.09500): the forget text in parts, one stage for each."""

    parts: Annotated[int, at_least(2)] = 3
    """Parts of the forget text, in the order of its documents, as equal as possible. Stage i unlearns parts 1 to i, while the
    later parts count as retain text. More parts take more updates."""


@dataclass
class CorruptSettings(Settings):
    """Noise in the weights that training starts from."""

    share: Annotated[float, must_be("above 0 and at most 1", lambda share: 0 < share <= 1)] = 0.6
    """Every weight is multiplied by 1 - share. Higher values erase more of the model, and training has more to restore."""
    noise: Amount = 0.1
    """share * noise * N is added to matrices; N is drawn as Xavier's uniform initialisation, by the run's seed."""


@dataclass
class BudgetSettings(Settings):
    """What a run may cost elsewhere. It ends when it exceeds its budget, and the result is the last weights within it."""

    kl: Annotated[float, above(0)] | None = None
    """Highest KL(reference ‖ model) of next tokens on neutral text that is not trained on, a mean over tokens, in nats. A
    higher value lets the model change more. null: no limit."""
    retain: Annotated[Fraction, above(0)] | None = None
    """Highest loss of accuracy on the retain task of eval.tasks, against the model before unlearning: 0.02 is two points.
    null: no limit."""
    restored: Annotated[float, above(0)] | None = None
    """End the run once the cross-entropy on neutral text is at most this share above that of the model before unlearning: 0.05
    is 5 %. For runs that start with rewind or corrupt, which have to learn again. null: go on to the last update."""
    every: Positive | None = None
    """Updates between two checks; the last update is always checked. A smaller number ends the run closer to the budget, and
    takes longer. null: Lethe chooses it so that checks take about 4 % of the run's computation."""
    documents: Positive = 32
    """Number of documents of neutral text for kl and restored."""
    questions: Count = 400
    """Number of questions for retain, from the first one (0: all). More questions show smaller losses, and take longer."""
    text: Texts | None = None
    """Neutral text for kl and restored; null: documents of the retain text that are not trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl is None and self.retain is None and self.restored is None:
            raise LetheError(
                "budget: it has no limit; give kl, such as {kl: 0.01}, retain, such as {retain: 0.02}, or restored, such as "
                "{restored: 0.05}"
            )
        self.refuse_idle("documents", "text", when=not self.reads_text, why="without budget.kl or budget.restored")
        self.refuse_idle("questions", when=self.retain is None, why="without budget.retain")

    @property
    def reads_text(self) -> bool:
        """Whether a check reads neutral text."""
        return self.kl is not None or self.restored is not None

    @property
    def limits(self) -> dict[str, float]:
        """The highest allowed value of each measure."""
        return {name: limit for name, limit in (("kl", self.kl), ("retain", self.retain)) if limit is not None}


@dataclass
class UnlearnSettings(TrainingSettings):
    """What an unlearning run is made of, whatever its method."""

    model: str = "lab:final"
    """The target: the model to unlearn. It is also the frozen reference that losses compare with."""
    source: str = ""
    """The ignorant checkpoint, such as lab:global_step900; auto: the latest one, found by a sweep over the model's checkpoints
    (auto:WHERE, if they are published elsewhere). Leave it out if neither the method nor rewind uses a source."""
    forget: Text = "lab:forget"
    """Text to unlearn."""
    retain: Texts = "lab:retain"
    """Text on which the model should stay as it is. A list of sources is a mixture, in proportion to their weights."""
    packing: Literal["none", "packed"] = "none"
    """none: one document a sequence, cut at max_length; packed: documents joined and split into sequences of max_length."""
    rewind: Annotated[float, must_be("between 0 (the model) and 1 (the source)", lambda share: 0 <= share <= 1)] = 0.0
    """Start from (1 - rewind) * model + rewind * source, weight by weight. 0: from the model, 1: from the source."""
    rewind_weights: str = "all"
    """Which weights are rewound. all: every weight; fisher: those that serve the forget text more than the retain text, by
    their Fisher information; a .safetensors file with a score for every weight, or run:ID of a run that has scores: those
    with the highest scores."""
    rewind_share: Annotated[float, must_be("above 0 and at most 1", lambda share: 0 < share <= 1)] = 0.75
    """Share of the model's weights that is rewound, those with the highest scores. Higher values hold better against attacks
    and cost more general accuracy."""
    corrupt: CorruptSettings | None = None
    """Start from the model's weights, shrunk and with noise; null: start from the model's weights as they are."""
    layers: Layers | None = None
    """Layer L is the residual stream after block L (from 0). Adapters sit on blocks up to the last one; null: on all blocks."""
    num_train_examples: Count | None = None
    """Number of forget documents, and of retain documents (0: all); null: all, up to 2,048."""
    lora: LoraSettings | None = field(default_factory=LoraSettings)
    """Train LoRA adapters, which are saved without the model; null: train all weights."""
    merge: bool = False
    """Merge the adapters into the model at the end and save the whole model."""
    sam: SamSettings | None = None
    """Take the forget gradient at nearby weights where the forget loss is higher, such as {rho: 0.01}; null: at the weights. It
    costs one more pass over the forget text."""
    same_sign: bool = False
    """Of the forget gradient, use only the entries that have the sign of the retain gradient."""
    layered: LayeredSettings | None = None
    """Unlearn the forget text part by part in stages, such as {parts: 3}; `epochs` then counts passes within each stage. null:
    all of it at once."""
    budget: BudgetSettings | None = None
    """What the run may cost elsewhere, such as {kl: 0.01} or {retain: 0.02}. The run ends when it exceeds its budget, with the
    last weights within it. null: no limit."""
    dtype: Dtype = "float32"
    """Type of the model's weights."""
    teacher_dtype: Dtype | None = None
    """Type of the teachers' weights; null: the model's."""
    teacher_cache: Literal["auto", "live", "cached"] = "auto"
    """live: the teachers run at every update; cached: they run once, and their outputs are cached on disk; auto: cached if
    training uses documents more than once."""
    eval: EvalSettings = field(default_factory=EvalSettings)
    """Evaluation during and after the run."""
    out: str = "runs"
    """Folder of runs."""
    name: RunName = "unlearn"
    """Name of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retain == []:
            raise LetheError("retain: name at least one text")
        if self.sam and self.dtype == "bfloat16" and self.lora is None:
            raise LetheError(
                "sam: rounding of bfloat16 weights is larger than its moves; set dtype to float32, or train adapters"
            )
        if self.layered and self.max_steps > 0:
            raise LetheError("layered: every stage has a number of epochs; set epochs, and leave max_steps out")
        if self.layered and isinstance(self.forget, TextSource) and self.forget.part:
            raise LetheError("forget.part: layered splits the text itself; leave part out")
        if self.layered and self.packing == "packed":
            raise LetheError("packing: a packed sequence can have documents of two parts; with layered, set it to none")
        if self.rewind and self.corrupt:
            raise LetheError("rewind and corrupt both set the weights to start from; set rewind: 0, or corrupt: null")
        self.refuse_idle("rewind_weights", when=not self.rewind, why="while rewind is 0")
        self.refuse_idle("rewind_share", when=self.rewind_weights == "all", why="with rewind_weights all")
        if self.budget and self.budget.limits and self.moves_start:
            raise LetheError(
                "budget: a run with rewind or corrupt starts outside its budget and would end at once; leave one out"
            )
        if self.budget and self.budget.restored and not self.moves_start:
            raise LetheError(
                "budget.restored: a run without rewind and corrupt has nothing to restore and would end at once; leave it out"
            )
        if self.budget and self.budget.restored and self.layered:
            raise LetheError("budget.restored: it could end a layered run before its last stage; leave one of the two out")
        self.refuse_idle("merge", when=self.lora is None, why="in full-rank training (lora: null), where there is no adapter")

    @property
    def moves_start(self) -> bool:
        """Whether training starts from other weights than the model's."""
        return self.rewind > 0 or self.corrupt is not None

    @property
    def finds_source(self) -> bool:
        """Whether the source is yet to be found, by a sweep over the model's checkpoints."""
        return self.source == "auto" or self.source.startswith("auto:")


@dataclass(kw_only=True)
class CheckSettings(Settings):
    """What `lethe check` takes beside the settings of `lethe unlearn`."""

    memory: Memory | None = None
    """Memory of one device, such as 80GiB. Only config.json is read then, no weights and no text; null: what is free here."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Kind of device to plan for. On a CPU, the memory of the process counts, with its libraries and its text."""

    @property
    def plans(self) -> bool:
        """Whether the run's memory is planned from config.json alone."""
        this: Any = self  # settings of a method, too
        return self.memory is not None or this.devices is not None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_idle("device", when=not self.plans, why="without memory or devices")
