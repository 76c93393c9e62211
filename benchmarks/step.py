"""The time of one update of unlearning: a plain loop, live teachers and cached teachers, with ratios and FLOP utilisation.

    python benchmarks/step.py [CASE …]

Measured on the built-in lab's model (LETHE_LAB selects another preset): LoRA of rank 16 on five of six blocks, retain loss
KL. A case is a batch size, a number of tokens per document, and a dropout. Four things take turns in one process:

    plain     a simple training loop: both teachers run in full, full logits, one pass per text, PEFT's own forward
    live      Lethe with `teacher_cache: live`
    cached    Lethe with `teacher_cache: cached`
    matmuls   float32 matrices, 1024 × 1024, for the peak (`sizes`: the share of it that the model's own sizes reach)

An update includes clipping, AdamW and logging. The FLOPs of an update count two operations per multiplication: the forward
pass, the gradients of inputs, the adapters' matmuls, the output head on retain text, and the causal half of attention. They
do not count gradients of frozen weights, teachers, or blocks that no loss needs.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lethe import LoraSettings, Transfer
from lethe.config import EvalSettings, to_dict
from lethe.lab import presets
from lethe.models import refs
from lethe.models.adapters import add_adapters
from lethe.objectives import losses
from lethe.objectives.losses import squared_distance
from lethe.runs.run import Run
from lethe.text import corpora
from lethe.unlearning.check import check
from lethe.unlearning.prepare import cache_teachers, prepare
from lethe.unlearning.trainer import UnlearnTrainer

CASES = [(16, 64, 0.0), (4, 64, 0.0), (16, 256, 0.0), (16, 64, 0.05)]
ROUNDS, UPDATES, WARM = 4, 5, 2
LAYERS = [0, 1, 2, 3, 4]


def text(folder: Path, count: int, width: int, tokenizer: Any) -> dict[str, str]:
    """Files of forget and retain documents of exactly `width` tokens or more, made by joining the lab's."""
    files = {}
    for name in ("forget", "retain"):
        documents, joined = corpora.read(f"lab:{name}"), []
        i = 0
        while len(joined) < count:
            parts: list[str] = []
            while len(tokenizer(" ".join(parts))["input_ids"]) < width:
                parts.append(documents[i % len(documents)].text)
                i += 1
            joined.append(" ".join(parts))
        files[name] = str(folder / f"{name}.txt")
        Path(files[name]).write_text("\n".join(t.replace("\n", " ") for t in joined))
    return files


