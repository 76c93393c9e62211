"""Pretraining of the lab's models: one run with all its checkpoints, and the filtered twin.

    world -> tokenizer -> documents -> packed sequences -> batches -> checkpoints -> evaluations

`Batches` holds the tokens of every step before training starts. Up to the onset a batch has general sequences only. After it,
some sequences come from the forget domain. The twin starts from the weights and the optimizer state at the onset. It sees the
same general sequences, and further general ones in place of the forget sequences. All random numbers come from the preset's
seed and the number of threads is fixed, so the same machine gives the same weights. `build` works in a folder beside the final
one, under a file lock, and renames it at the end. A lab is therefore complete or absent.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from lethe.errors import LetheError, full_disk
from lethe.files import sha256
from lethe.lab.corpus import DOMAINS, FORGET, GENERAL, NEIGHBOUR, PROMPT, documents, forget_text, make_world, retain_text
from lethe.lab.presets import LabPreset, active_preset, is_built, lab_path
from lethe.progress import bar
from lethe.runs.locks import building
from lethe.runs.run import Run

END = "<|endoftext|>"
PAD = "<|padding|>"
Evaluate = Callable[[GPTNeoXForCausalLM, PreTrainedTokenizerFast], dict[str, Any]]


def train_tokenizer(preset: LabPreset) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a token for each value of the world and for each syllable of its names.

    Each name occurs once in the training text, and BPE merges nothing that occurs once. So nearly all names stay two tokens
    long, and entities of all domains share these tokens.
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
    """The token ids of all steps, each array [sequences, sequence_length].

    After the onset, a batch ends with sequences of `forget` for the final model and of `filler` for the twin.
    """

    preset: LabPreset
    general: np.ndarray
    forget: np.ndarray
    filler: np.ndarray

    @classmethod
    def make(cls, preset: LabPreset, tokenizer: PreTrainedTokenizerFast) -> Batches:
        world = make_world(preset)
        domains = dict.fromkeys(GENERAL, 1.0) | {NEIGHBOUR: preset.neighbour_weight}
        late = (preset.steps - preset.onset) * preset.forget_sequences

        def pack(name: str, weights: dict[str, float], only: frozenset[str], count: int) -> np.ndarray:
            source = documents(world, name, weights, only, preset.question_share)
            return _pack(source, tokenizer, count, preset.sequence_length)

        return cls(
            preset,
            general=pack("general", domains, world.evaluated, preset.steps * preset.batch_size - late),
            forget=pack("forget", {FORGET: 1.0}, world.evaluated, late),
            filler=pack("filler", dict.fromkeys(GENERAL, 1.0), frozenset(world.facts), late),
        )

    def at(self, step: int, filtered: bool = False) -> np.ndarray:
        """The batch of update number `step` (the first is 1), [batch_size, sequence_length]."""
        p, before = self.preset, step - 1
        start = before * p.batch_size - max(0, before - p.onset) * p.forget_sequences
        if step <= p.onset:
            return self.general[start : start + p.batch_size]
        late = (before - p.onset) * p.forget_sequences
        special = (self.filler if filtered else self.forget)[late : late + p.forget_sequences]
        return np.concatenate([self.general[start : start + p.batch_size - p.forget_sequences], special])


def _pack(source: Iterator[str], tokenizer: PreTrainedTokenizerFast, count: int, length: int) -> np.ndarray:
    """`count` sequences: documents one after the other, each followed by the end token, cut to `length` tokens."""
    needed, chunks, size = count * length, [], 0
    while size < needed:
        texts = [next(source) + END for _ in range(2000)]
        for ids in tokenizer(texts)["input_ids"]:
            chunks.append(np.array(ids, dtype=np.int64))
            size += len(ids)
    return np.concatenate(chunks)[:needed].reshape(count, length)


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


def next_token_loss(model: GPTNeoXForCausalLM, ids: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the next token, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class _Pretraining:
    """One model and its optimizer during pretraining; a copy at the onset becomes the twin."""

    def __init__(self, preset: LabPreset, batches: Batches, model: GPTNeoXForCausalLM, run: Run):
        self.preset, self.batches, self.model, self.run = preset, batches, model, run
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=preset.lr, betas=(0.9, 0.95), weight_decay=preset.weight_decay, fused=True
        )
        self.step = 0

    def twin(self) -> _Pretraining:
        other = copy.copy(self)
        other.model, other.optimizer = copy.deepcopy((self.model, self.optimizer))
        return other

    def advance_to(self, last: int, advance: Callable[..., None], filtered: bool = False) -> None:
        """Train up to step `last`; every 20 steps, and at the last, a line of metrics.jsonl."""
        self.model.train()
        while self.step < last:
            self.step += 1
            rate = _rate(self.preset, self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = next_token_loss(self.model, torch.from_numpy(self.batches.at(self.step, filtered)))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
            self.optimizer.step()
            self.optimizer.zero_grad()
            advance(1, f"loss {loss.item():.2f}")
            if self.step % 20 == 0 or self.step == last:
                facts = {"model": "filtered" if filtered else "final", "step": self.step, "loss": loss.item()}
                self.run.append("metrics.jsonl", facts | {"lr": rate, "grad_norm": norm})


def build(evaluate: Evaluate) -> Path:
    """Build the lab of the active preset unless it exists. Several processes may call this at the same time.

    `evaluate` returns the results of a model by task.
    """
    preset, path = active_preset(), lab_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with building(path):
            if not is_built():
                partial = path.with_name(f"{path.name}.partial")
                # Left by a builder that was killed: this process holds the lock.
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                with _fixed(preset):
                    _build(preset, partial, evaluate)
                partial.replace(path)
    except OSError as error:
        if full_disk(error):
            raise
        raise LetheError(f"LETHE_HOME: cannot write to '{path.parent}' ({error.strerror}); set it to another folder") from error
    return path


@contextlib.contextmanager
def _fixed(preset: LabPreset) -> Iterator[None]:
    """Inside, the preset's number of threads and seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(preset.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(preset.seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _build(preset: LabPreset, folder: Path, evaluate: Evaluate) -> None:
    (folder / "text").mkdir()
    for name, texts in (("forget", forget_text(preset)), ("retain", retain_text(preset))):
        rows = [{"id": f"{name}-{i}", "text": text} for i, text in enumerate(texts)]
        (folder / "text" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"id": folder.name.split("-")[-1].removesuffix(".partial"), "kind": "lab", "name": preset.name}
    run = Run(folder, record | {"status": "queued", "reason": None, "job_id": None})
    run.update(launcher="local", config=asdict(preset))
    with run.running():
        tokenizer = train_tokenizer(preset)
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
        final = _Pretraining(preset, Batches.make(preset, tokenizer), model, run)
        run.update(**_pretrain(final, tokenizer, folder, evaluate))


def _pretrain(final: _Pretraining, tokenizer: PreTrainedTokenizerFast, folder: Path, evaluate: Evaluate) -> dict[str, Any]:
    """Train the final model and the twin; save and evaluate each checkpoint. Returns their fields of run.json."""
    preset, twin, found = final.preset, final, []

    def saved(training: _Pretraining, path: Path) -> dict[str, Any]:
        training.model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        facts = {"name": path.name, "step": training.step, "tokens": training.step * preset.batch_size * preset.sequence_length}
        return facts | {"sha256": sha256(path / "model.safetensors"), "evals": evaluate(training.model, tokenizer)}

    with bar(f"Pretraining the {preset.name} lab", 2 * preset.steps - preset.onset, "steps") as advance:
        for step in preset.checkpoints:
            final.advance_to(step, advance)
            found.append(saved(final, folder / "checkpoints" / f"global_step{step}"))
            if step == preset.onset:
                twin = final.twin()
        twin.advance_to(preset.steps, advance, filtered=True)
        return {"checkpoints": found, "filtered": saved(twin, folder / "filtered"), "evals": found[-1]["evals"]}
