"""Settings of one attack: fine-tuning on forget text, or a change to the weights or the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lethe.config.checks import Count, RunName, Settings
from lethe.config.evaluation import EvalSettings
from lethe.config.training import LoraSettings, Text, TrainingSettings
from lethe.errors import LetheError

AttackName = Literal["finetune", "noise", "quantize", "prune", "prompt"]
STRENGTHS: dict[str, list[float]] = {"noise": [0.1, 0.2, 0.4, 0.8], "quantize": [8, 4]}
STRENGTHS |= {"prune": [0.1, 0.3, 0.5, 0.7], "prompt": [1, 2, 4]}
ATTACKED = 512
"""How many documents an attack uses at most if no number is given."""


@dataclass
class TamperConfig(TrainingSettings):
    """Attack a model: fine-tune it on forget text, change its weights, or prompt it, and measure what comes back."""

    model: str = ""
    """The model to attack: any model reference, such as run:ID, lab:filtered or random:lab:final."""
    attack: AttackName = "finetune"
    """finetune: train on forget text. Without training: add noise to the weights, quantize or prune them, or prompt with
    forget text."""
    strengths: list[float] = field(default_factory=list)
    """How strong the attack is, the weakest first; []: usual values. noise: its standard deviation relative to the matrix's;
    quantize: bits, 8 or 4; prune: share of the weights that is set to 0; prompt: documents in the prompt."""
    forget: Text = "lab:forget"
    """The attacker's text. Documents are ordered by their hash: unlearning uses the first ones, attacks the last ones."""
    num_train_examples: Count | None = None
    """Documents that the attacker has (0: all); null: all, up to 512. A prompt's documents are drawn from these."""
    overlap: Literal["refuse", "allow"] = "refuse"
    """Whether the attacker may have documents that the model was unlearned with. The run records their number."""
    lora: LoraSettings | None = None
    """Train adapters on the linear layers of all blocks; null: train all weights."""
    adapter: Literal["merge", "train"] = "merge"
    """If the model has an adapter: merge: merge the adapter before the attack; train: the attack trains the adapter itself."""
    save_model: bool = False
    """Save the attacked model (of the last strength), so that you can evaluate or attack it again."""
    max_steps: int = 60
    """Number of optimizer updates; -1: train for `epochs` instead."""
    lr: float = 3e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "constant"
    """Shape of the learning rate after the warm-up."""
    eval: EvalSettings = field(default_factory=lambda: EvalSettings(every=10))
    """Evaluation before the first update, every `eval.every` updates and at the end. Without training: at each strength."""
    out: str = "runs"
    """Folder of runs."""
    name: RunName = "attack"
    """Name of the run."""

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if self.attack != "finetune":
            self._refuse_training()
        super().__post_init__()
        if not self.model:
            raise LetheError("model: name the model to attack, such as run:ID or lab:filtered")
        why = "with adapter train, which trains the adapter that is there"
        self.refuse_idle("lora", when=self.adapter == "train", why=why)
        self.refuse_idle("strengths", when=self.attack == "finetune", why="with attack finetune")
        if self.attack != "finetune":
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
        """Refuse settings that an attack without training does not use."""
        read = {"model", "attack", "strengths", "eval", "out", "name", "time_limit", "devices"}
        read |= {"forget", "num_train_examples", "overlap", "max_length"} if self.reads_text else {"save_model"}
        read |= {"seed"} if self.draws else set()
        self.refuse_idle(*sorted({*self.changed()} - read), when=True, why=f"with attack {self.attack}")
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
            raise LetheError(f"strengths: attack {self.attack} expects {expected}, got {wrong[0]:g}")
        rising = sorted(set(self.strengths), reverse=self.attack == "quantize")
        if self.strengths != rising:
            wanted = ", ".join(f"{strength:g}" for strength in rising)
            raise LetheError(f"strengths: name each once, the weakest first: [{wanted}]")
        documents = ATTACKED if self.num_train_examples is None else self.num_train_examples
        if self.attack == "prompt" and documents and max(self.strengths) > documents:
            raise LetheError(f"strengths: {max(self.strengths):g} documents are more than num_train_examples, {documents}")
