"""What training makes of sparsity: activation ratios over training tokens, their laws and limits.

training.csv        series × criterion × site × task × bar × checkpoint: the activation ratio, 1 - critical or
                    PPL-p% sparsity, with the level that gives it; and both laws with their bands
training_fits.csv   … × law: its parameters, and the limit that the ratio goes to
training_limits.csv criterion × family × site × task × bar × law: slope of the limits over the models' size,
                    and over their width by depth

Bands and intervals are the outer ends of two bootstraps. One draws documents anew: each replicate has its own
crossing in every checkpoint, paired where they were asked the same documents, and its own fit. The other one
draws residuals: normal ones about the fit, whose variance is the sum of squares over a draw of chi-squared
with points - parameters degrees of freedom, so that few points have wide tails as Student's t has. Where
points are no more than parameters there is no second one, and nothing is resolved; a fit that ends where its
law does has neither.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsity_atlas.config.revisions import Checkpoint
from sparsity_atlas.curves.critical import RESOLVED_WIDTH
from sparsity_atlas.curves.equal_sparsity import read_crossings
from sparsity_atlas.statistics.bootstrap import interval, percentile_interval
from sparsity_atlas.statistics.slopes import SizePoint, fit_slope
from sparsity_atlas.statistics.training_laws import LAWS, LOGSPACE, POWER, Fits, Law, fit
from sparsity_atlas.tables.twins import measured_range
from sparsity_atlas.terms import AVERAGE, IN_NATS

OF = ["series", "criterion", "site", "task", "kind", "bar", "bar_label"]
TRAINING = [
    *OF,
    "law",
    "model",
    "checkpoint",
    "training_tokens",
    "ratio",
    "ratio_low",
    "ratio_high",
]
TRAINING += ["relation", "low_open", "high_open"]
TRAINING += ["crossing_level", "crossing_level_low", "crossing_level_high"]
NUMBERS = ["alpha", "alpha_low", "alpha_high", "c", "b", "limit", "limit_low", "limit_high"]
ABOUT = ["family", "activation", "non_embedding_parameters", "hidden", "layers", "width_by_depth"]
FITS = [
    *OF,
    "law",
    "of_activation",
    "activation_law",
    "points",
    "left_out",
    *NUMBERS,
    "residual",
    "resolved",
    "reason",
]
FITS += ABOUT
LIMITS = ["criterion", "family", "site", "task", "bar", "bar_label", "law", "over"]
LIMITS += ["models", "slope", "intercept", "low", "high", "resolved", "reason"]
# Replicates of each bootstrap, and places where bands are given.
REPLICATES, PLACES = 1000, 40
Ends = Callable[[np.ndarray], tuple[float, ...]]
# Activations as model.json calls them: zero for all that is negative, and the smooth ones that are near it.
# The paper tried relu and silu. A leaky or clipped ReLU, and any other name, is neither's kin here.
RELU_KIN = {"relu", "relu2", "drelu", "fatrelu"}
SILU_KIN = {
    "silu",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "accurategelu",
    "quick_gelu",
}
UNKNOWN = "unknown"
# What limits are set against.
SIZE, WIDTH_BY_DEPTH = "non_embedding_parameters", "width_by_depth"


def law_of(activation: str) -> str:
    """The law that Sparsing Law has for an activation: ReLU's, SiLU's, or that of neither's kin.

    Args:
        activation: as model.json names it.
    """
    return LOGSPACE if activation in RELU_KIN else POWER if activation in SILU_KIN else UNKNOWN


@dataclass(frozen=True)
class Point:
    """One checkpoint's activation ratio at one bar.

    Attributes:
        tokens: that it was trained on.
        ratio: None where its curve does not cross the bar.
        replicates: [B], of the same drawings of documents in each checkpoint.
    """

    tokens: float
    ratio: float | None
    replicates: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """A law through a series' points, as measured and in each replicate of both bootstraps.

    Attributes:
        fits: row 0 as measured, then those of documents, then those of residuals.
        documents: how many of these are of documents.
        residual: root of the residuals' mean square, by degrees of freedom; None without any.
    """

    fits: Fits
    documents: int
    residual: float | None

    def ends(self, values: np.ndarray) -> tuple[float | None, float | None]:
        """The interval of any number of each fit [rows]; None without a bootstrap."""
        return self._outer(values, lambda some: interval(float(values[0]), some))

    def band(self, values: np.ndarray) -> tuple[float | None, float | None]:
        """The same at one place of the law, its ends not rounded: neighbours are to make a line."""
        return self._outer(values, lambda some: tuple(map(float, percentile_interval(some))))

    def _outer(self, values: np.ndarray, ends: Ends) -> tuple[float | None, float | None]:
        drawn = np.split(values[1:], [self.documents])
        found = [ends(some) for some in drawn if len(some)]
        if not found:
            return None, None
        value = float(values[0])
        return min(value, *(one[0] for one in found)), max(value, *(one[1] for one in found))


def fit_points(law: Law, points: list[Point], seed: tuple[int, str] = (0, "")) -> Fitted | str:
    """Fit a law to the points of one series, or say in a line why it cannot be.

    Args:
        law: which.
        points: checkpoints; those without a ratio are left out.
        seed: of the drawings of residuals.
    """
    known = [point for point in points if point.ratio is not None]
    tokens = np.array([point.tokens for point in known])
    places = len(np.unique(tokens))
    if places < law.parameters:
        return f"{places} points, and the law has {law.parameters} parameters"
    measured = np.array([point.ratio for point in known], dtype=np.float64)
    first = fit(law, tokens, measured)
    freedom = places - law.parameters
    residual = float(np.sqrt(first.squares[0] / freedom)) if freedom else None
    if first.edge():
        return Fitted(first, 0, residual)
    count = min(REPLICATES, *(len(point.replicates) for point in known))
    rows = [measured[None], np.array([point.replicates[:count] for point in known]).T]
    if freedom:
        number, name = seed
        rng = np.random.default_rng([number, zlib.crc32(name.encode())])
        spread = np.sqrt(first.squares[0] / rng.chisquare(freedom, REPLICATES))
        noise = spread[:, None] * rng.standard_normal((REPLICATES, len(known)))
        rows.append(first.at(tokens) + noise)
    return Fitted(fit(law, tokens, np.concatenate(rows)), count, residual)


class Training:
    """Collects the crossings of checkpoints, curve by curve, in any order."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint], models: list[dict[str, Any]]) -> None:
        """Begin without any.

        Args:
            checkpoints: the models that are one of a training.
            models: rows of models.csv.
        """
        self._checkpoints = checkpoints
        self._models = {row["model"]: row for row in models}
        self._rows: dict[tuple[Any, ...], list[tuple[dict[str, Any], Point]]] = {}
        self._fits: list[dict[str, Any]] = []

    def add(self, path: Path, curve: dict[str, Any], critical: Iterable[dict[str, Any]]) -> None:
        """One curve of a model; of one that is no checkpoint nothing is read.

        Args:
            path: of its curve.json, with equal_sparsity.parquet beside it.
            curve: its content.
            critical: its rows of critical_sparsity.csv.
        """
        if path.parts[-4] not in self._checkpoints:
            return
        crossings = read_crossings(path.with_name("equal_sparsity.parquet"))
        drawn = {(row["task"], row["bar"]): row["replicates"] for row in crossings}
        for row in critical:
            about = self._checkpoints[row["model"]]
            wanted = row["kind"] in IN_NATS or row["task"] == AVERAGE
            if not wanted or row["relation"] == "none":
                continue
            key = tuple({**row, "series": about.series}[name] for name in OF)
            ends = measured_range(curve, row["task"])
            # Replicates that cross beyond what was measured are put at its end, as an interval's ends are.
            ratios = 1 - np.clip(drawn[row["task"], row["bar"]], *ends)
            value = 1 - row["value"] if row["relation"] == "=" else None
            point = Point(about.tokens, value, ratios)
            self._rows.setdefault(key, []).append((row, point))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of training.csv; afterwards `fits` has its own."""
        self._fits = []
        empty = {**dict.fromkeys(TRAINING), "low_open": False, "high_open": False}
        for key, found in self._rows.items():
            of = dict(zip(OF, key, strict=True))
            found = sorted(found, key=lambda one: one[1].tokens)
            for row, point in found:
                yield {
                    **empty,
                    **of,
                    "law": "",
                    **_measured(row, point, self._checkpoints[row["model"]]),
                }
            points = [point for _, point in found]
            last = self._models[found[-1][0]["model"]]
            for law in LAWS.values():
                fitted = fit_points(law, points, (0, repr(key)))
                self._fits.append(
                    {
                        **dict.fromkeys(FITS),
                        **of,
                        **_fit_row(law, points, fitted),
                        **_about(last, law),
                    }
                )
                if isinstance(fitted, Fitted):
                    tokens = np.array([point.tokens for point in points])
                    for one in _band(fitted, tokens):
                        yield {**empty, **of, "law": law.name, **one}

    @property
    def fits(self) -> list[dict[str, Any]]:
        """Rows of training_fits.csv."""
        return self._fits

    def limits(self) -> Iterator[dict[str, Any]]:
        """Rows of training_limits.csv: every group of two or more trainings of one family."""
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self._fits:
            if row["of_activation"]:
                groups.setdefault(tuple(row[name] for name in LIMITS[:7]), []).append(row)
        for key, rows in groups.items():
            for over in (SIZE, WIDTH_BY_DEPTH) if len(rows) > 1 else ():
                slope = fit_slope([_limit(row, over) for row in rows])
                found = {**asdict(slope), "resolved": slope.resolved}
                yield {**dict(zip(LIMITS[:7], key, strict=True)), "over": over, **found}


def _measured(row: dict[str, Any], point: Point, about: Checkpoint) -> dict[str, Any]:
    """A checkpoint's own row: a share that is active is small where sparsity is large."""
    low, high = row["interval_low"], row["interval_high"]
    levels = ("crossing_level", "crossing_level_low", "crossing_level_high")
    return {
        **{"model": row["model"], "checkpoint": about.revision, "training_tokens": about.tokens},
        "ratio": 1 - row["value"],
        "ratio_low": None if high is None else 1 - high,
        "ratio_high": None if low is None else 1 - low,
        "relation": {"=": "=", ">=": "<=", "<": ">"}[row["relation"]],
        **{"low_open": row["high_open"], "high_open": row["low_open"]},
        **{name: row[name] for name in levels},
    }


