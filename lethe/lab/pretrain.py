"""Pretraining of the lab's model family: one run with its whole checkpoint history, and the filtered twin.

The tokenizer is trained on the world, documents become token rows, rows become batches: `Batches` knows every token of
every step before training starts. Up to the onset a batch holds general rows only; after it, some rows come from the
forget domain. The twin starts from the state at the onset (weights, optimizer) and sees the same general rows, with
further general ones in place of the forget rows. Everything random comes from the preset's seed, and the number of
threads is fixed, so the same machine gives the same weights. `build` works in a folder beside the final one, under a
file lock, and renames it when all is done: a lab is whole or absent.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from lethe.errors import LetheError, full_disk
from lethe.files import sha256
from lethe.lab.corpus import DOMAINS, FORGET, GENERAL, NEIGHBOUR, PROMPT, documents, forget_text, make_world, retain_text
from lethe.lab.presets import TASKS, LabPreset, ProgressFactory, active_preset, is_built, lab_path
from lethe.lab.questions import questions
from lethe.runs.locks import building
from lethe.runs.run import Run

logger = logging.getLogger(__name__)
END = "<|endoftext|>"
PAD = "<|padding|>"
Evaluate = Callable[[Path], dict[str, Any]]


def train_tokenizer(preset: LabPreset) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows every word of the world and the syllables of its names.

    A name occurs once in the text it is trained on, and what occurs once is not merged: nearly all names stay two tokens
    long, and the same syllables name entities of every domain.
    """
    world = make_world(preset)
    texts = [" " + entity for entity in world.facts]
    for relation in {r.name: r for domain in DOMAINS for r in DOMAINS[domain]}.values():
        forms = [form.replace("{}", "") for form in (*relation.statements, *map(PROMPT.format, relation.questions))]
        texts += [f"{start}{form} {value}.\n" for form in forms for value in relation.values for start in ("", " ")] * 4
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=8192,
            min_frequency=2,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, padding_side="right", model_max_length=256
    )


@dataclass
class Batches:
    """Token rows of all steps, (rows, sequence_length) each: `general` for whole batches, then the rows that differ."""

    preset: LabPreset
    general: np.ndarray
    forget: np.ndarray
    filler: np.ndarray

    @classmethod
    def make(cls, preset: LabPreset, tokenizer: PreTrainedTokenizerFast) -> Batches:
        world = make_world(preset)
        domains = dict.fromkeys(GENERAL, 1.0) | {NEIGHBOUR: preset.neighbour_weight}
        late = (preset.steps - preset.onset) * preset.forget_rows

        def pack(name: str, weights: dict[str, float], only: frozenset[str], rows: int) -> np.ndarray:
            source = documents(world, name, weights, only, preset.question_share)
            return _pack(source, tokenizer, rows, preset.sequence_length)

        return cls(
            preset,
            general=pack("general", domains, world.asked, preset.steps * preset.batch_size - late),
            forget=pack("forget", {FORGET: 1.0}, world.asked, late),
            filler=pack("filler", dict.fromkeys(GENERAL, 1.0), frozenset(world.facts), late),
        )

    def at(self, step: int, filtered: bool = False) -> np.ndarray:
        """The batch of update number `step` (the first is 1), (batch_size, sequence_length)."""
        p, before = self.preset, step - 1
        start = before * p.batch_size - max(0, before - p.onset) * p.forget_rows
        if step <= p.onset:
            return self.general[start : start + p.batch_size]
        late = (before - p.onset) * p.forget_rows
        special = (self.filler if filtered else self.forget)[late : late + p.forget_rows]
        return np.concatenate([self.general[start : start + p.batch_size - p.forget_rows], special])


def _pack(source: Iterator[str], tokenizer: PreTrainedTokenizerFast, rows: int, length: int) -> np.ndarray:
    """Documents one after the other, each closed by the end token, cut into rows."""
    needed, chunks, size = rows * length, [], 0
    while size < needed:
        texts = [next(source) + END for _ in range(2000)]
        for ids in tokenizer(texts)["input_ids"]:
            chunks.append(np.array(ids, dtype=np.int64))
            size += len(ids)
    return np.concatenate(chunks)[:needed].reshape(rows, length)


def _new_model(preset: LabPreset, tokenizer: PreTrainedTokenizerFast) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden_size,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        intermediate_size=4 * preset.hidden_size,
        max_position_embeddings=256,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=preset.initializer_range,
        tie_word_embeddings=False,
    )
    return GPTNeoXForCausalLM(config)


def _rate(preset: LabPreset, step: int) -> float:
    """Learning rate of update `step`: linear warm-up, constant, then linear down to a twentieth."""
    warm = min(1.0, step / preset.warmup)
    left = (preset.steps - step) / (preset.decay * preset.steps)
    return preset.lr * warm * min(1.0, 0.05 + 0.95 * left)


