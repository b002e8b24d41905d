"""Local intrinsic dimension: of shapes whose dimension is known, and point by point."""

from __future__ import annotations

import numpy as np
import pytest

from sparsity_atlas.activations import dimension as module
from sparsity_atlas.activations.dimension import MANY, NEIGHBOURS, dimension, sample
from sparsity_atlas.activations.metrics import layer_metrics
from sparsity_atlas.activations.store import Rows


def sphere(dimensions: int, count: int = 600, ambient: int = 30) -> np.ndarray:
    """Points on a sphere that has no edge, turned into a wider space."""
    rng = np.random.default_rng(dimensions)
    points = rng.standard_normal((count, dimensions + 1))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    turned, _ = np.linalg.qr(rng.standard_normal((ambient, dimensions + 1)))
    return points @ turned.T


def brute(points: np.ndarray) -> float:
    """The mean inverse of Levina and Bickel's estimates, written out."""
    inverses = []
    for place, point in enumerate(points):
        others = np.delete(points, place, axis=0)
        near = np.sort(np.linalg.norm(others - point, axis=1))[:NEIGHBOURS]
        inverses.append(np.mean([np.log(near[-1] / one) for one in near[:-1]]))
    return 1 / float(np.mean(inverses))


def test_point_by_point() -> None:
    points = sphere(3, count=80)
    assert dimension(points).mle == pytest.approx(brute(points), rel=1e-9)


@pytest.mark.parametrize(("dimensions", "off"), [(1, 0.08), (2, 0.08), (4, 0.12)])
def test_of_known_dimensions(dimensions: int, off: float) -> None:
    found = dimension(sphere(dimensions))
    assert found.mle == pytest.approx(dimensions, rel=off)
    assert found.geomle == pytest.approx(dimensions, rel=2 * off)


def test_the_extrapolation_takes_away_what_an_edge_does() -> None:
    inside = np.random.default_rng(0).random((600, 5))
    found = dimension(inside)
    assert found.mle is not None
    assert found.geomle is not None
    assert found.mle < 4.5
    assert abs(found.geomle - 5) < abs(found.mle - 5)


def test_size_and_place_do_not_matter_and_copies_count_once() -> None:
    points = sphere(2, count=200)
    found = dimension(points)
    moved = dimension(1e6 * points + 5)
    assert (moved.mle, moved.geomle) == pytest.approx((found.mle, found.geomle), rel=1e-4)
    copied = dimension(np.concatenate([points, points[:50]]))
    assert copied == found
    assert found.points == 200


def test_an_extrapolation_below_zero_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates that grow faster than the distance leave nothing at no distance."""
    monkeypatch.setattr(module, "_mle", lambda near, k: float(k))
    found = dimension(sphere(10, count=100))
    assert found.mle == NEIGHBOURS
    assert found.geomle is None


def test_too_few_points_have_none() -> None:
    assert dimension(sphere(2, count=MANY + 1)) == (None, None, MANY + 1)
    assert dimension(np.zeros((500, 3))) == (None, None, 1)


def test_a_sample_is_spread_over_all_and_read_by_chunks() -> None:
    values = np.arange(53 * 2, dtype=np.float32).reshape(53, 2)

    class Stored(Rows):
        chunk, shape = 8, values.shape

        def __init__(self) -> None:
            pass

        def __getitem__(self, rows: slice) -> np.ndarray:
            assert rows.start % 8 == 0
            assert rows.stop - rows.start <= 8
            return values[rows]

    expected = values[[0, 13, 26, 39, 52]]
    np.testing.assert_array_equal(sample(values, 5), expected)
    np.testing.assert_array_equal(sample(Stored(), 5), expected)
    np.testing.assert_array_equal(sample(values, 100), values)


def test_a_layer_has_it_where_it_is_asked_for() -> None:
    values = sphere(2, count=300).astype(np.float32)
    found = layer_metrics(values, 200)
    assert found["lid"] == dimension(sample(values, 200)).mle
    assert found["lid"] == pytest.approx(2, rel=0.15)
    assert "lid" not in layer_metrics(values)
