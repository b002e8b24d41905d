"""What zeros would be worth if reading weights were all that a forward pass takes.

The ideal speed-up of a pass over one token is 1 / (1 - share of weight bytes that need not be read); all
weights are taken to have one type. No kernel goes beyond it, and none is measured here.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class Ideal:
    """Ideal speed-ups along one curve.

    Args:
        curve: content of curve.json.
        whole: as `weights_of_a_token` gives it.
    """

    def __init__(self, curve: dict[str, Any], whole: int) -> None:
        self._share = (curve["weights"] or 0) / whole
        self._points: dict[str, list[tuple[float, float]]] = {}
        for row in curve["points"]:
            if row["sparsity"] is not None and row["parameter_sparsity"] is not None:
                point = (row["sparsity"], row["parameter_sparsity"])
                self._points.setdefault(row["task"], []).append(point)

    def of(self, parameter_sparsity: float | None) -> float | None:
        """The ideal speed-up where this share of the weights at the site meets zeros."""
        if parameter_sparsity is None:
            return None
        return 1 / (1 - parameter_sparsity * self._share)

    def at(self, task: str, sparsity: float | None) -> float | None:
        """The same at an induced sparsity of entries, on straight lines between a task's points."""
        points = sorted(self._points.get(task, []))
        if sparsity is None or not points:
            return None
        known, shares = np.array(points).T
        return self.of(float(np.interp(sparsity, known, shares)))
