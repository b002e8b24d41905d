"""Stage `figures`: draw every figure of a run from its tables, as SVG and PNG."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from sparsity_atlas.figures import allocation, comparison, curves, layers, points, scaling, tasks
from sparsity_atlas.figures.style import SUFFIXES, arrange, save, styled
from sparsity_atlas.tables import Tables, read_tables

# Which function draws which figure of the catalogue.
DRAW: dict[str, Callable[[Tables], Figure]] = {
    "ppl_sparsity": points.ppl_sparsity,
    "critical_sparsity": points.critical_sparsity,
    "scaling": scaling.scaling,
    "added_loss": curves.added_loss,
    "retained_accuracy": curves.retained_accuracy,
    "criteria": curves.criteria,
    "comparison": comparison.differences,
    "comparison_error": comparison.output_errors,
    "tasks": tasks.tasks,
    "layer_sparsity": layers.layer_sparsity,
    "sensitivity": allocation.sensitivity,
    "allocation_damage": allocation.damage,
    "allocation": allocation.own_sparsity,
    "output_error": layers.output_error,
    "effective_rank": layers.effective_rank,
    "magnitudes": layers.magnitudes,
}


def draw_all(tables: Tables, folder: Path) -> None:
    """Write every figure into a folder."""
    with styled():
        for name, draw in DRAW.items():
            figure = draw(tables)
            arrange(figure)
            for suffix in SUFFIXES:
                save(figure, folder / f"{name}.{suffix}")


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas figures", description=__doc__)
    parser.add_argument("--tables", required=True, nargs="+", type=Path, help="the run's CSV files")
    parser.add_argument("--output", required=True, type=Path, help="folder for the figures")
    arguments = parser.parse_args()
    draw_all(read_tables(arguments.tables), arguments.output)
