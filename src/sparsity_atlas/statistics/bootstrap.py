"""Per-sample results of one curve, its level means, and their paired bootstrap replicates."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from sparsity_atlas.terms import AVERAGE, IN_NATS, SCORE_KINDS, Kind

# Elements of one block of resampling weights (float64: 32 MiB), so that memory does not grow
# with replicates x clusters.
_BLOCK = 2**22
# With fewer independent units than this there is no interval: in simulations the 95 % interval from 3
# of them held the truth 73 to 81 times of 100, from 5 87, from 12 89 to 93.
FEWEST_UNITS = 10


@dataclass(frozen=True)
class TaskSamples:
    """One task's samples at L levels and dense, all on the same n samples in the same order.

    value: [L, n], accuracy in [0, 1] or summed loss in nats. A level with any NaN or inf has
        failed numerically: it counts as below every bar.
    weight: [n], 1 for accuracy, the number of predicted tokens for loss. Positive.
    dense: [n], the same metric of the untouched model.
    zeros, entries: [L, n], counts at the sparsified site. A level whose entries are all 0 has an
        unknown sparsity, which only a failed level may have.
    dense_zeros, dense_entries: [n], exact zeros at the same site in the untouched model; without
        them the dense point sits at sparsity 0.
    cluster: [n], ids of what was drawn independently (the template of a generated item); without
        them each sample stands for itself.
    chance: the accuracy of guessing; None for loss, and where guessing is hopeless.
    Raises ValueError on arrays that do not fit together.
    """

    task: str
    kind: Kind
    value: np.ndarray
    weight: np.ndarray
    dense: np.ndarray
    zeros: np.ndarray
    entries: np.ndarray
    dense_zeros: np.ndarray | None = None
    dense_entries: np.ndarray | None = None
    cluster: np.ndarray | None = None
    chance: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in SCORE_KINDS:
            raise ValueError(f"{self.task}: kind {self.kind!r} is none of {', '.join(SCORE_KINDS)}")
        if self.value.ndim != 2 or self.value.shape[1] == 0:
            raise ValueError(f"{self.task}: value {self.value.shape} is not [levels, samples]")
        both, one = self.value.shape, self.value.shape[1:]
        shapes = {"weight": one, "dense": one, "zeros": both, "entries": both}
        shapes |= {"dense_zeros": one, "dense_entries": one, "cluster": one}
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(f"{self.task}: {name} is {array.shape}, value asks for {shape}")
        if (self.dense_zeros is None) != (self.dense_entries is None):
            raise ValueError(f"{self.task}: dense_zeros and dense_entries come together")
        if self.dense_entries is not None and self.dense_entries.sum() == 0:
            raise ValueError(f"{self.task}: the dense model has no counted entries")
        if not (self.weight > 0).all():
            raise ValueError(f"{self.task}: every weight must be positive")
        if self.kind in IN_NATS and self.chance is not None:
            raise ValueError(f"{self.task}: a {self.kind} has no chance level")
        unplaced = (self.entries.sum(axis=1) == 0) & ~self.failed
        if unplaced.any():
            at = int(unplaced.argmax())
            raise ValueError(f"{self.task}: level {at} has scores but no counted entries")

    @property
    def failed(self) -> np.ndarray:
        """[L] bool: the level has a NaN or inf."""
        failed: np.ndarray = ~np.isfinite(self.value).all(axis=1)
        return failed

    @property
    def items(self) -> int:
        """Number of samples."""
        return int(self.value.shape[1])


@dataclass(frozen=True)
class Estimates:
    """Level means of one task (or of the average): row 0 as measured, rows 1.. replicates.

    units: clusters, or samples that stand for themselves; of the task with the fewest.
    step: share of the score that one sample makes up.
    value, sparsity: [1 + B, L]; dense_value, dense_sparsity: [1 + B]; failed: [L].
    value is NaN at a failed level, sparsity is NaN where unknown. With fewer units than FEWEST_UNITS,
    B is 0.
    """

    task: str
    kind: Kind
    items: int
    units: int
    step: float
    chance: float | None
    value: np.ndarray
    sparsity: np.ndarray
    dense_value: np.ndarray
    dense_sparsity: np.ndarray
    failed: np.ndarray

    def first(self, replicates: int) -> Estimates:
        """The same with the first replicates only."""
        names = ("value", "sparsity", "dense_value", "dense_sparsity")
        return replace(self, **{name: getattr(self, name)[: 1 + replicates] for name in names})

    def relative(self) -> np.ndarray:
        """[1 + B, L]: accuracy over dense accuracy, or loss minus dense loss in nats per token.

        A replicate that drew no sample the dense model gets right keeps 1: 0 of 0 is no loss.
        """
        dense = self.dense_value[:, None]
        if self.kind in IN_NATS:
            added: np.ndarray = self.value - dense
            return added
        ratio = np.ones_like(self.value)
        np.divide(self.value, dense, out=ratio, where=dense != 0)
        return ratio


def estimate(samples: TaskSamples, replicates: int, seed: int = 0) -> Estimates:
    """Means and sparsities of every level, as measured and in each bootstrap replicate.

    Levels and dense share the resampled clusters (paired). Of C clusters, C - 1 are drawn: the
    variance of a mean over C draws is (C - 1) / C of the unbiased one, which matters with a few
    dozen templates (Rao and Wu, JASA 83, 1988). The stream depends on seed and task name alone,
    so a task's interval does not change with the tasks beside it.
    """
    levels = samples.value.shape[0]
    value = np.where(samples.failed[:, None], 0.0, samples.value).astype(np.float64)
    dense = samples.dense.astype(np.float64)
    if samples.kind == "accuracy":
        value, dense = value * samples.weight, dense * samples.weight
    none = np.zeros(samples.items)
    dense_zeros = none if samples.dense_zeros is None else samples.dense_zeros
    dense_entries = none if samples.dense_entries is None else samples.dense_entries
    columns = np.vstack(
        [value, samples.zeros, samples.entries, dense, samples.weight, dense_zeros, dense_entries]
    )
    columns = _by_unit(columns, samples.cluster)
    units = columns.shape[1]
    sums = _resampled_sums(columns, replicates, (seed, samples.task))
    value, zeros, entries = (sums[:, i * levels : (i + 1) * levels] for i in range(3))
    dense, weight, dense_zeros, dense_entries = sums[:, 3 * levels :].T

    value = value / weight[:, None]
    value[:, samples.failed] = np.nan
    dense_sparsity = np.zeros(len(sums))
    if samples.dense_zeros is not None:
        dense_sparsity = _ratio(dense_zeros, dense_entries)
    return Estimates(
        task=samples.task,
        kind=samples.kind,
        items=samples.items,
        units=units,
        step=1 / samples.items,
        chance=samples.chance,
        value=value,
        sparsity=_ratio(zeros, entries),
        dense_value=dense / weight,
        dense_sparsity=dense_sparsity,
        failed=samples.failed,
    )


def resampled_shares(
    task: str,
    zeros: np.ndarray,
    entries: np.ndarray,
    cluster: np.ndarray | None,
    replicates: int,
    seed: int,
) -> np.ndarray:
    """Sparsities of any counts of a task's samples, in the draws of its `estimate`.

    Args:
        task: its name.
        zeros: [K, n].
        entries: [K, n].
        cluster: as `TaskSamples` has it.
        replicates: B.
        seed: of the draws.

    Returns:
        [1 + B, K]: as measured, then of each replicate; NaN without entries.
    """
    columns = _by_unit(np.vstack([zeros, entries]), cluster)
    sums = _resampled_sums(columns, replicates, (seed, task))
    return _ratio(sums[:, : len(zeros)], sums[:, len(zeros) :])


def average(tasks: list[Estimates]) -> Estimates:
    """The unweighted mean over accuracy tasks, replicate by replicate.

    A level that failed on one task has failed on average. A task without a chance level adds 0
    to the chance level of the average. Raises ValueError if the tasks differ in their levels.
    """
    if len({len(task.failed) for task in tasks}) != 1:
        raise ValueError(f"tasks of different level counts: {[task.task for task in tasks]}")
    chances = [task.chance for task in tasks]
    rows = min(len(task.value) for task in tasks)

    def mean(name: str) -> np.ndarray:
        found: np.ndarray = np.mean([getattr(task, name)[:rows] for task in tasks], axis=0)
        return found

    return Estimates(
        task=AVERAGE,
        kind="accuracy",
        items=sum(task.items for task in tasks),
        units=min(task.units for task in tasks),
        # As of one task whose mean has the same variance.
        step=sum(task.step for task in tasks) / len(tasks) ** 2,
        chance=None if set(chances) == {None} else sum(c or 0.0 for c in chances) / len(tasks),
        value=mean("value"),
        sparsity=mean("sparsity"),
        dense_value=mean("dense_value"),
        dense_sparsity=mean("dense_sparsity"),
        failed=np.any([task.failed for task in tasks], axis=0),
    )


def percentile_interval(replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """2.5 % and 97.5 % quantiles along axis 0 of [B, ...].

    Always values of the sample, rounded outwards, so that infinite entries (a crossing beyond
    the measured range) are ordered and never averaged.
    """
    low = np.quantile(replicates, 0.025, axis=0, method="lower")
    high = np.quantile(replicates, 0.975, axis=0, method="higher")
    return low, high


def interval(value: float, replicates: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a value, of as many digits as its replicates support.

    Its ends are the percentiles of one drawing of B replicates. Another drawing moves an end about as
    far as the replicates whose ranks lie 1.96 standard deviations of a binomial, sqrt(B p (1 - p)),
    before and behind its own; its last digit is the first of the distance between these two. Ends are
    rounded outwards, and the interval holds the value.

    Args:
        value: as measured.
        replicates: [B]; at least one.

    Returns:
        Low and high end; NaN where a replicate is.
    """
    ordered = np.sort(replicates)  # NaN last
    if np.isnan(ordered[-1]):
        return math.nan, math.nan
    low, high = percentile_interval(ordered)
    return (
        _round_down(min(float(low), value), _spread(ordered, 0.025)),
        -_round_down(-max(float(high), value), _spread(ordered, 0.975)),
    )


