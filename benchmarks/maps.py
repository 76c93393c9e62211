"""Fitting affine maps: FLOP utilisation, memory and numerical error.

    python benchmarks/maps.py

Width 1024, 6 layers, batches of 1024 tokens. The peak is that of the matmuls xᵀ x and yᵀ x on chunks of the same size,
measured in turns with the accumulation of Σ x xᵀ and Σ y xᵀ. These two count 4 · tokens · width² FLOPs a layer. The change of
basis is not counted. Prints medians and minima.

The error is the difference to a solution in float64: of R², and of predictions in units of y's standard deviation. The text
has means that are 20 standard deviations away from 0, and two dimensions that are a thousand times as wide as the others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lethe.maps.ridge import CHUNK, RidgeSums

WIDTH, LAYERS, BATCH, REPEATS = 1024, 6, 1024, 7
ALPHA = 0.01


def text(tokens: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """x with means of 20 spreads and two massive dimensions, and a noisy y."""
    spread = torch.ones(WIDTH)
    spread[:2] = 1000
    x = (torch.randn(tokens, WIDTH, generator=rng) + 20) * spread
    return x, x.roll(1, 1) + 0.5 * x.roll(2, 1) + 0.1 * spread * torch.randn(tokens, WIDTH, generator=rng)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def times(rng: torch.Generator) -> dict[str, list[float]]:
    """Seconds for a chunk of one layer: of its products alone, of its sums, and of its sums where it is the first."""
    x, y = text(CHUNK, rng)
    layers = [RidgeSums() for _ in range(LAYERS)]

    def add(sums: RidgeSums) -> None:
        for batch in zip(x.split(BATCH), y.split(BATCH), strict=True):
            sums.add(*batch)

    found: dict[str, list[float]] = {"products": [], "sums": [], "first": [seconds(partial(add, sums)) for sums in layers]}
    for _ in range(REPEATS):
        for sums in layers:
            found["products"].append(seconds(lambda: (x.T @ x, y.T @ x)))
            found["sums"].append(seconds(partial(add, sums)))
    return found


def error(rng: torch.Generator, tokens: int = 3 * CHUNK) -> tuple[float, float]:
    """Difference of R², and of predictions in spreads of y, from float64."""
    x, y = text(tokens, rng)
    sums = RidgeSums()
    for a, b in zip(x.split(BATCH), y.split(BATCH), strict=True):
        sums.add(a, b)
    weight, bias = (t.double() for t in sums.solve(ALPHA))
    x, y = x.double(), y.double()
    centred, target = x - x.mean(0), y - y.mean(0)
    exact = torch.linalg.solve(centred.T @ centred + ALPHA * torch.eye(WIDTH).double(), centred.T @ target)
    found, truth = x @ weight.T + bias - y.mean(0), centred @ exact
    total = target.square().sum()
    worse = (target - found).square().sum() / total - (target - truth).square().sum() / total
    return worse.abs().item(), ((found - truth) / y.std(0)).square().mean().sqrt().item()


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    found = times(rng)
    difference, off = error(rng)
    held = RidgeSums()
    held.add(*text(2, rng))
    held.solve(ALPHA)
    tensors = [held.chunk, held.centre, held.basis, held.gram, held.cross]
    print(f"{torch.get_num_threads()} threads; {CHUNK} tokens a chunk")
    print(f"{'':28}{'median':>8}{'minimum':>9}")
    kinds = (("float32 matmuls, GFLOP/s", None), ("utilisation: accumulation", "sums"), ("utilisation: first chunk", "first"))
    for name, of in kinds:
        row = []
        for best in (statistics.median, min):
            products = best(found["products"])
            row.append(products / best(found[of]) if of else 4e-9 * CHUNK * WIDTH**2 / products)
        print(f"{name:28}{row[0]:8.2f}{row[1]:9.2f}")
    print(f"memory: {sum(t.nbytes for t in tensors) / 2**20:.0f} MiB a layer, whatever the number of tokens")
    print(f"against float64: R² {difference:.1e}, predictions {off:.1e} spreads of y")


if __name__ == "__main__":
    main()
