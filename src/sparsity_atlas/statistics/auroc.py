"""Area under the ROC curve: how well a number tells what is right from what is not, with its bootstrap."""

from __future__ import annotations

import numpy as np

from sparsity_atlas.statistics.bootstrap import resampled_weights

# Independent units of either outcome without which there is no interval, as in `bootstrap.FEWEST_UNITS`.
FEWEST_OF_EACH = 10


def auroc(scores: np.ndarray, right: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The chance that a right sample scores higher than a wrong one, ties counting half.

    It is the Mann-Whitney statistic over the number of pairs, of samples that count more than once or not
    at all.

    Args:
        scores: [predictors, samples], finite.
        right: bool [samples].
        weights: [drawings, samples], how often a sample counts.

    Returns:
        [drawings, predictors]; NaN where a drawing has samples of one outcome only.
    """
    found = np.full((len(weights), len(scores)), np.nan)
    of_right, of_wrong = weights * right, weights * ~right
    pairs = of_right.sum(1) * of_wrong.sum(1)
    for number, own in enumerate(scores):
        order = np.argsort(own, kind="stable")
        ranked = own[order]
        firsts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
        there = np.add.reduceat(of_right[:, order], firsts, axis=1)
        beside = np.add.reduceat(of_wrong[:, order], firsts, axis=1)
        below = np.cumsum(beside, axis=1) - beside / 2
        np.divide((there * below).sum(1), pairs, out=found[:, number], where=pairs > 0)
    return found


def resampled_aurocs(
    scores: np.ndarray,
    right: np.ndarray,
    cluster: np.ndarray | None,
    replicates: int,
    key: tuple[int, str],
    among: np.ndarray | None = None,
) -> np.ndarray:
    """`auroc` of some samples as measured and in each replicate of a bootstrap, the same draws for all.

    Args:
        scores: [predictors, samples].
        right: bool [samples].
        cluster: [samples], ids of what is drawn independently; None: each sample by itself.
        replicates: B.
        key: see `resampled_weights`.
        among: bool [samples], of which it is the area; None: all. All are drawn from.

    Returns:
        [1 + B, predictors]. A drawing with one outcome only has the measured value.
    """
    counted = np.ones(len(right)) if among is None else among.astype(np.float64)
    ids = np.arange(len(right)) if cluster is None else cluster
    names, member = np.unique(ids, return_inverse=True)
    blocks = [auroc(scores, right, counted[None])]
    for weights in resampled_weights(len(names), replicates, key):
        blocks.append(auroc(scores, right, weights[:, member] * counted))
    found = np.vstack(blocks)
    return np.where(np.isnan(found), found[0], found)


def units_of_each(right: np.ndarray, cluster: np.ndarray | None) -> tuple[int, int]:
    """Independent units with a right sample, and with a wrong one."""
    ids = np.arange(len(right)) if cluster is None else cluster
    return len(np.unique(ids[right])), len(np.unique(ids[~right]))