def rounded_outwards(low: float, high: float, spread: float) -> tuple[float, float]:
    """Ends of an interval, rounded outwards to the place of the first digit of `spread`."""
    return _round_down(low, spread), -_round_down(-high, spread)


def in_percent(
    low: float, high: float, places: int, *, opened: tuple[bool, bool] = (False, False)
) -> tuple[str, str]:
    """Ends of an interval as people read them: percent, of no more decimals than `places`, outwards.

    Args:
        low: end.
        high: end.
        places: decimals.
        opened: whether the ends lie beyond what was measured, which < and > say.
    """
    ends = rounded_outwards(100 * low, 100 * high, 10.0**-places)
    signs = ("<" if opened[0] else "", ">" if opened[1] else "")
    return f"{signs[0]}{ends[0] + 0.0:g}", f"{signs[1]}{ends[1] + 0.0:g}"


def _spread(ordered: np.ndarray, share: float) -> float:
    """The distance between the replicates that a quantile may lie at, given others."""
    count = len(ordered)
    by = 1.96 * math.sqrt(count * share * (1 - share))
    ends = np.clip([math.floor(share * count - by), math.ceil(share * count + by)], 0, count - 1)
    low, high = ordered[ends]
    return float(high - low)


def _round_down(number: float, spread: float) -> float:
    """To the place of the first digit of `spread`; unchanged where that is 0."""
    # Far below what any sample can make: the rounding of sums that are equal on paper.
    if spread < 1e-12 * max(1.0, abs(number)):
        return float(number)
    places = -math.floor(math.log10(spread))
    # A number that has no more digits than these must not lose one to its binary form.
    return min(
        float(number), round(math.floor(number * 10.0**places + 1e-6) / 10.0**places, places)
    )


