"""Stage `figures`: draw every figure of a run from its tables, as SVG and PNG."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsity_atlas import cli
from sparsity_atlas.figures.draw import draw_all
from sparsity_atlas.tables import read_tables


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="python -m sparsity_atlas.figures", description=__doc__)
    parser.add_argument("--tables", required=True, nargs="+", type=Path, help="the run's CSV files")
    parser.add_argument("--output", required=True, type=Path, help="folder for the figures")
    arguments = parser.parse_args()
    draw_all(read_tables(arguments.tables), arguments.output)


if __name__ == "__main__":
    cli.run(main)
