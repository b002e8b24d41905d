"""Spearman's rank correlation, with intervals by a bootstrap over clusters of points."""

from __future__ import annotations

import numpy as np


def spearman(values: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each column with a target; NaN where either is constant.

    Args:
        values: [points, columns], finite.
        target: [points], finite.

    Returns:
        [columns].
    """
    from scipy.stats import rankdata  # takes half a second

    ranks = rankdata(np.column_stack([target, values]), axis=0)
    ranks -= ranks.mean(0)
    norms = np.sqrt((ranks**2).sum(0))
    products = ranks[:, 0] @ ranks[:, 1:]
    found = np.full(values.shape[1], np.nan)
    np.divide(products, norms[0] * norms[1:], out=found, where=norms[0] * norms[1:] > 0)
    return found


def intervals(
    values: np.ndarray, target: np.ndarray, cluster: np.ndarray, replicates: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile intervals of `spearman`, over clusters drawn anew with all of their points.

    Args:
        values: [points, columns].
        target: [points].
        cluster: [points], to which cluster a point belongs; best five or more.
        replicates: drawings. Those in which a column or the target is constant tell nothing and are left out.
        seed: of the drawings.

    Returns:
        Ends, [columns] each; NaN where fewer than half of the replicates tell something.
    """
    names = np.unique(cluster)
    members = [np.flatnonzero(cluster == name) for name in names]
    rng = np.random.default_rng(seed)
    drawn = np.full((replicates, values.shape[1]), np.nan)
    for place in range(replicates):
        chosen = np.concatenate([members[one] for one in rng.integers(len(names), size=len(names))])
        drawn[place] = spearman(values[chosen], target[chosen])
    low, high = (np.full(values.shape[1], np.nan) for _ in range(2))
    for column, found in enumerate(drawn.T):
        known = found[~np.isnan(found)]
        if 2 * len(known) >= replicates:
            low[column], high[column] = np.quantile(known, [0.025, 0.975])
    return low, high
