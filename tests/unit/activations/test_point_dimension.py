"""Local intrinsic dimension of each point: by hand, neighbour by neighbour, and of known shapes."""

from __future__ import annotations

import numpy as np
import pytest

from sparsity_atlas.activations.dimension import RESAMPLES
from sparsity_atlas.activations.point_dimension import fewest_points, point_dimensions


def near(points: np.ndarray, place: int, among: list[int], k: int) -> list[float]:
    """Distances of a point's k nearest among some, without itself."""
    distances = [float(np.linalg.norm(points[place] - points[j])) for j in among if j != place]
    return sorted(distances)[:k]


def likely(distances: list[float]) -> float:
    return 1 / float(np.mean([np.log(distances[-1] / one) for one in distances[:-1]]))


def extrapolated(points: np.ndarray, k: int, seed: int) -> list[float]:
    """GeoMLE of each point, written out."""
    rng, count = np.random.default_rng(seed), len(points)
    found: list[list[tuple[float, float]]] = [[] for _ in points]
    for _ in range(RESAMPLES):
        kept = sorted(set(rng.integers(count, size=count).tolist()))
        for place in range(count):
            for neighbours in range(k // 2, 2 * k + 1):
                own = near(points, place, kept, neighbours)
                found[place].append((own[-1], likely(own)))
    return [float(np.polyfit(*np.array(one).T, 1)[-1]) for one in found]


def test_by_hand() -> None:
    """On a line: the four nearest of the first point lie at 1, 2, 4 and 8."""
    line = np.array([0.0, 1, 2, 4, 8, *range(16, 40)])[:, None]
    found, _ = point_dimensions(line, 4)
    assert found[0] == pytest.approx(3 / (np.log(8) + np.log(4) + np.log(2)))


def test_point_by_point() -> None:
    # In their own order, in which they are drawn.
    points = np.unique(np.random.default_rng(0).standard_normal((30, 5)), axis=0)
    found, geomle = point_dimensions(points, 6, seed=3)
    wanted = [likely(near(points, place, list(range(30)), 6)) for place in range(30)]
    assert found == pytest.approx(wanted, rel=1e-9)
    assert geomle == pytest.approx(extrapolated(points, 6, 3), rel=1e-6)


def test_copies_are_no_neighbours_and_have_the_same() -> None:
    points = np.random.default_rng(1).standard_normal((40, 4))
    alone = point_dimensions(points, 6)
    doubled = point_dimensions(np.concatenate([points, points[:7]]), 6)
    for one, both in zip(alone, doubled, strict=True):
        assert both.tolist() == [*one, *one[:7]]


def test_of_known_dimensions() -> None:
    for wanted in (1, 3):
        rng = np.random.default_rng(wanted)
        points = rng.standard_normal((500, wanted + 1))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        for found in point_dimensions(points @ rng.standard_normal((wanted + 1, 9)), 20):
            assert float(np.median(found)) == pytest.approx(wanted, rel=0.15)


def test_points_at_one_distance_have_numbers() -> None:
    """The corners of a simplex: no estimate is right, and none is NaN."""
    for found in point_dimensions(np.eye(30), 4):
        assert np.isfinite(found).all()


def test_too_few_points() -> None:
    few = np.random.default_rng(0).standard_normal((fewest_points(6) - 1, 3))
    with pytest.raises(ValueError, match="25 different points, 26 are needed"):
        point_dimensions(np.concatenate([few, few]), 6)
