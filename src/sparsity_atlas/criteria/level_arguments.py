"""The arguments of a stage that say which levels a curve has."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from sparsity_atlas import cli
from sparsity_atlas.files.whole import read_manifest


def add_levels(parser: ArgumentParser) -> None:
    """The arguments that say which levels a curve has."""
    parser.add_argument("--levels", default="", help="comma-separated levels that are listed")
    parser.add_argument(
        "--search", type=cli.optional_path, help="search.json whose levels are taken as well"
    )


def levels_of(arguments: Namespace) -> list[str]:
    """Levels of a curve, each once, from the largest on; see `add_levels`.

    Raises:
        AtlasError: search.json is missing or damaged.
    """
    levels = {level for level in arguments.levels.split(",") if level}
    if arguments.search:
        levels |= {one["level"] for one in read_manifest(arguments.search)["levels"]}
    return sorted(levels, key=float, reverse=True)
