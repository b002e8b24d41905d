"""Pairs of models side by side: what the second loses more than the first, and where it crosses the bars.

Both are read at equal induced sparsity. Where the two were asked the same documents, whatever template or
tokenizer they were put in, a bootstrap replicate draws the same ones for both, and the difference is paired.
Else the replicates of the second are put in another order, so that nothing is common to both.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsity_atlas.curves.critical import bar_label
from sparsity_atlas.curves.equal_sparsity import read_crossings, read_equal
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.statistics.bootstrap import interval
from sparsity_atlas.terms import AVERAGE

TWINS = ["first", "second", "criterion", "site", "task", "kind", "measure", "at", "label"]
TWINS += ["first_value", "second_value", "difference", "difference_low", "difference_high"]
TWINS += ["relation", "low_open", "high_open", "paired", "note"]

DENSE, SCORE, CRITICAL = "dense", "score", "critical"
ACCURACY = "accuracy"
# Of whose replicates an interval may lie beyond what was measured before its end is called open.
OPEN = 0.025


@dataclass(frozen=True)
class _Curve:
    """What is read of one model's curve.

    Attributes:
        content: of curve.json.
        scores: rows at each (task, sparsity).
        crossings: rows of each (task, bar).
    """

    content: dict[str, Any]
    scores: dict[tuple[str, float], dict[str, Any]]
    crossings: dict[tuple[str, float], dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> _Curve:
        equal = path.with_name("equal_sparsity.parquet")
        return cls(
            read_manifest(path),
            {
                (row["task"], row["sparsity"]): row
                for row in read_equal(equal)
                if row["sparsity_of"] == "entries"
            },
            {(row["task"], row["bar"]): row for row in read_crossings(equal)},
        )

    def kinds(self) -> dict[str, str]:
        """Kind of score of each task, the average last."""
        return {point["task"]: point["kind"] for point in self.content["points"]}

    def same(self, other: _Curve, task: str, what: str) -> bool:
        """Whether both were asked the same documents, or read them in as many tokens.

        Args:
            other: curve.
            task: or the average, which is that of all its tasks.
            what: `documents` or `tokens`.
        """
        tasks = self.accuracies() if task == AVERAGE else {task}
        samples, others = self.content["samples"], other.content["samples"]
        return all(samples[one][what] == others[one][what] for one in tasks)

    def accuracies(self) -> set[str]:
        """The tasks that the average is of."""
        beside = self.content.get("beside", ())
        return {task for task, kind in self.kinds().items() if kind == ACCURACY} - {
            AVERAGE,
            *beside,
        }

    def dense(self, task: str) -> float | None:
        """The untouched model's score."""
        (found,) = (
            point["value"]
            for point in self.content["points"]
            if (point["task"], point["level"]) == (task, "dense")
        )
        value: float | None = found
        return value


def measured_range(curve: dict[str, Any], task: str) -> tuple[float, float]:
    """Smallest and largest sparsity of a task's levels; none lies below the dense model's.

    Args:
        curve: content of curve.json.
        task: with a point at some level.
    """
    sparsities = {
        point["level"]: point["sparsity"]
        for point in curve["points"]
        if point["task"] == task and point["sparsity"] is not None
    }
    start = sparsities.pop("dense", 0.0)
    found = [max(start, sparsity) for sparsity in sparsities.values()]
    return min(found), max(found)


