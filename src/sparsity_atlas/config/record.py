"""Stage `run_config`: write down the configuration that was run, with the versions that ran it.

It makes every criterion of the run once, so that a bad parameter ends a run at its beginning: Snakemake's
own process must not pay for torch, which that takes.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from sparsity_atlas.config import grid
from sparsity_atlas.config.schema import Config, parse
from sparsity_atlas.criteria import create
from sparsity_atlas.files.whole import write_text

PACKAGES = ("sparsity-atlas", "snakemake", "torch", "transformers", "datasets", "lm-eval", "zarr")


def _version(package: str) -> str:
    """The installed version; the workflow also runs from a checkout that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def render(config: Config) -> str:
    """The file's text: versions as comments, then the configuration with every default."""
    content = config.model_dump(mode="json", exclude_none=True)
    versions = "".join(f"# {package} {_version(package)}\n" for package in PACKAGES)
    return versions + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas run_config", description=__doc__)
    parser.add_argument(
        "--config", required=True, type=json.loads, help="JSON: the merged configuration"
    )
    parser.add_argument("--output", required=True, type=Path, help="YAML file to write")
    arguments = parser.parse_args()

    config = parse(arguments.config)
    for criterion in dict.fromkeys(curve.criterion for curve in grid.curves(config)):
        create(json.loads(grid.criterion_slice(config, criterion)))
    write_text(arguments.output, render(config))
