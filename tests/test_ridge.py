"""The ridge regression of maps is scikit-learn's, whatever the activations, and so are its scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from lethe.errors import LetheError
from lethe.maps import ridge
from lethe.maps.ridge import RidgeSums, Score

HIDDEN = 12


def planted(n: int, mean: float, rank: int = HIDDEN) -> tuple[torch.Tensor, torch.Tensor]:
    """x with spread 1 about a mean, y an affine function of it with a little noise, both float32."""
    rng = np.random.default_rng(0)
    centre = mean * rng.choice([-1.0, 1.0], HIDDEN)
    x = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, HIDDEN)) / np.sqrt(rank) + centre
    y = x @ rng.normal(size=(HIDDEN, HIDDEN)) / np.sqrt(HIDDEN) + 3 * mean + 0.1 * rng.normal(size=(n, HIDDEN))
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def streamed(x: torch.Tensor, y: torch.Tensor, batch: int) -> RidgeSums:
    sums = RidgeSums()
    for start in range(0, len(x), batch):
        sums.add(x[start : start + batch], y[start : start + batch])
    return sums


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Chunks as they are, larger than a short text, or so small that most of the text is in later ones."""
    if request.param == "many chunks":
        monkeypatch.setattr(ridge, "CHUNK", 64)


CASES = {
    **{f"mean {m:g}, alpha {a:g}": (planted(3000, m), a, 500) for m, a in ((0.0, 1.0), (1.0, 100.0), (200.0, 0.01))},
    "small batches": (planted(3000, 200.0), 0.01, 3),
    "rank deficient": (planted(2000, 1.0, rank=4), 0.01, 100),
    "fewer tokens than dimensions": (planted(5, 0.0), 0.5, 2),
}


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("case", CASES)
def test_solution_is_that_of_scikit_learn(case):
    (x, y), alpha, batch = CASES[case]
    weight, bias = (t.double().numpy() for t in streamed(x, y, batch).solve(alpha))
    x, y = x.double().numpy(), y.double().numpy()
    exact = Ridge(alpha=alpha, solver="svd").fit(x, y)
    tolerance = 1e-5 if case.startswith(("mean 0", "mean 1,")) else 1e-3
    assert np.abs(weight - exact.coef_).max() < tolerance * np.abs(exact.coef_).max()
    assert np.abs(x @ weight.T + bias - exact.predict(x)).max() < 10 * tolerance * y.std()


WIDE = 40


def hard_text(case: str) -> np.ndarray:
    """6,000 tokens of 40 dimensions, as hard as language models have them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6000, WIDE))
    own = x.copy()
    match case:
        case "means of 20 spreads":
            x += 20 * rng.choice([-1, 1], WIDE)
        case "a massive dimension":
            x[:, 3] = 5000 + 1000 * own[:, 3]
        case "two massive dimensions, almost one":
            x[:, 3], x[:, 7] = 1000 * own[:, 3], 900 * own[:, 3] + own[:, 7]
        case "a few massive tokens":
            x[rng.random(6000) < 0.01, 5:7] += [3000, -1500]
        case "dimensions that nearly follow from others":
            x[:, 1] = own[:, 0] + 1e-3 * own[:, 1]
            x[:, 9] = own[:, 2:8].sum(1) + 1e-3 * own[:, 9]
        case "massive directions across dimensions":
            x = own * np.array([300, 3, 3] + [0.05] * (WIDE - 3)) @ np.linalg.qr(rng.normal(size=(WIDE, WIDE)))[0]
        case "a first chunk unlike the rest":
            x[:300] *= np.logspace(0, -2, WIDE)
            x[300:] += 3
    return x


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("case", "tolerance"),
    [
        ("nothing special", 1e-6),
        ("means of 20 spreads", 1e-6),
        ("a first chunk unlike the rest", 1e-5),
        ("a few massive tokens", 2e-5),
        ("a massive dimension", 2e-5),
        ("two massive dimensions, almost one", 2e-4),
        ("dimensions that nearly follow from others", 1e-3),
        ("massive directions across dimensions", 1e-3),
    ],
)
def test_hard_activations_are_solved_as_in_float64(case, tolerance):
    """R² to 1e-9 and predictions to 3e-6 spreads of y whatever the text; W as far as the text determines it."""
    x = hard_text(case)
    rng = np.random.default_rng(1)
    y = x @ rng.normal(size=(WIDE, WIDE)) / np.sqrt(WIDE)
    y += 0.1 * np.median(np.abs(y - y.mean(0))) * rng.normal(size=y.shape)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    weight, bias = (t.double().numpy() for t in streamed(x, y, 100).solve(0.01))
    x, y = x.double().numpy(), y.double().numpy()
    exact = Ridge(alpha=0.01, solver="svd").fit(x, y)
    found, truth = x @ weight.T + bias, exact.predict(x)
    scores = [r2_score(y, predicted, multioutput="variance_weighted") for predicted in (found, truth)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-9)
    assert (((found - truth) / y.std(0)) ** 2).mean() < 1e-11
    assert np.abs(weight - exact.coef_).max() < tolerance * np.abs(exact.coef_).max()


def test_memory_does_not_grow_with_the_text(monkeypatch):
    monkeypatch.setattr(ridge, "CHUNK", 64)

    def held(tokens: int) -> int:
        sums = streamed(*planted(tokens, 0.0), 50)
        return sum(t.nbytes for t in vars(sums).values() if isinstance(t, torch.Tensor))

    assert held(6000) == held(100)


def test_activations_that_are_not_finite_are_refused():
    x, y = planted(100, 0.0)
    x[3, 2] = torch.inf
    with pytest.raises(LetheError, match="not finite"):
        streamed(x, y, 100).solve(0.01)


def test_score_is_that_of_scikit_learn():
    x, y = planted(500, 20.0)
    predicted = y + 0.3 * x.roll(1, 0) - 5
    score = Score()
    for start in range(0, 500, 7):
        score.add(y[start : start + 7], predicted[start : start + 7])
    a, b = y.double().numpy(), predicted.double().numpy()
    expected = {"r2": r2_score(a, b, multioutput="variance_weighted"), "mse": ((a - b) ** 2).mean()}
    assert score.result() == pytest.approx(expected, rel=1e-9)
    one = Score()
    one.add(torch.ones(1, 4), torch.zeros(1, 4))  # R² has no denominator, MSE is defined
    assert one.result()["mse"] == pytest.approx(1.0)
