"""Settings of training: text, adapters, batches and optimizer, and those of unlearning."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from lethe.config.checks import Amount, Count, Fraction, Length, Positive, Seed, Settings, above, must_be
from lethe.errors import LetheError

Parallel = Literal["auto", "ddp", "fsdp"]
OptimizerName = Literal["adamw", "adamw_8bit", "muon", "sgd"]
LAYERS = [0, 1, 2, 3, 4]
UNLEARNED, MAPPED = 2048, 100_000
"""How many documents unlearning (per kind) and a fit of affine maps use at most if no number is given."""


def part_of(part: str) -> tuple[int, int]:
    """`2/3` as (2, 3); (0, 0) if it is no part."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", part)
    number, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    return (number, parts) if 1 <= number <= parts else (0, 0)


def _refuse_part(name: str, part: str) -> None:
    if part_of(part) == (0, 0):
        raise LetheError(f"{name}: expected a part such as 2/3, the second of three, got '{part}'")


@dataclass
class TextSource(Settings):
    """Text to train on: where it is and how a record becomes a document."""

    source: str
    """lab:forget, lab:retain, a .jsonl, .parquet or .txt file (one document a line), or a hub data set (NAME:CONFIGURATION)."""
    column: str = "text"
    """The column that holds the document."""
    template: str | None = None
    """A template that makes the document from several columns, such as "{title}\\n\\n{abstract}\\n\\n{text}"."""
    split: str = "train"
    """The split of a hub data set that is read."""
    first: Positive | None = None
    """Read only so many documents, the first in the order of their SHA-256, from which unlearning takes its own; null: all."""
    part: Annotated[str, _refuse_part] | None = None
    """Read only one part, such as 2/3: the second of three as equal parts as possible, in the same order. With `first`, it is a
    part of those documents. The parts are those of layered unlearning."""
    weight: Annotated[float, above(0)] = 1.0
    """How many documents come from this source, relative to the weights of the other sources of a mixture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_local = self.source.startswith("lab:") or self.source.endswith((".jsonl", ".parquet", ".txt"))
        self.refuse_idle("column", when=self.template is not None, why="beside a template")
        self.refuse_idle("split", when=is_local, why=f"on '{self.source}', which is no hub data set")


def _refuse_weight(name: str, text: str | TextSource | list[TextSource]) -> None:
    if isinstance(text, TextSource) and text.weight != 1:
        raise LetheError(f"{name}.weight: {text.weight} has no effect on a text alone; it is for mixtures of retain text")


Text = Annotated[str | TextSource, _refuse_weight]
Texts = Annotated[str | TextSource | list[TextSource], _refuse_weight]
"""A text, or a mixture."""


def as_text_source(text: str | TextSource) -> TextSource:
    """`text` as a `TextSource`; a bare string is its `source`."""
    return TextSource(text) if isinstance(text, str) else text


@dataclass
class LoraSettings(Settings):
    """LoRA adapters on the linear layers of the model's blocks."""

    r: Positive = 16
    """Rank of the adapters. A higher rank can change the model in more directions, and takes more memory."""
    alpha: Annotated[float, above(0)] = 16.0
    """The adapters' output is scaled by alpha / r."""
    dropout: Fraction = 0.05
    """Dropout rate on the adapters' inputs in training."""
    targets: Literal["all", "attention", "mlp"] = "all"
    """Which linear layers of a block get adapters: those of attention, those of the MLP, or all."""


@dataclass
class TrainingSettings(Settings):
    """What unlearning and attacks have in common: length, batches, optimizer. Names are those of transformers."""

    epochs: Annotated[float, above(0)] = 1
    """Passes over the documents."""
    max_steps: Annotated[int, must_be("at least 1, or -1 for epochs", lambda steps: steps >= 1 or steps == -1)] = -1
    """Number of optimizer updates; -1: train for `epochs` instead."""
    max_length: Length = 64
    """Maximum number of tokens per document; the rest is cut off. More tokens take more time and memory."""
    per_device_train_batch_size: Positive = 16
    """Documents (of each kind) in one forward pass on one device. More documents need more memory."""
    gradient_accumulation_steps: Positive = 1
    """Forward passes in one optimizer update. The update has this many times as many documents, at the same memory."""
    lr: Annotated[float, above(0)] = 1e-3
    """Peak learning rate."""
    optimizer: OptimizerName = "adamw"
    """muon: Muon for hidden matrices, AdamW for the rest; sgd: lr times the gradient, without momentum; adamw_8bit: AdamW with
    8-bit state (torchao or bitsandbytes). When all weights are trained in bfloat16, adamw_8bit needs torchao, which rounds at
    random."""
    newton_schulz_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the matmuls in Muon's Newton-Schulz iteration; auto: bfloat16 on a GPU, float32 on a CPU."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: Count = 0
    """Updates in which the learning rate rises from 0 to its peak."""
    weight_decay: Amount = 0.0
    """Weight decay of all weights except norms and biases. A higher value pulls weights more strongly towards 0."""
    max_grad_norm: Amount = 1.0
    """Norm at which the gradient is clipped (0: no clipping)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of storing them: less memory, more time."""
    fast: bool = True
    """Use faster passes of adapters and, on a GPU, compile the blocks of large models; false: use the code of PEFT and
    transformers. Results are the same up to rounding, and the order of dropout draws in compiled blocks."""
    save_every: Count = 100
    """Updates between two saves, from which an interrupted run is resumed (0: save at the end only)."""
    divergence_factor: Annotated[float, must_be("above 1, or 0", lambda factor: factor > 1 or factor == 0)] = 100.0
    """A run has diverged once its loss exceeds this many times |mean of its first 20 losses| (0: only if it is NaN)."""
    on_divergence: Literal["stop", "finish"] = "stop"
    """stop: a diverged run ends with the weights of its last save; finish: training continues. Both have status `diverged`."""
    devices: Positive | None = None
    """Number of processes to start on this machine, each with a GPU of its own if there are any. An update then has this many
    times as many documents. null: one process, or those that torchrun, accelerate or Slurm started."""
    parallel: Parallel = "auto"
    """How several processes divide the work. ddp: each holds the whole model; fsdp: each holds a shard of every weight, which
    takes less memory and more communication; auto: ddp if the run fits into the memory of one device, else fsdp."""
    time_limit: Amount = 0.0
    """Hours after which the run saves and stops (0: no limit)."""
    report_to: list[str] = field(default_factory=list)
    """Other loggers that get the metrics, by their names in transformers: wandb, trackio, mlflow, tensorboard."""
    seed: Seed = 0
    """Seed of the order of documents, the initial weights of adapters, and dropout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_idle("epochs", when=self.max_steps > 0, why=f"while max_steps is {self.max_steps} instead of -1")
        self.refuse_idle("newton_schulz_dtype", when=self.optimizer != "muon", why=f"with optimizer {self.optimizer}")
