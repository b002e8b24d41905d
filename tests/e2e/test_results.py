"""docs/results.md says what a run's files hold, and others can read them with it."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray

from checkout import ROOT, Checkout
from sparsity_atlas.activations.store import ActivationStore

# A file of the smoke run for the names in a documented path.
NAMES = {"model": "zoo-small", "criterion": "topk", "site": "intermediate", "level": "0.9"}
SEARCHED = {**NAMES, "criterion": "topp"}
# Which that run has not; the tests of these tables look at them.
OF_OTHERS = {
    f"{{model}}/{{criterion}}/{{site}}/{{level}}/{name}.parquet"
    for name in ("experts", "steps", "texts")
} | {"{model}/answers/{task}.parquet", "{model}/dense/gates.parquet"}
OF_OTHERS.add("{model}/{criterion}/{site}/speed.parquet")


def documented() -> dict[str, set[str]]:
    """First column of each section's table, by the file that is the section's title."""
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    sections = re.split(r"^### `([^`]+)`\n", text, flags=re.MULTILINE)[1:]
    tables = dict(zip(sections[::2], sections[1::2], strict=True))
    found = {
        path: set(re.findall(r"^\| `([^`]+)` \|", table.split("\n## ")[0], re.MULTILINE))
        for path, table in tables.items()
    }
    return {path: names for path, names in found.items() if names}


def keys(content: Any, path: str) -> set[str]:
    """Keys that a JSON value has at a path such as `tasks.*`."""
    values = [content]
    for step in filter(None, re.split(r"\.|(?=\[\])", path)):
        if step == "[]":
            values = [item for value in values for item in value]
        elif step == "*":
            values = [item for value in values for item in value.values()]
        else:
            values = [value[step] for value in values]
    return {key for value in values for key in value}


def test_every_kind_of_file_is_documented(smoke: Checkout) -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for path in smoke.contents():
        if "activations.zarr" in path or path.startswith("figures/"):
            continue
        kind = path.replace("zoo-small/", "{model}/")
        kind = re.sub(r"/(topp|topk)/(intermediate|input)/", "/{criterion}/{site}/", kind)
        kind = re.sub(r"/(intermediate|input)\.", "/{site}.", kind)
        kind = re.sub(r"\{site\}/[\d.]+/", "{site}/{level}/", kind)
        assert f"`{kind}`" in text


@pytest.mark.parametrize("path", sorted(documented().keys() - OF_OTHERS))
def test_columns_and_keys(smoke: Checkout, path: str) -> None:
    named = documented()[path]
    chosen = SEARCHED if path.endswith("search.json") else NAMES
    file = smoke.results / path.format(**chosen)
    if file.suffix == ".csv":
        with file.open(newline="") as opened:
            assert set(next(csv.reader(opened))) == named
    elif file.suffix == ".parquet":
        assert set(pq.read_schema(file).names) == named
    else:
        content = json.loads(file.read_text())
        parents = {name.rpartition(".")[0] for name in named}
        for parent in parents:
            listed = {
                name.rpartition(".")[2] for name in named if name.rpartition(".")[0] == parent
            }
            assert keys(content, parent) == listed, parent


def test_the_store_opens_with_xarray(smoke: Checkout) -> None:
    path = smoke.results / "zoo-small/activations.zarr"
    opened = xarray.open_zarr(path, group="input", consolidated=False)
    layer = opened["layer_000"]
    assert layer.dims == ("token", "channel")
    assert np.array_equal(layer.values, ActivationStore(path).read("input", 0))


def test_a_figure_from_the_tables_alone(smoke: Checkout, tmp_path: Path) -> None:
    figure = tmp_path / "curves.svg"
    command = [sys.executable, "-I", ROOT / "examples/figure_from_csv.py"]
    subprocess.run([*command, smoke.results / "curves.csv", figure], check=True, cwd=tmp_path)
    drawn = figure.read_text()
    # An axis for each site; a line for each curve, with a marker for each level and for dense.
    assert drawn.count('<g id="axes_') == 2
    assert len(re.findall(r'<g id="line2d_\d+">\n {4}<path d="[^"]+" clip-path', drawn)) == 3
