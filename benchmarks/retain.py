"""The retain loss in chunks of tokens, compared with the plain formula: time and extra memory, output head included.

    python benchmarks/retain.py

Forward and backward passes take turns in one process, and medians are compared. Memory is the rise of the peak of resident
memory, in a fresh process for each variant. The gradient of a trained head, which both variants compute, is subtracted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lethe.objectives.losses import chunked_kl, kl

SHAPES = [(50304, 512, 16, 64), (50304, 512, 4, 256), (50304, 512, 4, 64), (512, 64, 16, 64), (512, 64, 4, 256)]
REPEATS = {50304: 3, 512: 60}


class Case:
    """Hidden states of student and reference, and their heads, at one shape."""

    def __init__(self, words: int, hidden: int, batch: int, seq: int, trained: bool):
        rng = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(batch, seq, hidden, generator=rng).requires_grad_()
        self.reference = self.hidden.detach() + 0.1 * torch.randn(batch, seq, hidden, generator=rng)
        self.heads = [nn.Linear(hidden, words, bias=False).requires_grad_(False) for _ in range(2)]
        self.heads[0].weight.requires_grad_(trained)
        self.mask = torch.ones(batch, seq, dtype=torch.long)

    def plain(self) -> Tensor:
        logits, reference = linear(self.hidden, self.heads[0].weight), linear(self.reference, self.heads[1].weight)
        return kl(logits, reference, self.mask)

    def blocked(self) -> Tensor:
        return chunked_kl(self.hidden, self.heads[0], self.reference, self.heads[1], self.mask)

    def step(self, how: str) -> None:
        self.hidden.grad = self.heads[0].weight.grad = None
        getattr(self, how)().backward()

    def time_ratio(self) -> float:
        """Median time of blocked over that of plain."""
        times: dict[str, list[float]] = {"plain": [], "blocked": []}
        for i in range(1 + REPEATS[len(self.heads[0].weight)]):
            for how, found in times.items():
                start = time.perf_counter()
                self.step(how)
                if i:
                    found.append(time.perf_counter() - start)
        return statistics.median(times["blocked"]) / statistics.median(times["plain"])


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most so far (VmHWM); of Linux."""
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))


def extra_memory(how: str, shape: tuple[int, ...], trained: bool) -> int:
    """Bytes by which the peak rises in one step after a step of four tokens; to be called in a process of its own."""
    Case(*shape[:2], 1, 4, trained).step(how)
    case = Case(*shape, trained)
    before = resident("VmRSS")
    case.step(how)
    gradient = case.heads[0].weight.grad
    return resident("VmHWM") - before - (0 if gradient is None else gradient.nbytes)


def memory(how: str, shape: tuple[int, ...], trained: bool) -> float:
    """MiB of `extra_memory`, from a fresh process."""
    command = [sys.executable, __file__, how, str(int(trained)), *map(str, shape)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20


def main() -> None:
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads")
    columns = ["head", "time", "MiB plain", "MiB chunked", "memory"]
    print(f"{'vocab':>6} {'hidden':>6} {'tokens':>9}" + "".join(f"{name:>12}" for name in columns))
    for shape in SHAPES:
        for trained in (False, True):
            ratio = Case(*shape, trained).time_ratio()
            plain, blocked = (memory(how, shape, trained) for how in ("plain", "blocked"))
            words, hidden, batch, seq = shape
            print(
                f"{words:>6} {hidden:>6} {batch:>3} × {seq:<3}{'trained' if trained else 'frozen':>12}{ratio:12.2f}"
                f"{plain:12.1f}{blocked:12.1f}{blocked / plain if plain else float('nan'):12.3f}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:]:
        print(extra_memory(sys.argv[1], tuple(map(int, sys.argv[3:])), sys.argv[2] == "1"))
    else:
        main()
