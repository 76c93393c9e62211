"""Ridge regression y ≈ W x + b from a stream of tokens, and the score of a prediction.

    RidgeSums.add(x, y) for each batch -> RidgeSums.solve(alpha) -> W, b        Score.add(y, ŷ) for each batch -> MSE, R²

Only the sums Σ x xᵀ, Σ y xᵀ, Σ x and Σ y are stored, so memory does not grow with the text. Language models have means many
times the spread, and a few massive directions. Plain float32 sums would lose the other directions to rounding. Matmuls are
therefore in float32 about the mean of the first tokens, in a basis in which these are uncorrelated, and are added in float64.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lethe import distributed
from lethe.errors import LetheError

CHUNK = 4096
"""Tokens of one matmul, at least; twice the hidden size if that is more."""
FLOOR = 1e-8
"""Share of a dimension's variance that counts as rounding if the dimensions before it do not explain it."""


class RidgeSums:
    """The sums of one layer's ridge regression.

    `solve(alpha)` returns the W and b that minimise Σ |y − W x − b|² + alpha |W|², as scikit-learn's Ridge does. The bias has
    no penalty.

    Tokens are gathered into chunks [y | x]. The first chunk gives a centre c and, from the Cholesky factor of its covariance
    C = L Lᵀ in float64, a basis T = L⁻ᵀ. For z = Tᵀ (x − c) the covariance is near the identity, so no massive direction drowns
    another in float32. The solution is W = V Tᵀ, where V minimises Σ |y − V z − b|² + alpha |V Tᵀ|².
    """

    def __init__(self) -> None:
        self.n = 0
        self.held = 0
        self.basis: Tensor | None = None

    def add(self, x: Float[Tensor, "tokens hidden"], y: Float[Tensor, "tokens hidden"]) -> None:
        if self.n == 0:
            self.chunk = x.new_empty(max(CHUNK, 2 * x.shape[1]), y.shape[1] + x.shape[1], dtype=torch.float32)
            self.y, self.x = slice(0, y.shape[1]), slice(y.shape[1], None)
            self.centre = self.chunk.new_zeros(self.chunk.shape[1])
        start = 0
        while start < len(x):
            count = min(len(x) - start, len(self.chunk) - self.held)
            for given, columns in ((x, self.x), (y, self.y)):
                free = self.chunk[self.held : self.held + count, columns]
                torch.sub(given[start : start + count], self.centre[columns], out=free)
            start, self.held, self.n = start + count, self.held + count, self.n + count
            if self.held == len(self.chunk):
                self._sum_chunk()

    def _sum_chunk(self) -> None:
        """Add the tokens of the current chunk to the sums."""
        chunk = self.chunk[: self.held]
        self.held = 0
        basis = self._begin(chunk) if self.basis is None else self.basis
        z = chunk[:, self.x] @ basis
        self.cross += chunk[:, self.y].T @ z
        self.gram += z.T @ z
        self.sum_y += chunk[:, self.y].sum(0)
        self.sum_z += z.sum(0)

    def _begin(self, chunk: Tensor) -> Tensor:
        """Centre the first chunk, and determine the basis from it."""
        self.centre = chunk.mean(0, dtype=torch.float64).float()
        chunk -= self.centre
        width = len(self.centre[self.x])
        x = chunk[:: 2 if len(chunk) >= 4 * width else 1, self.x].double()  # twice the width is enough for a basis
        self.basis = _whitening(x.T @ x / len(x)).float()
        self.gram, self.cross = x.new_zeros(width, width), x.new_zeros(len(self.centre[self.y]), width)
        self.sum_z, self.sum_y = x.new_zeros(width), x.new_zeros(len(self.centre[self.y]))
        return self.basis

    def join(self) -> None:
        """Add the sums of all processes, which are about different centres and in different bases.

        With T and c of each process and c₀ of the first: Σ (x − c)(x − c)ᵀ = T⁻ᵀ (Σ z zᵀ) T⁻¹, and, for δ = c − c₀ and
        s = Σ (x − c), Σ (x − c₀)(x − c₀)ᵀ = Σ (x − c)(x − c)ᵀ + s δᵀ + δ sᵀ + n δ δᵀ. All in float64.
        """
        if distributed.world() == 1:
            return
        if self.held:
            self._sum_chunk()
        if self.basis is None:  # this process has no token
            self._begin(self.chunk.new_zeros(1, self.chunk.shape[1]))
        basis, centre = self.basis.double(), self.centre.double()  # type: ignore[union-attr]
        first = centre.clone()
        distributed.same_as_first([first])
        dx, dy = (centre - first)[self.x], (centre - first)[self.y]
        s = torch.linalg.solve(basis.T, self.sum_z)
        gram = torch.linalg.solve(basis.T, torch.linalg.solve(basis.T, self.gram).T)
        cross = torch.linalg.solve(basis.T, self.cross.T).T
        gram += torch.outer(s, dx) + torch.outer(dx, s) + self.n * torch.outer(dx, dx)
        cross += torch.outer(self.sum_y, dx) + torch.outer(dy, s) + self.n * torch.outer(dy, dx)
        s, sum_y = s + self.n * dx, self.sum_y + self.n * dy
        distributed.add_up([gram, cross, s, sum_y])
        self.n = int(distributed.total([self.n])[0])
        distributed.same_as_first([basis])
        self.centre, self.basis = first.float(), basis.float()
        self.gram, self.cross, self.sum_z, self.sum_y = basis.T @ gram @ basis, cross @ basis, basis.T @ s, sum_y

    def solve(self, alpha: float) -> tuple[Float[Tensor, "hidden hidden"], Float[Tensor, " hidden"]]:
        """W and b.

        Raises:
            LetheError: there is no token, or the activations do not determine W and alpha is 0.
        """
        if self.n == 0:
            raise LetheError("affine: no token to fit on; give more text")
        if self.held:
            self._sum_chunk()
        basis = self.basis.double()  # type: ignore[union-attr]
        mean_y, mean_z = self.sum_y / self.n, self.sum_z / self.n
        gram = self.gram - self.n * torch.outer(mean_z, mean_z) + alpha * basis.T @ basis
        cross = self.cross - self.n * torch.outer(mean_y, mean_z)
        try:
            solution = torch.linalg.solve(gram, cross, left=False)
        except torch.linalg.LinAlgError as error:
            raise LetheError("affine: the activations do not span all dimensions; set alpha above 0") from error
        weight = solution @ basis.T
        bias = self.centre[self.y].double() + mean_y - solution @ mean_z - weight @ self.centre[self.x].double()
        return weight.float(), bias.float()