def twin_rows(pairs: Sequence[tuple[str, str]], curves: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Rows of twins.csv: each pair at every criterion and site that both have curves of.

    Args:
        pairs: models; differences are the second's minus the first's.
        curves: curve.json files, with equal_sparsity.parquet beside each.
    """
    known = {path.parts[-4:-1]: path for path in curves}
    for first, second in pairs:
        for model, criterion, site in list(known):
            other = known.get((second, criterion, site))
            if model == first and other is not None:
                key = {"first": first, "second": second, "criterion": criterion, "site": site}
                yield from (
                    {**row, **key} for row in differences(known[model, criterion, site], other)
                )


def differences(first: Path, second: Path, *, same_draws: bool = True) -> Iterator[dict[str, Any]]:
    """Rows of twins.csv, without what names them, of any two curves.

    Differences are the second's minus the first's.

    Args:
        first: curve.json, with equal_sparsity.parquet beside it.
        second: likewise.
        same_draws: whether replicates of the same documents were drawn alike: with the same seed and from the
            same clusters. If not, nothing is paired.
    """
    for row in _rows(_Curve.read(first), _Curve.read(second), same_draws=same_draws):
        yield {**dict.fromkeys(TWINS), "low_open": False, "high_open": False, **row}


def _rows(first: _Curve, second: _Curve, *, same_draws: bool) -> Iterator[dict[str, Any]]:
    others = second.kinds()
    for task, kind in first.kinds().items():
        if task not in others:
            continue
        if task == AVERAGE and first.accuracies() != second.accuracies():
            continue  # of other tasks it is another average
        paired = same_draws and first.same(second, task, "documents")
        alike = kind == others[task]
        about = {
            **{
                "task": task,
                "kind": kind if alike else f"{kind}, {others[task]}",
                "paired": paired,
            },
            "note": _note(first, second, task, kind, others[task]),
        }
        for measure, at, label, row in (
            (DENSE, None, None, _dense(first, second, task) if alike else None),
            *(
                (SCORE, at, None, _score(one, second.scores[task, at], paired=paired))
                for (name, at), one in first.scores.items()
                if alike and name == task and (task, at) in second.scores
            ),
            *(
                (
                    *(CRITICAL, bar, _label(one, second.crossings[task, bar])),
                    _critical(
                        *(one, measured_range(first.content, task)),
                        *(second.crossings[task, bar], measured_range(second.content, task)),
                        paired=paired,
                    ),
                )
                for (name, bar), one in first.crossings.items()
                if name == task and (task, bar) in second.crossings
            ),
        ):
            if row is not None:
                yield {**about, "measure": measure, "at": at, "label": label, **row}


def _label(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Name of the bar of two rows of `read_crossings`: of both, where their scores are of two kinds."""
    labels = (bar_label(one["kind"], one["bar"]) for one in (first, second))
    return ", ".join(dict.fromkeys(labels))


def _note(first: _Curve, second: _Curve, task: str, kind: str, other: str) -> str:
    """What a reader must know of a task's rows."""
    if ACCURACY in (kind, other):
        return ""
    if kind != other:
        return (
            f"a {kind} and a {other} of text are no like numbers: only where each rises is compared"
        )
    if not first.same(second, task, "tokens"):
        return "the two read a text in other tokens, and what a token loses of one is not that of the other"
    return ""


def _dense(first: _Curve, second: _Curve, task: str) -> dict[str, Any]:
    own, other = first.dense(task), second.dense(task)
    return {
        **{"first_value": own, "second_value": other},
        "difference": None if own is None or other is None else other - own,
    }


def _score(first: dict[str, Any], second: dict[str, Any], *, paired: bool) -> dict[str, Any]:
    """Retained accuracy, or added loss, at one sparsity."""
    difference = second["value"] - first["value"]
    own, others = _side_by_side(first, second, paired=paired)
    low, high = interval(difference, others - own) if len(own) else (None, None)
    return {
        **{"first_value": first["value"], "second_value": second["value"]},
        **{"difference": difference, "difference_low": low, "difference_high": high},
        "relation": "=",
    }


def _side_by_side(
    first: dict[str, Any], second: dict[str, Any], *, paired: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Replicates of both, of which those at one place belong together."""
    count = min(len(first["replicates"]), len(second["replicates"]))
    own, others = first["replicates"][:count], second["replicates"][:count]
    if not paired:
        # Draws of one task are made from one stream, and would have something in common.
        rng = np.random.default_rng(zlib.crc32(first["task"].encode()))
        others = rng.permutation(others)
    return own, others


def _critical(
    first: dict[str, Any],
    inside: tuple[float, float],
    second: dict[str, Any],
    others_inside: tuple[float, float],
    *,
    paired: bool,
) -> dict[str, Any]:
    """Critical sparsities at one bar; what lies beyond what was measured stands at its end.

    Args:
        first: row of `read_crossings`.
        inside: smallest and largest sparsity that was measured of it.
        second: of the other model.
        others_inside: likewise.
        paired: whether replicates belong together.
    """
    own, others = (
        np.concatenate([[one["value"]], found])
        for one, found in zip(
            (first, second), _side_by_side(first, second, paired=paired), strict=True
        )
    )
    differences = np.clip(others, *others_inside) - np.clip(own, *inside)
    lower = (others == -np.inf) | (own == np.inf)  # it may be less
    higher = (others == np.inf) | (own == -np.inf)  # it may be more
    relation = (
        "none" if lower[0] and higher[0] else "<=" if lower[0] else ">=" if higher[0] else "="
    )
    found: dict[str, Any] = {
        "first_value": float(np.clip(own[0], *inside)),
        "second_value": float(np.clip(others[0], *others_inside)),
        "relation": relation,
    }
    if relation == "none":
        return found
    found["difference"] = float(differences[0])
    if len(differences) > 1:
        low, high = interval(float(differences[0]), differences[1:])
        found |= {"difference_low": low, "difference_high": high}
        found |= {"low_open": bool(lower[1:].mean() > OPEN)}
        found |= {"high_open": bool(higher[1:].mean() > OPEN)}
    return found
