"""CSV files that are whole or absent, written row by row."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsity_atlas.files.whole import write_atomically

# Sums over samples differ in their last digits between numbers of threads; ten digits do not.
DIGITS = 10


def _format(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return format(value, f".{DIGITS}g") if isinstance(value, float) else value


@dataclass(frozen=True)
class Table:
    """A CSV file that rows are added to; None becomes an empty cell."""

    columns: list[str]
    writer: Any

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write some rows."""
        self.writer.writerows([_format(row[name]) for name in self.columns] for row in rows)


def write_side_by_side(
    folder: Path, columns: dict[str, list[str]], fill: Callable[[dict[str, Table]], None]
) -> None:
    """Write several tables while their common source is read once; all of them whole, or none.

    Args:
        folder: of the CSV files.
        columns: by the file's name.
        fill: gets the tables by name and adds the rows.
    """

    def descend(names: list[str], opened: dict[str, Table]) -> None:
        if not names:
            fill(opened)
            return

        def write(temporary: Path) -> None:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(columns[names[0]])
                table = Table(columns[names[0]], writer)
                descend(names[1:], {**opened, names[0]: table})

        write_atomically(folder / names[0], write)

    descend(list(columns), {})


def write_csv(path: Path, columns: list[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write one table."""
    write_side_by_side(
        path.parent, {path.name: columns}, lambda tables: tables[path.name].add(rows)
    )
