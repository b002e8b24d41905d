#!/usr/bin/env python3
"""One table over models that differ in their FFN's nonlinearity: loss, zeros, tolerance, reuse.

    snakemake --cores all --configfile workflow/config/activations.yaml
    python examples/activation_functions.py results table.csv

A row a model that has a curve of the criterion (`--criterion`, topp) at `intermediate`; Markdown to
the screen, all columns to the CSV. `loss` is that of the untouched model on the first task that has
one, `zeros` the share of entries that are exactly zero by themselves, `at_most_zero` of the gate
(without one, of what the down projection reads) that of those not above zero. `ppl_1` is the
induced sparsity at which perplexity has risen by 1 %, with its interval. There `unused_8` is the
share of neurons that none of eight consecutive tokens keeps and `reuse` what a token keeps of the
one before it, on straight lines between the levels; `unused_8_exact` and `reuse_exact` are of the
exact zeros. Beside each (in brackets) `independent_...`: what it would be if entries were kept each
by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

TOKENS = 8
SITE = "intermediate"
EXACT = "exact"
HEADLINE = 0.99


def table(results: Path, criterion: str) -> pd.DataFrame:
    """A row a model; shares from 0 to 1, losses in nats a token, NaN for what there is not."""
    frames = {
        name: pd.read_csv(results / f"{name}.csv", dtype={"level": str})
        for name in ("critical_sparsity", "metrics", "masks", "models")
    }
    critical = frames["critical_sparsity"]
    critical = critical[
        (critical["criterion"] == criterion)
        & (critical["site"] == SITE)
        & (critical["kind"] == "loss")
        & (critical["bar"] == HEADLINE)
    ].drop_duplicates("model")
    masks = frames["masks"]
    masks = masks[(masks["criterion"] == criterion) & (masks["site"] == SITE)]
    models = frames["models"].set_index("model")
    rows = []
    for _, row in critical.iterrows():
        model = row["model"]
        metrics = frames["metrics"][frames["metrics"]["model"] == model]
        layers = metrics.groupby("tensor")[["exact_zero", "at_most_zero"]].mean()
        gated = "gate" in models["sites"][model].split()
        read = "gate" if gated else SITE
        crossed = row["value"] if row["relation"] == "=" else np.nan
        rows.append(
            {
                "model": model,
                "activation": models["activation"][model],
                "gated": gated,
                "loss": row["dense_value"],
                "zeros": layers["exact_zero"][SITE],
                "at_most_zero": layers["at_most_zero"].get(read, np.nan),
                "ppl_1": crossed,
                "ppl_1_low": row["interval_low"],
                "ppl_1_high": row["interval_high"],
                **shared(masks[masks["model"] == model], crossed),
            }
        )
    return pd.DataFrame(rows)


def shared(masks: pd.DataFrame, sparsity: float) -> dict[str, float]:
    """What neighbouring tokens share at an induced sparsity, and of exact zeros, of one model's masks."""
    wanted = {"unused_8": ("unused", TOKENS), "reuse": ("reuse", 1)}
    values = {
        name: masks[(masks["quantity"] == quantity) & (masks["at"] == at)].set_index("level")
        for name, (quantity, at) in {"sparsity": ("unused", 1), **wanted}.items()
    }
    levels = values["sparsity"]["value"].drop(EXACT, errors="ignore").sort_values()
    inside = len(levels) > 0 and levels.iloc[0] <= sparsity <= levels.iloc[-1]
    found: dict[str, float] = {}
    for name in wanted:
        for column, ours in (("value", name), ("independent", f"independent_{name}")):
            measured = values[name][column]
            own = measured.reindex(levels.index)
            found[ours] = float(np.interp(sparsity, levels, own)) if inside else np.nan
            found[f"{ours}_{EXACT}"] = measured.get(EXACT, np.nan)
    return found


def markdown(rows: pd.DataFrame) -> str:
    """The table for people: shares in per cent."""
    head = ["model", "FFN", "loss", "exact zeros", "at most zero", "PPL-1%", "unused by 8 tokens"]
    lines = [[*head, "reuse", "exact: unused by 8", "reuse"]]
    lines.append(["---"] * len(lines[0]))

    def percent(value: float, beside: float | None = None) -> str:
        if np.isnan(value):
            return ""
        return f"{100 * value:.1f}" + ("" if beside is None else f" ({100 * beside:.1f})")

    for _, row in rows.iterrows():
        interval = f" ({100 * row['ppl_1_low']:.1f}-{100 * row['ppl_1_high']:.1f})"
        lines.append(
            [
                row["model"],
                f"{row['activation']}, {'gated' if row['gated'] else 'no gate'}",
                f"{row['loss']:.3f}",
                percent(row["zeros"]),
                percent(row["at_most_zero"]),
                percent(row["ppl_1"]) + (interval if np.isfinite(row["ppl_1"]) else ""),
                *(percent(row[name], row[f"independent_{name}"]) for name in ("unused_8", "reuse")),
                *(
                    percent(row[f"{name}_exact"], row[f"independent_{name}_exact"])
                    for name in ("unused_8", "reuse")
                ),
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace(" --- ", "---")


def main() -> None:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    command.add_argument("results", type=Path, help="folder of a run")
    command.add_argument("table", type=Path, nargs="?", help="CSV to write")
    command.add_argument("--criterion", default="topp")
    arguments = command.parse_args()
    rows = table(arguments.results, arguments.criterion)
    if arguments.table is not None:
        rows.to_csv(arguments.table, index=False)
    print(markdown(rows))  # noqa: T201


if __name__ == "__main__":
    main()
