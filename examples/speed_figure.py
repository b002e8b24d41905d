#!/usr/bin/env python3
"""Draw speed-ups of an FFN over sparsity and over tokens from speed.csv alone.

    python examples/speed_figure.py results/zoo-large/speed.csv speed.svg

Needs pandas and matplotlib, and nothing of this project. Columns are sites. Above, one token: the ideal by
bytes, fixed thresholds and ones that are found, with a dot at each of the model's own critical sparsities.
Below, where several numbers of tokens were timed: the speed-up at 50 and 90 % over the tokens that are
decoded together.
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

OVER_TOKENS = (0.5, 0.9)


def draw(table: pd.DataFrame, path: str) -> None:
    """Draw the FFN shape that most layers have into an SVG or PNG file.

    Args:
        table: speed.csv.
        path: the file to write; its ending says which format.
    """
    table = table[table["layers"] == table["layers"].max()]
    table = table[table["width"] == table["width"].iloc[0]]
    sites, tokens = list(table["site"].unique()), sorted(table["tokens"].unique())
    rows = 2 if len(tokens) > 1 else 1
    figure, axes = plt.subplots(
        rows, len(sites), squeeze=False, sharey="row", figsize=(2.6 * len(sites), 2.6 * rows)
    )
    for column, site in enumerate(sites):
        own = table[table["site"] == site]
        fewest = own[own["tokens"] == tokens[0]].sort_values("sparsity")
        one = fewest[fewest["threshold"] == "fixed"]
        above = axes[0, column]
        above.plot(one["sparsity"], one["ideal_speedup"], color="grey", ls=":", label="ideal")
        for color, (threshold, line) in enumerate(fewest.groupby("threshold", sort=False)):
            above.plot(line["sparsity"], line["speedup"], color=f"C{color}", label=threshold)
            dots = line[line["of"] != ""]
            if len(dots):
                above.scatter(dots["sparsity"], dots["speedup"], color=f"C{color}", zorder=3)
        above.axhline(1, color="black", lw=0.5)
        above.set(title=site, xlabel="sparsity", ylim=(0, 4))
        if rows == 1:
            continue
        below = axes[1, column]
        for color, (threshold, group) in enumerate(own.groupby("threshold", sort=False)):
            for style, sparsity in zip(("-", "--"), OVER_TOKENS, strict=True):
                line = group[(group["sparsity"] == sparsity) & (group["of"] == "")]
                label = f"{threshold}, {sparsity:.0%}"
                below.plot(line["tokens"], line["speedup"], f"C{color}{style}", label=label)
        below.axhline(1, color="black", lw=0.5)
        below.set(xlabel="tokens together", xticks=tokens)
    for axis in axes[:, 0]:
        axis.set_ylabel("times as fast as dense")
        axis.legend(fontsize="x-small")
    about = table.iloc[0]
    figure.suptitle(
        f"{about['model']}: FFN {about['hidden']} to {about['width']}, {about['dtype']}, {about['device']}",
        fontsize="medium",
    )
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: speed_figure.py SPEED_CSV FIGURE")
    draw(
        pd.read_csv(sys.argv[1], keep_default_na=False, na_values=[""]).fillna({"of": ""}),
        sys.argv[2],
    )
