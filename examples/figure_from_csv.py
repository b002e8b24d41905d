#!/usr/bin/env python3
"""Draw retained accuracy and added loss over induced sparsity from curves.csv alone.

    python examples/figure_from_csv.py results/curves.csv curves.svg

Needs pandas and matplotlib, and nothing of this project. A line is a model; columns are sites.
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

MEASURES = {
    "accuracy": ("retained", "retained accuracy"),
    "loss": ("added_loss", "added loss (nats)"),
    "bound": ("added_loss", "added bound of the loss (nats)"),
}


def draw(table: pd.DataFrame, path: str) -> None:
    """Draw every criterion's curves, averaged over the tasks of a kind, into an SVG or PNG file.

    Args:
        table: curves.csv.
        path: the file to write; its ending says which format.
    """
    table = table[(table["status"] == "ok") & (table["task"] != "average")]
    table = table[table["phase"] == "all"]
    kinds = [kind for kind in MEASURES if kind in set(table["kind"])]
    sites = list(table["site"].unique())
    figure, axes = plt.subplots(
        len(kinds), len(sites), squeeze=False, figsize=(3.2 * len(sites), 2.6 * len(kinds))
    )
    for row, kind in zip(axes, kinds, strict=True):
        column, label = MEASURES[kind]
        for axis, site in zip(row, sites, strict=True):
            own = table[(table["kind"] == kind) & (table["site"] == site)]
            for (criterion, model), curve in own.groupby(["criterion", "model"], sort=False):
                mean = curve.groupby("level")[["sparsity", column]].mean().sort_values("sparsity")
                axis.plot(mean["sparsity"], mean[column], marker="o", label=f"{model}, {criterion}")
            axis.set(title=site, xlabel="induced sparsity", ylabel=label)
    axes[0, 0].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: figure_from_csv.py CURVES_CSV FIGURE")
    draw(pd.read_csv(sys.argv[1], dtype={"level": str}), sys.argv[2])
