"""The laws of activation ratios over training tokens, recovered and searched for by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import curve_fit

from sparsity_atlas.statistics.training_laws import BILLION, LAWS, LOGSPACE, POWER, Fits, fit

TOKENS = np.geomspace(1, 500, 8) * BILLION


def logspace(d, alpha, b, c, limit):
    return np.exp(-c * d**alpha + b) + limit


def power(d, alpha, c, limit):
    return limit - c * d**-alpha


# As arXiv 2411.02335 prints them, of 0.2 and 2.4 billion parameters with ReLU, and of 0.1 and 1.2 with SiLU.
RELU = [(0.449, -3.05, 0.286, 0.0674), (1.53, -3.46, 1.56e-4, 0.0648)]
SILU = [(0.479, 0.102, 0.409), (0.967, 0.538, 0.382)]


@pytest.mark.parametrize("numbers", RELU)
def test_a_logspace_power_law_is_recovered(numbers: tuple[float, ...]) -> None:
    found = fit(LAWS[LOGSPACE], TOKENS, logspace(TOKENS / BILLION, *numbers))
    assert found.b is not None
    got = (found.alpha[0], found.b[0], found.c[0], found.limit[0])
    assert got == pytest.approx(numbers, rel=1e-4)
    assert found.squares[0] < 1e-12
    assert found.edge() == ""


@pytest.mark.parametrize("numbers", SILU)
def test_a_power_law_is_recovered(numbers: tuple[float, ...]) -> None:
    found = fit(LAWS[POWER], TOKENS, power(TOKENS / BILLION, *numbers))
    assert (found.alpha[0], found.c[0], found.limit[0]) == pytest.approx(numbers, rel=1e-4)
    assert found.b is None
    between = np.array([3e9, 1e11])
    assert found.at(between)[0] == pytest.approx(power(between / BILLION, *numbers), rel=1e-6)


def test_a_power_law_by_hand() -> None:
    # A = 0.5 - 0.1 / D at 1, 2 and 4 billion tokens: three points for three parameters.
    found = fit(LAWS[POWER], np.array([1, 2, 4]) * BILLION, np.array([0.4, 0.45, 0.475]))
    assert (found.alpha[0], found.c[0], found.limit[0]) == pytest.approx((1, 0.1, 0.5), rel=1e-4)


@pytest.mark.parametrize(("name", "numbers"), [(LOGSPACE, RELU[0]), (POWER, SILU[0])])
def test_noisy_points_are_fitted_as_levenberg_marquardt_does(name: str, numbers: tuple) -> None:
    law = {LOGSPACE: logspace, POWER: power}[name]
    rng = np.random.default_rng(1)
    rows = law(TOKENS / BILLION, *numbers) + rng.normal(0, 0.001, (5, 8))
    found = fit(LAWS[name], TOKENS, rows)
    for row, (ratios, at) in enumerate(zip(rows, found.at(TOKENS), strict=True)):
        assert found.squares[row] == pytest.approx(((ratios - at) ** 2).sum())
        best, _ = curve_fit(law, TOKENS / BILLION, ratios, p0=numbers, maxfev=20000)
        squares = ((law(TOKENS / BILLION, *best) - ratios) ** 2).sum()
        assert found.squares[row] == pytest.approx(squares, rel=1e-4)
        assert found.limit[row] == pytest.approx(best[-1], abs=1e-4)


@pytest.mark.parametrize("falls", [True, False])
def test_no_place_of_a_brute_force_grid_is_better(falls: bool) -> None:
    """All parameters of the power law on one grid, also where the ratio goes the other way."""
    rng = np.random.default_rng(3)
    d = np.array([0.1, 0.3, 1.0, 2.0])
    ratios = np.clip(0.4 + (-1 if falls else 1) * 0.05 * np.log(d) + rng.normal(0, 0.01, 4), 0, 1)
    found = fit(LAWS[POWER], d * BILLION, ratios)
    alpha = np.geomspace(0.02, 5, 60)[:, None, None, None]
    c = np.concatenate([[0], np.geomspace(1e-4, 1, 80)])[None, :, None, None]
    limit = np.linspace(0, 1, 101)[None, None, :, None]
    squares = ((limit - c * d**-alpha - ratios) ** 2).sum(-1)
    place = np.unravel_index(squares.argmin(), squares.shape)
    assert found.squares[0] <= squares[place] + 1e-12
    assert found.squares[0] == pytest.approx(squares[place], rel=0.05)
    assert (found.edge() == "the ratio does not rise with training") == falls


def test_no_place_of_a_brute_force_grid_of_the_other_law_is_better() -> None:
    d = np.array([0.1, 0.3, 1.0, 2.0, 5.0])
    ratios = np.array([0.42, 0.33, 0.24, 0.23, 0.2])
    found = fit(LAWS[LOGSPACE], d * BILLION, ratios)
    alpha = np.geomspace(0.05, 3, 24)[:, None, None, None, None]
    c = np.geomspace(0.05, 10, 30)[None, :, None, None, None]
    factor = np.geomspace(0.05, 1, 40)[None, None, :, None, None]
    limit = np.linspace(0, 0.3, 31)[None, None, None, :, None]
    squares = ((factor * np.exp(-c * d**alpha) + limit - ratios) ** 2).sum(-1)
    assert found.squares[0] <= squares.min()
    assert found.squares[0] == pytest.approx(squares.min(), rel=0.3)


def test_rows_do_not_change_each_other() -> None:
    rng = np.random.default_rng(0)
    rows = power(TOKENS / BILLION, *SILU[0]) + rng.normal(0, 0.01, (3, 8))
    together = fit(LAWS[POWER], TOKENS, rows)
    for row, ratios in enumerate(rows):
        alone = fit(LAWS[POWER], TOKENS, ratios)
        assert alone.limit[0] == together.limit[row]


def edge_of(name: str, ratios: list[float]) -> str:
    found: Fits = fit(LAWS[name], TOKENS[: len(ratios)], np.array(ratios))
    return found.edge()


def test_a_fit_at_an_end_of_the_law_says_so() -> None:
    rising, falling = [0.2, 0.25, 0.3, 0.35, 0.4], [0.4, 0.35, 0.3, 0.25, 0.2]
    assert edge_of(LOGSPACE, rising) == "the ratio does not fall with training"
    assert edge_of(POWER, falling) == "the ratio does not rise with training"
    # In steps of D's logarithm: neither law comes to a rest.
    assert edge_of(POWER, rising).startswith("no limit can be told: ")
    assert edge_of(LOGSPACE, falling).startswith("no limit can be told: ")


def test_points_that_do_not_make_a_fit() -> None:
    with pytest.raises(ValueError, match="3 points, the law has 4 parameters"):
        fit(LAWS[LOGSPACE], TOKENS[:3], np.array([0.3, 0.2, 0.1]))
    for tokens in (np.full(3, 1e9), np.array([0, 1e9, 2e9])):
        with pytest.raises(ValueError, match="ratios at"):
            fit(LAWS[POWER], tokens, np.array([0.3, 0.2, 0.1]))
