"""Command `compare`: two results folders side by side.

What differs in versions, configuration and in what the nodes depend on (models, code, type); then, of each
curve that both have, PPL-1% and critical sparsities and the second's minus the first's. Where both were
asked the same documents and drew them alike, differences are paired. Nothing is changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.csv import write_csv
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.report.page import NOTHING, percent, split_config
from sparsity_atlas.statistics.bootstrap import in_percent
from sparsity_atlas.tables.read import HEADLINE_BAR
from sparsity_atlas.tables.twins import CRITICAL, TWINS, differences

COLUMNS = ["model", *(name for name in TWINS if name not in ("first", "second"))]
# Of the text; a table of the configuration has them all.
LONGEST_VALUE = 60
RECORD = "run_config.yaml"
MOST_CHANGES = 40
_RULES = {"=": "", ">=": "≥ ", "<=": "≤ "}


class Results:
    """A results folder.

    Attributes:
        path: of the folder.
        curves: curve.json by (model, criterion, site).
        versions: of packages, by name.
        config: what was run; empty where run_config.yaml is not there.
    """

    def __init__(self, path: Path) -> None:
        """Look at a folder.

        Raises:
            AtlasError: it is not there, or holds no curve.
        """
        if not path.is_dir():
            raise AtlasError(f"{path}: no such folder")
        found = sorted(path.glob("*/*/*/curve.json"))
        self.path = path
        self.curves: dict[tuple[str, ...], Path] = {one.parts[-4:-1]: one for one in found}
        if not found:
            raise AtlasError(
                f"{path}: no curve ({{model}}/{{criterion}}/{{site}}/curve.json) in it"
            )
        self.versions: dict[str, str] = {}
        self.config: dict[str, Any] = {}
        record = path / RECORD
        if record.is_file():
            versions, text = split_config(record.read_text(encoding="utf-8"))
            self.versions, self.config = dict(versions), yaml.safe_load(text)

    def nodes(self) -> dict[str, Path]:
        """eval.json of every node, by its path below the folder."""
        patterns = ("*/dense/eval.json", "*/*/*/*/eval.json")
        found = sorted(one for pattern in patterns for one in self.path.glob(pattern))
        return {str(one.parent.relative_to(self.path)): one for one in found}


def flat(value: Any, place: str = "") -> dict[str, str]:
    """Every leaf of a configuration by its dotted place, as JSON."""
    if isinstance(value, dict) and value:
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        items = enumerate(value)
    else:
        return {place: json.dumps(value, ensure_ascii=False, default=str)}
    found: dict[str, str] = {}
    for key, own in items:
        found |= flat(own, f"{place}.{key}" if place else str(key))
    return found


def changes(first: dict[str, str], second: dict[str, str]) -> list[str]:
    """A line for each key that only one has, or both with other values."""
    return [
        f"{key}: {_short(first.get(key, NOTHING))} → {_short(second.get(key, NOTHING))}"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    ]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def node_changes(first: Results, second: Results) -> list[str]:
    """What nodes that both have depend on and what is not the same, with how many nodes it concerns."""
    others, found, common = second.nodes(), Counter[str](), 0
    for name, path in first.nodes().items():
        if name in others:
            common += 1
            runs = (read_manifest(one).get("run") or {} for one in (path, others[name]))
            found.update(changes(*({key: flat(one)[key] for key in flat(one)} for one in runs)))
    return [f"{line} ({count} of {common} nodes)" for line, count in found.most_common()]


def same_draws(first: Results, second: Results) -> bool:
    """Whether both bootstraps drew the same of the same documents; False where it is not recorded."""
    if not (first.config and second.config):
        return False
    drawn = [
        (
            (one.config.get("seed"), one.config.get("replicates")),
            {name: task.get("cluster") for name, task in (one.config.get("tasks") or {}).items()},
        )
        for one in (first, second)
    ]
    (draws, clusters), (other, others) = drawn
    common = clusters.keys() & others.keys()
    return draws == other and all(clusters[name] == others[name] for name in common)


def rows(first: Results, second: Results) -> Iterator[dict[str, Any]]:
    """Rows of the CSV: every difference of each curve that both have."""
    alike = same_draws(first, second)
    for key, path in first.curves.items():
        if key in second.curves:
            model, criterion, site = key
            for row in differences(path, second.curves[key], same_draws=alike):
                yield {**row, "model": model, "criterion": criterion, "site": site}


def text(first: Results, second: Results, found: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of the comparison."""
    yield f"A: {first.path}"
    yield f"B: {second.path}"
    unrecorded = [name for name, one in (("A", first), ("B", second)) if not one.config]
    if unrecorded:
        lacking = (
            f"{' and '.join(unrecorded)} {'have' if len(unrecorded) > 1 else 'has'} no {RECORD}"
        )
        yield (
            f"\nVersions and configuration: not compared, since {lacking}, which a run of everything writes; "
            "what was drawn is not known either, and nothing is paired"
        )
    recorded = (
        ("Versions", changes(first.versions, second.versions)),
        ("Configuration", changes(flat(first.config), flat(second.config))),
    )
    for title, lines in (
        *(() if unrecorded else recorded),
        ("What nodes depend on", node_changes(first, second)),
    ):
        yield f"\n{title}: {'the same' if not lines else ''}".rstrip()
        yield from (f"  {line}" for line in lines[:MOST_CHANGES])
        if len(lines) > MOST_CHANGES:
            yield f"  and {len(lines) - MOST_CHANGES} more"
    for name, own, other in (("A", first, second), ("B", second, first)):
        alone = ["/".join(key) for key in own.curves if key not in other.curves]
        if alone:
            yield f"\nCurves in {name} only: {', '.join(alone)}"
    headline = [row for row in found if row["measure"] == CRITICAL and row["at"] == HEADLINE_BAR]
    common = len(first.curves.keys() & second.curves.keys())
    if not headline:
        none = (
            f"{common} in common, none with a number at the bar of 99 %"
            if common
            else "none in common"
        )
        yield f"\nCurves: {none}."
        return
    same = sum(row["first_value"] == row["second_value"] for row in headline)
    yield (
        f"\nInduced sparsity (%) at the bar of 99 %, or PPL + 1 %: {same} of {len(headline)} are the same to "
        "the last digit"
    )
    header = ("curve", "task", "bar", "A", "B", "B - A", "95 % interval", "")
    yield from _columns([header, *map(_line, headline)])


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    relation = _RULES.get(row["relation"])
    interval = ""
    if row["difference_low"] is not None:
        ends = (row["difference_low"], row["difference_high"])
        interval = " to ".join(in_percent(*ends, 1, opened=(row["low_open"], row["high_open"])))
    remarks = [] if row["paired"] else ["not paired"]
    return (
        "/".join((row["model"], row["criterion"], row["site"])),
        *(row["task"], row["label"]),
        *(percent(row[name]) for name in ("first_value", "second_value")),
        "beyond what was measured"
        if relation is None
        else f"{relation}{percent(row['difference'])}",
        *(interval, "; ".join(filter(None, [*remarks, row["note"]]))),
    )


def _columns(table: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield ("  " + "  ".join(cells)).rstrip()


def main() -> None:
    """Command line of the tool."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas compare", description=__doc__)
    parser.add_argument("first", type=Path, metavar="A", help="results folder")
    parser.add_argument("second", type=Path, metavar="B", help="results folder")
    parser.add_argument("--csv", type=Path, help="CSV file to write, with every difference")
    arguments = parser.parse_args()
    first, second = Results(arguments.first), Results(arguments.second)
    found = list(rows(first, second))
    if arguments.csv is not None:
        write_csv(arguments.csv, COLUMNS, found)
    sys.stdout.write("\n".join(text(first, second, found)) + "\n")
