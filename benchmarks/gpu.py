"""The check on one GPU of 80 GB: a random model of 7B shape through Lethe's own commands, as one table, in at most 8 minutes.

    scripts/gpu-check.sh WHEELS [FOLDER]      # on a machine that has PyTorch; see there
    python benchmarks/gpu.py FOLDER           # where everything is installed; FOLDER needs 60 GiB

Without a GPU, everything runs with a tiny model in seconds, which shows only that the program works. Each stage that fails
prints its reason in the table, and the others go on. A stage that would begin after `--seconds` is left out; one that is
running then is ended.

`plain` is a simple training loop on the same weights and batches: two teachers run in full, full logits, one pass per text,
PEFT's own forward pass. FLOP utilisation is model FLOPs (`operations` in step.py: without recomputation and teachers) a second,
over those of a large bfloat16 matmul in the same run. `estimate` is what the run's plan says of its peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging
import os
import random
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
START = time.monotonic()


@dataclass(frozen=True)
class Size:
    """The shape of the model and the amount of work."""

    blocks: int
    width: int
    heads: int
    vocabulary: int
    tokens: int
    layers: tuple[int, ...]
    questions: int
    turns: int
    matmul: tuple[int, int, int]
    batch: int = 4
    updates: int = 6
    warm: int = 2


BIG = Size(32, 4096, 32, 50_304, 2048, (4, 9, 14, 19, 24, 29), 200, 1, (8192, 4096, 16_384))
TINY = Size(4, 64, 4, 1024, 64, (0, 2), 20, 3, (1024, 1024, 1024))


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], times: int) -> float:
    """Median seconds of `work`."""
    taken = []
    for _ in range(times):
        synchronise()
        start = time.perf_counter()
        work()
        synchronise()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


class Check:
    """The stages, in the order in which they run. Each returns its part of a row; `rows` has the whole ones."""

    def __init__(self, folder: Path, size: Size, limit: float):
        self.folder, self.size, self.limit = folder, size, limit
        self.model, self.source = folder / "model", folder / "source"
        self.task = folder / "task"
        self.peak_flops = 0.0
        self.plain_speed = 0.0
        self.rows: list[dict[str, Any]] = []

    def run(self) -> None:
        self.row("matmul", self.matmul)
        self.row("random model", self.build)
        self.row("plain", self.plain)
        self.row("cached", lambda: self.unlearn("cached", teacher_cache="cached"))
        self.row("live", lambda: self.unlearn("live", teacher_cache="live"))
        self.row("cached, activations stored", lambda: self.unlearn("stored", gradient_checkpointing=False))
        self.row("evaluation", self.evaluation)
        self.row("attack", self.attack)
        self.row("maps", self.maps)
        self.row("full-rank, 8-bit AdamW", self.full_rank)

    def row(self, name: str, stage: Callable[[], dict[str, Any]]) -> None:
        """Run a stage under what is left of the time, and measure its peak memory."""
        left = self.limit - (time.monotonic() - START)
        found: dict[str, Any] = {"stage": name}
        self.rows.append(found)
        if left < 1:
            found["reason"] = f"not run: the limit of {self.limit:.0f} s was reached"
        else:
            say(f"{name} …")
            began = time.monotonic()
            signal.signal(signal.SIGALRM, self.too_late)
            signal.setitimer(signal.ITIMER_REAL, left, 5)  # again, because libraries catch what they try
            try:
                reset_peak()
                found |= stage()
                found.setdefault("peak_GiB", peak() / GIB)
            except Exception as error:  # the other stages go on
                found["reason"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            found["seconds"] = time.monotonic() - began
            free_memory()
        say(f"{name}: {cells(found)}")
        (self.folder / "gpu-check.json").write_text(json.dumps(self.answer(), indent=2))

    def too_late(self, *_: object) -> None:
        raise TimeoutError(f"ended: the limit of {self.limit:.0f} s was reached")

    def answer(self) -> dict[str, Any]:
        import torch
        import transformers

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"device": device, "size": vars(self.size), "versions": versions, "rows": self.rows}

    def matmul(self) -> dict[str, Any]:
        """The machine's rate, on a product as large as that of the MLP."""
        import torch

        n, inner, outputs = self.size.matmul
        device = "cuda" if torch.cuda.is_available() else "cpu"
        x, w = (torch.randn(rows, inner, device=device, dtype=torch.bfloat16) for rows in (n, outputs))
        seconds(lambda: x @ w.T, 5)
        self.peak_flops = 2 * n * inner * outputs / seconds(lambda: x @ w.T, 20)
        return {"TFLOPS": self.peak_flops / 1e12}

    def build(self) -> dict[str, Any]:
        """The model with random weights, made on the device; a source that differs in one file of weights; texts; a task."""
        import torch
        from evaluate import questions, task_folder, trained_tokenizer
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM, GPTNeoXConfig

        s = self.size
        config = GPTNeoXConfig(
            vocab_size=s.vocabulary, hidden_size=s.width, intermediate_size=4 * s.width, num_hidden_layers=s.blocks,
            num_attention_heads=s.heads, max_position_embeddings=max(s.tokens, 256),
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        parameters = sum(p.numel() for p in model.parameters())
        say(f"{parameters / 1e9:.3g} B parameters are made; saving")
        model.save_pretrained(self.model, max_shard_size="2GB" if s is BIG else "100KB")
        del model
        tokenizer = trained_tokenizer()
        tokenizer.save_pretrained(self.model)
        self.source.mkdir()
        for file in self.model.iterdir():
            os.link(file, self.source / file.name)
        shard = min(self.source.glob("*.safetensors"))
        tensors = {name: 0.9 * tensor for name, tensor in load_file(shard).items()}
        shard.unlink()  # of the link alone
        save_file(tensors, shard, {"format": "pt"})
        self.task.mkdir()
        task_folder(self.task, "gpu_check", questions(s.questions, 40, 0), letters=True)
        rng = random.Random(0)
        words = ["river", "mill", "copper", "salt", "harbour", "lantern", "wheel", "island", "brass", "sea", "coal", "trade"]
        for text in ("forget", "retain"):
            lines = [" ".join(rng.choices(words, k=s.tokens)) for _ in range(s.batch * s.updates)]
            (self.folder / f"{text}.txt").write_text("\n".join(lines))
        return {"parameters": parameters}

    def recipe(self, name: str, **settings: Any) -> Any:
        """The LoRA recipe of the Deep Ignorance study, with few documents and without accumulation."""
        from lethe import LoraSettings, Transfer
        from lethe.config import EvalSettings

        common: dict[str, Any] = {
            "model": str(self.model), "source": str(self.source), "affine": "none", "layers": list(self.size.layers),
            "forget": str(self.folder / "forget.txt"), "retain": str(self.folder / "retain.txt"),
            "num_train_examples": self.size.batch * self.size.updates, "max_length": self.size.tokens,
            "per_device_train_batch_size": self.size.batch, "lr": 1e-3, "lora": LoraSettings(), "dtype": "bfloat16",
            "gradient_checkpointing": True, "teacher_cache": "cached",
            "eval": EvalSettings([str(self.task)], limit=4), "out": str(self.folder / "runs"), "name": name,
        }  # fmt: skip
        return Transfer(**common | settings)

    def unlearn(self, name: str, **settings: Any) -> dict[str, Any]:
        """A run of unlearning, and the speed of its updates as metrics.jsonl has it."""
        from lethe import unlearn

        config = self.recipe(name, **settings)
        run = unlearn(config)
        lines = run.rows("metrics.jsonl")[self.size.warm :]
        found = self.speed(statistics.median(line["tokens_per_second"] for line in lines), config)
        if self.plain_speed and config.lora:
            found["times_plain"] = found["tokens_per_second"] / self.plain_speed
        memory = {"estimate_GiB": sum(run.record["plan"]["memory"].values()) / GIB, "peak_GiB": run_peak(run) / GIB}
        return found | memory | {"loss": lines[-1]["loss"]}

    def full_rank(self) -> dict[str, Any]:
        """All weights, with 8-bit AdamW. Its save needs the disk space of earlier runs and of a copy to fall back to."""
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        return self.unlearn("full", lora=None, optimizer="adamw_8bit", lr=1e-5, on_divergence="finish")

    def plain(self) -> dict[str, Any]:
        from step import Plain

        from lethe.models import refs
        from lethe.text import corpora

        config = self.recipe("plain")
        tokenizer = refs.tokenizer(refs.resolve(config.model))
        rows = [corpora.tokenise(corpora.read(getattr(config, n)), tokenizer, config.max_length) for n in ("forget", "retain")]
        loop = Plain(config, *rows, tokenizer.pad_token_id)
        say("weights are loaded")
        taken = seconds(loop.update, self.size.updates)
        self.plain_speed = 2 * self.size.batch * self.size.tokens / taken
        return self.speed(self.plain_speed, config)

    def speed(self, tokens_per_second: float, config: Any) -> dict[str, Any]:
        from step import operations
        from transformers import AutoConfig

        batch, width, rank = self.size.batch, self.size.tokens, config.lora.r if config.lora else 0
        work = operations(AutoConfig.from_pretrained(self.model), batch, width, rank, config.layers)
        rate = work / (2 * batch * width) * tokens_per_second
        return {"tokens_per_second": tokens_per_second, "utilisation": rate / self.peak_flops}

    def attack(self) -> dict[str, Any]:
        """Two updates of fine-tuning on forget text, with adapters on float32 weights; the speed is that of the second."""
        from lethe import LoraSettings, TamperConfig, tamper
        from lethe.config import EvalSettings

        run = tamper(
            TamperConfig(
                model=str(self.model),
                forget=str(self.folder / "forget.txt"),
                max_length=self.size.tokens,
                max_steps=2,
                per_device_train_batch_size=1,
                gradient_checkpointing=True,
                lora=LoraSettings(),
                fast=False,  # compiling would take longer than two updates
                overlap="allow",
                eval=EvalSettings([str(self.task)], limit=4),
                out=str(self.folder / "runs"),
                name="attack",
            )
        )
        return {"tokens_per_second": run.rows("metrics.jsonl")[-1]["tokens_per_second"]}

    def maps(self) -> dict[str, Any]:
        """Affine maps of all layers; the speed includes loading both models."""
        from lethe import AffineConfig, fit_affine

        began, count = time.perf_counter(), self.size.batch * self.size.updates
        fit_affine(
            AffineConfig(
                model=str(self.model),
                source=str(self.source),
                text=str(self.folder / "retain.txt"),
                dtype="bfloat16",
                layers=list(self.size.layers),
                max_length=self.size.tokens,
                batch_size=self.size.batch,
                out=str(self.folder / "runs"),
                name="maps",
            )
        )
        return {"tokens_per_second": count * self.size.tokens / (time.perf_counter() - began)}

    def evaluation(self) -> dict[str, Any]:
        """Lethe's scoring and lm-eval's `hf`, on the same questions, in batches of at most as many tokens."""
        import torch
        from evaluate import in_turns
        from lm_eval.models.huggingface import HFLM

        from lethe.evaluation import requests, scoring
        from lethe.models import refs

        model, tokenizer = refs.load(refs.resolve(str(self.model)), "bfloat16")
        ((leaf,),) = requests.load_tasks([str(self.task)]).values()
        scorer = scoring.Scorer(model, tokenizer)
        encoded = [pair for some in leaf.encoded(scorer, 0) for pair in some]
        leaf.task.build_all_requests()
        instances = leaf.task.instances
        tokens = scoring.TOKENS_PER_BATCH_ON_GPU if torch.cuda.is_available() else scoring.TOKENS_PER_BATCH
        size = max(1, tokens // max(len(context) + len(answer) for context, answer in encoded))
        hflm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size)
        times = in_turns(
            self.size.turns + 1,
            lethe=lambda: (scorer.score(encoded), synchronise()),
            lm_eval=lambda: (hflm.loglikelihood(instances, disable_tqdm=True), synchronise()),
        )
        mine, theirs = (statistics.median(times[who][1:]) for who in ("lethe", "lm_eval"))
        return {"questions_per_second": self.size.questions / mine, "times_lm_eval": theirs / mine}


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes: of the GPU's tensors, or of the process, since `reset_peak`."""
    import torch

    from lethe.runs.machine import peak_memory

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()


def run_peak(run: Any) -> int:
    import torch

    return peak() if torch.cuda.is_available() else run.record["environment"]["peak_memory"]


def free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


COLUMNS = {
    "stage": "",
    "tokens_per_second": ".0f",
    "utilisation": ".1%",
    "times_plain": ".2f",
    "peak_GiB": ".2f",
    "estimate_GiB": ".2f",
    "questions_per_second": ".1f",
    "times_lm_eval": ".2f",
    "seconds": ".0f",
}


def cells(row: dict[str, Any]) -> str:
    shown = [f"{name} {value:{COLUMNS.get(name, '.4g')}}" for name, value in row.items() if isinstance(value, int | float)]
    return "; ".join([*shown, *filter(None, [row.get("reason")])])


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    widths = [28, *(len(name) + 2 for name in list(COLUMNS)[1:])]
    yield "".join(f"{name:>{width}}" for name, width in zip(COLUMNS, widths, strict=True))
    for row in rows:
        shown = [f"{row[name]:{form}}" if name in row else "-" for name, form in COLUMNS.items()]
        yield "".join(f"{text:>{width}}" for text, width in zip(shown, widths, strict=True)) + f"  {row.get('reason', '')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty or new folder on a local disk")
    parser.add_argument("--seconds", type=float, default=480, help="limit of the whole check")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if any(args.folder.iterdir()):
        raise SystemExit(f"gpu: '{args.folder}' is not empty; name a new folder")
    os.environ["LETHE_HOME"] = str(args.folder / "home")
    say("importing")
    import torch

    from lethe import cli
    from lethe.models import refs

    cli.quiet()
    logging.getLogger("lethe.training.merged_lora").addHandler(logging.StreamHandler())
    refs.weight_hash = functools.cache(refs.weight_hash)  # type: ignore[assignment]  # 14 GB, for each of six runs
    check = Check(args.folder, BIG if torch.cuda.is_available() else TINY, args.seconds)
    check.run()
    print("\n".join(table(check.rows)))
    print(json.dumps(check.answer()))


if __name__ == "__main__":
    main()