def _fit_row(law: Law, points: list[Point], fitted: Fitted | str) -> dict[str, Any]:
    known = sum(point.ratio is not None for point in points)
    row = {"law": law.name, "points": known, "left_out": len(points) - known}
    if isinstance(fitted, str):
        return {**row, "resolved": False, "reason": fitted}
    fits, b = fitted.fits, fitted.fits.b
    low, high = fitted.ends(fits.limit)
    alpha = fitted.ends(fits.alpha)
    reason = fits.edge()
    if not reason and fitted.residual is None:
        reason = "as many points as parameters: the law goes through them whatever they are"
    if not reason and (low is None or high is None or high - low > RESOLVED_WIDTH):
        reason = "the limit's interval is too wide"
    return {
        **row,
        **{"alpha": float(fits.alpha[0]), "alpha_low": alpha[0], "alpha_high": alpha[1]},
        **{"c": float(fits.c[0]), "b": None if b is None or b[0] == -np.inf else float(b[0])},
        **{"limit": float(fits.limit[0]), "limit_low": low, "limit_high": high},
        **{"residual": fitted.residual, "resolved": not reason, "reason": reason},
    }


def _about(model: dict[str, Any], law: Law) -> dict[str, Any]:
    """What the series' models are: columns `ABOUT`, and whether the law is that of their activation."""
    known = law_of(model["activation"])
    size = model.get("active_non_embedding_parameters", model["non_embedding_parameters"])
    return {
        **{name: model[name] for name in ("family", "activation", "hidden", "layers")},
        "non_embedding_parameters": size,
        "width_by_depth": model["hidden"] / model["layers"],
        "of_activation": law.name == known,
        "activation_law": known,
    }


def _band(fitted: Fitted, tokens: np.ndarray) -> Iterator[dict[str, Any]]:
    """A law between its first and last checkpoint, with its band."""
    places = np.geomspace(tokens.min(), tokens.max(), PLACES)
    for place, values in zip(places, fitted.fits.at(places).T, strict=True):
        low, high = fitted.band(values)
        yield {
            **{"training_tokens": float(place), "ratio": float(values[0])},
            **{"ratio_low": low, "ratio_high": high},
        }


def _limit(row: dict[str, Any], over: str) -> SizePoint:
    """A limit that is none, or has no interval, is no point of a slope."""
    told = row["resolved"]
    ends = (row["limit_low"], row["limit_high"]) if told else (None, None)
    return SizePoint(row[over], row["limit"] if told else None, *ends)