def sums_bytes(width: int, layers: int) -> int:
    """Bytes that a fit of this many layers needs: chunks, bases and sums of all layers, and the solution of one at a time."""
    held = 4 * max(CHUNK, 2 * width) * 2 * width + 4 * width**2 + 8 * 2 * width**2
    return layers * (held + 4 * width**2) + 6 * 8 * width**2 if layers else 0


def _whitening(covariance: Float[Tensor, "hidden hidden"]) -> Float[Tensor, "hidden hidden"]:
    """An upper triangular T with Tᵀ C T near the identity, of bounded size where C is singular."""
    spread = covariance.diagonal().sqrt()
    spread = spread.clamp(min=1e-6 * float(spread.max()) or 1.0)
    correlation = covariance / torch.outer(spread, spread)
    correlation.diagonal().add_(FLOOR)
    factor, failed = torch.linalg.cholesky_ex(correlation)
    if failed:
        raise LetheError("affine: the activations are not finite; use a dtype of wider range")
    inverse = torch.linalg.solve_triangular(factor.T, torch.eye(len(factor)).to(factor), upper=True)
    return inverse / spread[:, None]


class Score:
    """Sums for R² and MSE of a prediction, in float64.

    MSE is the mean over tokens and dimensions of (y − ŷ)². R² = 1 − Σ(y − ŷ)² / Σ(y − mean y)²: both sums run over all tokens
    and dimensions, and each dimension has its own mean over the scored tokens.
    """

    def __init__(self) -> None:
        self.n = 0
        self.error = 0.0
        self.centre: Tensor | None = None

    def add(self, y: Float[Tensor, "tokens hidden"], predicted: Float[Tensor, "tokens hidden"]) -> None:
        y = y.double()
        if self.centre is None:
            self.centre = y.mean(0) if len(y) else y.sum(0)
            self.sum, self.squares = torch.zeros_like(self.centre), torch.zeros_like(self.centre)
        self.n += len(y)
        self.error += (y - predicted.double()).square().sum().item()
        self.sum += (y - self.centre).sum(0)
        self.squares += (y - self.centre).square().sum(0)

    def join(self) -> None:
        """Add the sums of all processes, about the centre c₀ of the first.

        With δ = c − c₀: Σ (y − c₀)² = Σ (y − c)² + 2 δ Σ (y − c) + n δ².
        """
        if distributed.world() == 1 or self.centre is None:
            return
        first = self.centre.clone()
        distributed.same_as_first([first])
        shift = self.centre - first
        self.squares += 2 * shift * self.sum + self.n * shift**2
        self.sum += self.n * shift
        distributed.add_up([self.squares, self.sum])
        self.n, self.error = int(distributed.total([self.n])[0]), distributed.total([self.error])[0]
        self.centre = first

    def variance(self) -> float:
        """The variance of y: a mean over tokens and dimensions, like the MSE."""
        return (self.squares - self.sum.square() / self.n).sum().item() / (self.n * len(self.sum))

    def result(self) -> dict[str, float]:
        """`mse` and `r2`."""
        mse, variance = self.error / (self.n * len(self.sum)), self.variance()
        return {"mse": mse, "r2": 1 - mse / variance if variance > 0 else math.nan}