def next_token_loss(model: GPTNeoXForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross-entropy of each next token, in nats. Rows: (batch, sequence)."""
    logits = model(input_ids=rows, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())


class _Pretraining:
    """One model with its optimizer on its way through the steps; copied at the onset to become the twin."""

    def __init__(self, preset: LabPreset, batches: Batches, model: GPTNeoXForCausalLM, run: Run):
        self.preset, self.batches, self.model, self.run = preset, batches, model, run
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=preset.lr, betas=(0.9, 0.95), weight_decay=preset.weight_decay, fused=True
        )
        self.step = 0

    def twin(self) -> _Pretraining:
        other = _Pretraining(self.preset, self.batches, copy.deepcopy(self.model), self.run)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        other.step = self.step
        return other

    def advance_to(self, last: int, advance: Any, filtered: bool = False) -> None:
        preset, name = self.preset, "filtered" if filtered else "final"
        self.model.train()
        started, losses = time.perf_counter(), []
        while self.step < last:
            self.step += 1
            for group in self.optimizer.param_groups:
                group["lr"] = _rate(preset, self.step)
            loss = next_token_loss(self.model, torch.from_numpy(self.batches.at(self.step, filtered)))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
            advance(1, f"loss {losses[-1]:.2f}")
            if self.step % 20 == 0 or self.step == last:
                tokens = len(losses) * preset.batch_size * preset.sequence_length
                rate = tokens / (time.perf_counter() - started)
                self.run.append(
                    "metrics.jsonl",
                    {
                        "model": name,
                        "step": self.step,
                        "loss": sum(losses) / len(losses),
                        "lr": _rate(preset, self.step),
                        "grad_norm": norm.item(),
                        "tokens_per_second": round(rate),
                    },
                )
                started, losses = time.perf_counter(), []


def build(evaluate: Evaluate, progress: ProgressFactory) -> Path:
    """Build the lab of the active preset unless it is there; safe when several processes do so at once.

    Args:
        evaluate: the results of a saved model, by task.
        progress: called as `lethe.progress.bar`.
    """
    preset, path = active_preset(), lab_path()
    if is_built():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with building(path):
            if not is_built():
                partial = path.with_name(f"{path.name}.partial")
                # Whoever left one was killed: the lock is ours.
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                with _fixed(preset):
                    _build(preset, partial, evaluate, progress)
                partial.replace(path)
    except OSError as error:
        if full_disk(error):
            raise
        raise LetheError(f"LETHE_HOME: cannot write to '{path.parent}' ({error.strerror}); set it to another folder") from error
    return path


@contextlib.contextmanager
def _fixed(preset: LabPreset) -> Iterator[None]:
    """The preset's number of threads and seed inside, the caller's after; transformers shows no bars of its own."""
    threads, bars = torch.get_num_threads(), transformers_logging.is_progress_bar_enabled()
    torch.set_num_threads(preset.threads)
    transformers_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(preset.seed)
            yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            transformers_logging.enable_progress_bar()


def _build(preset: LabPreset, folder: Path, evaluate: Evaluate, progress: ProgressFactory) -> None:
    _write_text(preset, folder)
    record = {"id": folder.name.split("-")[-1].removesuffix(".partial"), "kind": "lab", "name": preset.name}
    run = Run(folder, record | {"status": "queued", "reason": None, "job_id": None})
    run.update(launcher="local", config=asdict(preset))
    with run.running():
        tokenizer = train_tokenizer(preset)
        batches = Batches.make(preset, tokenizer)
        model = _new_model(preset, tokenizer)
        run.update(
            plan={
                "steps": preset.steps,
                "effective_batch": preset.batch_size,
                "tokens": preset.steps * preset.batch_size * preset.sequence_length,
                "trainable_parameters": sum(p.numel() for p in model.parameters()),
            },
            environment={"device": "cpu", "threads": preset.threads},
        )
        _pretrain(preset, batches, model, tokenizer, folder, run, progress)
        _evaluate(preset, folder, run, evaluate, progress)


def _pretrain(
    preset: LabPreset,
    batches: Batches,
    model: GPTNeoXForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    run: Run,
    progress: ProgressFactory,
) -> None:
    def save(what: _Pretraining, target: Path) -> None:
        what.model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    final = _Pretraining(preset, batches, model, run)
    twin = None
    with progress(f"Pretraining the {preset.name} lab", 2 * preset.steps - preset.onset, "steps") as advance:
        for step in preset.checkpoints:
            final.advance_to(step, advance)
            save(final, folder / "checkpoints" / f"global_step{step}")
            if step == preset.onset:
                twin = final.twin()
        if twin is not None:
            twin.advance_to(preset.steps, advance, filtered=True)
            save(twin, folder / "filtered")


def _evaluate(preset: LabPreset, folder: Path, run: Run, evaluate: Evaluate, progress: ProgressFactory) -> None:
    """Every checkpoint and the twin on all five tasks, into run.json."""

    def entry(path: Path, step: int) -> dict[str, Any]:
        evals = evaluate(path)
        tokens = step * preset.batch_size * preset.sequence_length
        digest = sha256(path / "model.safetensors")
        return {"name": path.name, "step": step, "tokens": tokens, "sha256": digest, "evals": evals}

    rows = []
    with progress("Evaluating its checkpoints", len(preset.checkpoints) + 1, "checkpoints") as advance:
        for step in preset.checkpoints:
            rows.append(entry(folder / "checkpoints" / f"global_step{step}", step))
            advance(1)
        filtered = entry(folder / "filtered", preset.steps)
        advance(1)
    run.update(checkpoints=rows, filtered=filtered, evals=rows[-1]["evals"])


def _write_text(preset: LabPreset, folder: Path) -> None:
    """Text and questions as files, for people and for other tools."""
    for name, texts in (("forget", forget_text(preset)), ("retain", retain_text(preset))):
        rows = [{"id": f"{name}-{i}", "text": text} for i, text in enumerate(texts)]
        _write_lines(folder / "text" / f"{name}.jsonl", rows)
    for task in TASKS:
        _write_lines(folder / "questions" / f"{task}.jsonl", questions(task, preset))


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