def _by_unit(columns: np.ndarray, cluster: np.ndarray | None) -> np.ndarray:
    """Columns [K, n] added up in what is drawn: [K, units]."""
    if cluster is None:
        return columns
    ids, member = np.unique(cluster, return_inverse=True)
    return np.stack([np.bincount(member, column, len(ids)) for column in columns])


def resampled_weights(units: int, replicates: int, key: tuple[int, str]) -> Iterator[np.ndarray]:
    """How often each unit was drawn, float64 [rows, units], block by block of the replicates.

    Args:
        units: that are drawn from; of fewer than FEWEST_UNITS there are no replicates.
        replicates: B.
        key: seed, and the task's name.
    """
    seed, task = key
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    block = max(1, _BLOCK // units)
    for start in range(0, replicates if units >= FEWEST_UNITS else 0, block):
        rows = min(block, replicates - start)
        drawn = rng.integers(units, size=(rows, units - 1))
        drawn += units * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * units)
        yield counts.reshape(rows, units).astype(np.float64)


def _resampled_sums(columns: np.ndarray, replicates: int, key: tuple[int, str]) -> np.ndarray:
    """[1 + B, K]: sums of K columns [K, units] over all units, then over each replicate's draw."""
    weights = resampled_weights(columns.shape[1], replicates, key)
    return np.vstack([columns.sum(axis=1)[None], *(block @ columns.T for block in weights)])


def _ratio(zeros: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """zeros / entries; where a replicate drew no entries, the measured ratio (row 0)."""
    ratio = np.full(zeros.shape, np.nan)
    np.divide(zeros, entries, out=ratio, where=entries != 0)
    return np.where(np.isnan(ratio), ratio[0], ratio)
