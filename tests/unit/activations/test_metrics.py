"""The metrics against their definitions, written out the slow way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy, kurtosis

from sparsity_atlas.activations import metrics
from sparsity_atlas.activations.metrics import effective_rank, gini, hoyer, layer_metrics
from sparsity_atlas.activations.quantiles import MagnitudeQuantiles


def matrix(rows: int, columns: int, seed: int = 0, rank: int | None = None) -> np.ndarray:
    draw = np.random.default_rng(seed)
    if rank is None:
        return draw.standard_normal((rows, columns)).astype(np.float32)
    wide = draw.standard_normal((rows, rank)) @ draw.standard_normal((rank, columns))
    return wide.astype(np.float32)


def rank_by_svd(values: np.ndarray) -> float:
    singular = np.linalg.svd(values.astype(np.float64), compute_uv=False)
    return float(np.exp(entropy(singular)))


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (20, 20), (1, 9), (9, 1)])
@pytest.mark.parametrize("block", [8 * 60, 64 * 2**20])
def test_effective_rank_is_that_of_the_svd(
    shape: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_BYTES", block)
    values = matrix(*shape)
    assert effective_rank(values) == pytest.approx(rank_by_svd(values), rel=1e-9)


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(np.eye(12, dtype=np.float32)) == pytest.approx(12)
    assert effective_rank(np.ones((30, 8), dtype=np.float32)) == pytest.approx(1, abs=1e-5)
    assert effective_rank(np.zeros((5, 3), dtype=np.float32)) == 0
    # Singular values 3 and 1: entropy of (3/4, 1/4).
    known = np.diag([3.0, 1.0]).astype(np.float32)
    assert effective_rank(known) == pytest.approx(np.exp(entropy([0.75, 0.25])))


def test_effective_rank_of_a_low_rank_matrix() -> None:
    values = matrix(200, 60, rank=5)
    assert effective_rank(values) == pytest.approx(rank_by_svd(values), rel=1e-3)
    assert effective_rank(values) < 5.01


def test_effective_rank_has_no_scale() -> None:
    values = matrix(40, 12)
    for scale in (1e-15, 1e15):
        scaled = (values * scale).astype(np.float32)
        assert effective_rank(scaled) == pytest.approx(effective_rank(values), rel=1e-5)


ROWS = st.lists(
    st.lists(st.floats(0, 1e6, width=32), min_size=5, max_size=5), min_size=1, max_size=4
).map(lambda rows: np.array(rows, dtype=np.float32))


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_gini_is_the_mean_difference_of_all_pairs(magnitude: np.ndarray) -> None:
    for row, found in zip(magnitude.astype(np.float64), gini(magnitude), strict=True):
        if not row.any():
            assert np.isnan(found)
            continue
        pairs = np.abs(row[:, None] - row[None, :]).sum()
        assert found == pytest.approx(pairs / (2 * len(row) * row.sum()), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_hoyer_by_its_formula(magnitude: np.ndarray) -> None:
    for row, found in zip(magnitude.astype(np.float64), hoyer(magnitude), strict=True):
        # Squares of the smallest floats are too small for float64 as well.
        if row.max() < 1e-100:
            assert np.isnan(found)
            continue
        norm = np.linalg.norm(row, 1) / np.linalg.norm(row, 2)
        assert found == pytest.approx((5**0.5 - norm) / (5**0.5 - 1), abs=1e-9)


def test_gini_and_hoyer_of_known_rows() -> None:
    rows = np.array([[1, 1, 1, 1], [0, 0, 0, 7], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=np.float32)
    np.testing.assert_allclose(gini(rows), [0, 0.75, 0.5, np.nan])
    np.testing.assert_allclose(hoyer(rows), [0, 1, 2 - 2**0.5, np.nan], atol=1e-12)


def test_layer_of_known_values() -> None:
    # Largest of each row 100: near zero is 1 and below. RMS: sqrt(20003 / 8) = 50.0037.
    values = np.array([[100, -1, 0, 1.01], [0, 100, -1, 0]], dtype=np.float32)
    found = layer_metrics(values)
    assert (found["tokens"], found["width"]) == (2, 4)
    assert found["near_zero"] == 5 / 8
    assert found["exact_zero"] == 3 / 8
    assert found["rms"] == pytest.approx(((20000 + 2 + 1.01**2) / 8) ** 0.5)
    assert found["gini"] == pytest.approx(gini(np.abs(values)).mean())
    assert found["hoyer"] == pytest.approx(hoyer(np.abs(values)).mean())
    assert found["effective_rank_share"] == pytest.approx(rank_by_svd(values) / 4)
    assert sum(found["histogram"]) == 5
    expected = np.histogram(
        np.log10(np.abs(values[values != 0]) / found["rms"]), metrics.BIN_EDGES
    )[0]
    assert found["histogram"] == expected.tolist()


@pytest.mark.parametrize("shape", [(53, 11), (11, 53)])
def test_no_more_than_a_block_is_read_at_once(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = matrix(*shape)

    class Stored:
        """Rows of a store with four rows a chunk."""

        chunk = 4

        def __init__(self) -> None:
            self.shape = values.shape

        def __getitem__(self, rows: slice) -> np.ndarray:
            assert rows.start % 4 == 0
            assert rows.stop - rows.start <= 8
            assert rows.stop % 4 == 0 or rows.stop == len(values)
            return values[rows]

    whole = layer_metrics(values)
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 8 * shape[1] * 9)
    for key, value in layer_metrics(Stored()).items():
        assert value == pytest.approx(whole[key], rel=1e-9)
    # A chunk is read as one, whatever its size.
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 1)
    assert layer_metrics(Stored())["near_zero"] == whole["near_zero"]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.maximum(matrix(53, 11), 0)
    values[4] = 0
    whole = layer_metrics(values)
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 8 * 11 * 5)
    for key, value in layer_metrics(values).items():
        assert value == pytest.approx(whole[key], rel=1e-12)


def test_a_row_of_zeros_is_left_out_of_the_means() -> None:
    values = matrix(6, 9)
    with_zeros = np.vstack([values, np.zeros((3, 9), dtype=np.float32)])
    few, many = layer_metrics(values), layer_metrics(with_zeros)
    assert many["gini"] == pytest.approx(few["gini"])
    assert many["hoyer"] == pytest.approx(few["hoyer"])
    assert many["exact_zero"] == 27 / 81


def test_a_layer_of_zeros() -> None:
    found = layer_metrics(np.zeros((4, 3), dtype=np.float32))
    assert found["gini"] is found["hoyer"] is None
    assert found["exact_zero"] == found["near_zero"] == 1
    assert found["effective_rank"] == found["rms"] == sum(found["histogram"]) == 0


def test_signs_kurtosis_and_quantiles_of_known_values() -> None:
    # Mean 0.5, deviations -1.5 0.5 -0.5 1.5: fourth moment 2.5625, variance 1.25.
    values = np.array([[-1, 1, 0, 2]], dtype=np.float32)
    found = layer_metrics(values)
    assert found["at_most_zero"] == 0.5
    assert found["kurtosis"] == pytest.approx(2.5625 / 1.25**2)
    rms = 1.5**0.5
    names = ("quantile_10", "quantile_50", "quantile_90", "quantile_99")
    assert [found[name] for name in names] == pytest.approx([0, 1 / rms, 2 / rms, 2 / rms])


@pytest.mark.parametrize("shift", [0, 3, 1e4])
def test_kurtosis_is_scipys_wherever_the_values_lie(
    shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 8 * 11 * 5)
    values = np.random.default_rng(1).standard_t(5, (53, 11)).astype(np.float32)
    values[:20] *= 2
    values = (values + shift).astype(np.float32)
    expected = kurtosis(values.astype(np.float64), axis=None, fisher=False)
    assert layer_metrics(values)["kurtosis"] == pytest.approx(expected, rel=1e-6)
    assert layer_metrics(np.full((3, 2), 7, dtype=np.float32))["kurtosis"] is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=60),
    st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
)
def test_quantiles_are_those_of_the_sorted_values(
    entries: list[float], shares: list[float]
) -> None:
    values = np.array(entries, dtype=np.float32)
    quantiles = MagnitudeQuantiles(tuple(shares))
    halves = (values[: len(values) // 2], values[len(values) // 2 :])
    for half in halves:
        quantiles.first(half)
    for half in halves:
        quantiles.second(half)
    ordered = np.sort(values)
    expected = [ordered[max(int(np.ceil(share * len(values))), 1) - 1] for share in shares]
    assert quantiles.found() == expected
