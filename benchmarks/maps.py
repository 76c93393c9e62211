"""Summing up for affine maps: its share of the machine's float32 matrix-product rate, and its memory and error.

    python benchmarks/maps.py

Width 1024, 6 layers. The rate of the machine is that of xᵀ y at the same shapes, measured in turn with the sums in one
process; both are medians. The work of the sums is counted as 4 · tokens · width² a layer, which is Σ x xᵀ and Σ y xᵀ in
full; going into the basis is not counted, nor is the half of Σ x xᵀ that follows from symmetry taken off. The error is the
difference of R², and of predictions in spreads of y, from a solution in float64 throughout, on text whose means are 20
spreads away and where two dimensions are a thousand times as wide as the others.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from lethe.affine import RidgeSums

WIDTH, LAYERS, BATCH, BATCHES, REPEATS = 1024, 6, 1024, 8, 7
ALPHA = 0.01


def text(tokens: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """x with means of 20 spreads and two massive dimensions, and a noisy y."""
    spread = torch.ones(WIDTH)
    spread[:2] = 1000
    x = (torch.randn(tokens, WIDTH, generator=rng) + 20) * spread
    return x, x.roll(1, 1) + 0.5 * x.roll(2, 1) + 0.1 * spread * torch.randn(tokens, WIDTH, generator=rng)


def seconds(work: list[Tensor], sums: list[RidgeSums] | None) -> float:
    """Time of all batches of all layers: taken into sums, or (None) multiplied."""
    start = time.perf_counter()
    for layer in range(LAYERS):
        for x, y in work:
            if sums is None:
                x.T @ y
                y.T @ x
            else:
                sums[layer].add(x, y)
    return time.perf_counter() - start


def share(rng: torch.Generator) -> tuple[float, float, float]:
    """Share of the rate once the basis is there, that of the first tokens, and the machine's GFLOP/s."""
    work = [text(BATCH, rng) for _ in range(BATCHES)]
    large = [(torch.cat([x for x, _ in work]), torch.cat([y for _, y in work]))]
    sums = [RidgeSums() for _ in range(LAYERS)]
    first = seconds(work, sums)
    rates: dict[str, list[float]] = {"sums": [], "batches": [], "large": []}
    for _ in range(REPEATS):
        rates["sums"].append(seconds(work, sums))
        rates["batches"].append(seconds(work, None))
        rates["large"].append(seconds(large, None))
    ours, *products = (statistics.median(times) for times in rates.values())
    best = min(products)
    return best / ours, best / first, 4e-9 * LAYERS * BATCH * BATCHES * WIDTH**2 / best


def error(rng: torch.Generator, tokens: int = 8 * BATCH) -> tuple[float, float]:
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
    return worse.abs().item(), ((found - truth) / y.std(0)).abs().max().item()


def main() -> None:
    rng = torch.Generator().manual_seed(0)
    steady, first, rate = share(rng)
    difference, furthest = error(rng)
    held = RidgeSums()
    held.add(*text(2, rng))
    held.solve(ALPHA)
    tensors = [held.block, held.centre, held.basis, held.products, held.sums]
    print(f"{torch.get_num_threads()} threads, {rate:.0f} GFLOP/s of float32 products")
    print(f"share of that rate        {steady:.2f}")
    print(f"first {BATCH * BATCHES} tokens a layer {first:.2f}")
    print(f"memory                    {sum(t.nbytes for t in tensors) / 2**20:.0f} MiB a layer, whatever the number of tokens")
    print(f"R² against float64        {difference:.1e}")
    print(f"predictions               {furthest:.1e} spreads of y, at most")


if __name__ == "__main__":
    main()