class Ours:
    """Lethe's own trainer, stopped and continued between updates."""

    def __init__(self, config: Transfer):
        checked = check(config)
        run = Run.create("unlearn", config.name, to_dict(config), config.out)
        made = prepare(run, config, checked)
        self.trainer, self.tokenizer = made.trainer, made.tokenizer
        cache_teachers(run, made)
        made.free_teachers()

    def seconds(self, updates: int) -> list[float]:
        """Seconds of each of so many updates, of one train() call, without its first `WARM`."""
        ends: list[float] = []
        log = UnlearnTrainer.log

        def ended(trainer: UnlearnTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
            log(trainer, logs, start_time)
            if "loss" in logs:
                ends.append(time.perf_counter())

        UnlearnTrainer.log = ended  # type: ignore[method-assign]
        try:
            self.trainer.args.max_steps = updates + WARM
            self.trainer._save_checkpoint = lambda *args: None  # type: ignore[method-assign]
            self.trainer.train()
        finally:
            UnlearnTrainer.log = log  # type: ignore[method-assign]
        return [b - a for a, b in zip(ends[WARM - 1 :], ends[WARM:], strict=False)]


class Plain:
    """The same objective, written down as it reads."""

    def __init__(self, config: Transfer, forget: list[list[int]], retain: list[list[int]], pad_id: int):
        (student, _), (self.source, _), (self.reference, _) = (
            refs.load(refs.resolve(name)) for name in (config.model, config.source, config.model)
        )
        assert config.lora is not None
        self.student: Any = add_adapters(student, config.lora, config.layers, config.seed).train()
        self.config, self.texts, self.pad_id = config, (forget, retain), pad_id
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimizer, self.step = torch.optim.AdamW(self.trained, lr=config.lr, weight_decay=0.0), 0
        for teacher in (self.source, self.reference):
            teacher.eval().requires_grad_(False)

    def update(self) -> None:
        size = self.config.per_device_train_batch_size
        start = self.step * size % (len(self.texts[0]) - size + 1)
        (forget, f_mask), (retain, r_mask) = (corpora.pad(rows[start : start + size], self.pad_id) for rows in self.texts)
        with torch.no_grad():
            aim = self.source(forget, output_hidden_states=True, use_cache=False).hidden_states
            reference = self.reference(retain, use_cache=False).logits
        states = self.student(forget, output_hidden_states=True, use_cache=False).hidden_states
        pairs: list[dict[int, Tensor]] = [{n: hidden[n + 1] for n in LAYERS} for hidden in (states, aim)]
        loss = 5 * squared_distance(*pairs, f_mask)
        loss = loss + 5 * losses.kl(self.student(retain, use_cache=False).logits, reference, r_mask)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.step += 1

    def seconds(self, updates: int) -> list[float]:
        return [seconds(self.update) for _ in range(updates + WARM)][WARM:]


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def operations(model: Any, batch: int, width: int, rank: int) -> float:
    """Floating-point operations of a step that have to be done."""
    c = model.config
    h, tokens = c.hidden_size, batch * width
    shapes = [(h, 3 * h), (h, h), (h, c.intermediate_size), (c.intermediate_size, h)]
    linear = sum(a * b for a, b in shapes)
    adapters = sum(rank * (a + b) for a, b in shapes)
    attention = width * h  # scores and values, 2 · width · hidden, of which the causal half is needed
    depth, adapted = c.num_hidden_layers, max(LAYERS) + 1
    rows = {True: 2 * tokens, False: tokens}  # forget and retain rows, then retain rows alone
    work = 0.0
    for block in range(depth):
        n = rows[block < adapted]
        work += n * (2 * linear + 2 * attention)  # forward
        work += n * (2 * linear + 4 * attention)  # gradients of inputs; of attention, twice its forward
        work += n * 6 * adapters * (block < adapted)  # x Aᵀ and B; their gradients with respect to inputs, A and B
    work -= rows[True] * 2 * shapes[0][0] * shapes[0][1]  # nothing before the first block's input asks for a gradient
    work -= rows[True] * 2 * shapes[2][0] * shapes[2][1] if c.use_parallel_residual else 0
    return work + tokens * 2 * 3 * h * c.vocab_size  # the head: student, reference, and the gradient


def rate(shapes: list[tuple[int, int, int]]) -> float:
    """Float32 operations a second of products [tokens, inputs] · [inputs, outputs]."""
    pairs = [(torch.randn(n, a), torch.randn(b, a)) for n, a, b in shapes]

    def products() -> None:
        for x, w in pairs:
            torch.nn.functional.linear(x, w)

    products()
    return sum(2 * n * a * b for n, a, b in shapes) / statistics.median(seconds(products) for _ in range(5))


def rates(model: Any, tokens: int) -> dict[str, float]:
    """The machine's rate, on square matrices, and that of products as large as the model's."""
    h, inner = model.config.hidden_size, model.config.intermediate_size
    shapes = [(h, 3 * h), (h, h), (h, inner), (inner, h)]
    return {"machine": rate([(1024, 1024, 1024)]), "model": rate([(tokens, a, b) for a, b in shapes])}


def case(batch: int, width: int, dropout: float, folder: Path) -> None:
    ref = refs.resolve("lab:final")
    model, tokenizer = refs.load(ref)
    count = batch * (UPDATES + WARM)
    source = f"lab:global_step{presets.active_preset().onset}"
    config = Transfer(
        source=source, layers=LAYERS, affine="none", num_train_examples=count, max_length=width, schedule="constant",
        per_device_train_batch_size=batch, max_steps=UPDATES + WARM, lora=LoraSettings(dropout=dropout),
        eval=EvalSettings(["lab_forget_robust"]), out=str(folder / "runs"), **text(folder, count, width, tokenizer),
    )  # fmt: skip
    rows = [corpora.tokenise(corpora.read(getattr(config, n)), tokenizer, width) for n in ("forget", "retain")]
    contenders: dict[str, Any] = {"plain": Plain(config, *rows, tokenizer.pad_token_id)}
    for how in ("live", "cached"):
        contenders[how] = Ours(dataclasses.replace(config, teacher_cache=how))
    found: dict[str, list[float]] = {name: [] for name in contenders}
    speeds: dict[str, list[float]] = {"machine": [], "model": []}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            for kind, speed in rates(model, 2 * batch * width).items():
                speeds[kind].append(speed)
            found[name] += contender.seconds(UPDATES)
    work = operations(model, batch, width, 16)
    speed, own = (statistics.median(values) for values in speeds.values())
    times = {name: statistics.median(values) for name, values in found.items()}
    print(
        f"{batch:>3} × {width:<4}{dropout:>8}{speed / 1e9:>10.1f}{own / speed:>8.0%}{work / 1e9:>9.2f}"
        + "".join(f"{1e3 * t:>9.1f}" for t in times.values())
        + f"{times['plain'] / times['cached']:>9.2f}{times['live'] / times['cached']:>9.2f}"
        + "".join(f"{work / times[name] / speed:>8.0%}" for name in ("plain", "live", "cached")),
        flush=True,
    )


def main() -> None:
    print(f"{torch.get_num_threads()} threads; milliseconds an update, medians; columns in %: FLOP utilisation")
    print(
        f"{'batch':>9}{'dropout':>8}{'GFLOP/s':>10}{'sizes':>8}{'GFLOP':>9}{'plain':>9}{'live':>9}{'cached':>9}{'plain/c':>9}{'live/c':>9}"
        f"{'plain':>8}{'live':>8}{'cached':>8}"
    )
    chosen = [CASES[int(i)] for i in sys.argv[1:]] or CASES
    for batch, width, dropout in chosen:
        with tempfile.TemporaryDirectory() as folder:
            case(batch, width, dropout, Path(folder))


if __name__ == "__main__":
    main()
