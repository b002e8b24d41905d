"""What the report says in words and tables, from the run's tables. No HTML here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sparsity_atlas.criteria.reach import missed
from sparsity_atlas.report.published import PUBLISHED, Published
from sparsity_atlas.statistics.bootstrap import in_percent
from sparsity_atlas.tables.read import HEADLINE_BAR, Tables, in_order, records, site_rank
from sparsity_atlas.terms import AVERAGE, IN_NATS, plain

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """A value with its interval, and what must be known to read it.

    value, interval: as text, in percent; the interval may be empty.
    flags: short marks, explained under the table.
    """

    value: str
    interval: str = ""
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadlineRow:
    """One site of a group."""

    site: str
    ppl: Cell
    critical: Cell
    measured: str
    published: Published | None


@dataclass(frozen=True)
class HeadlineGroup:
    """The rows of one criterion and model."""

    criterion: str
    model: str
    rows: list[HeadlineRow]


def percent(share: float | None) -> str:
    """A share as percent with one decimal and without the sign."""
    return NOTHING if share is None or pd.isna(share) else f"{100 * share:.1f}"


def cell(row: Any) -> Cell:
    """The text of a row of critical_sparsity.csv."""
    if row.relation == "none":
        return Cell("no value")
    sign = {"=": "", ">=": "≥ ", "<": "< "}[row.relation]
    flags = ["of a bound"] if row.kind == "bound" else []
    if not row.resolved:
        flags.append("not resolved")
    if row.non_monotone:
        flags.append("non-monotone")
    interval = ""
    if pd.notna(row.interval_low):
        opened = (row.low_open, row.high_open)
        interval = " to ".join(in_percent(row.interval_low, row.interval_high, 1, opened=opened))
    return Cell(f"{sign}{percent(row.value)}", interval, tuple(flags))


def is_paper_rule(criterion: str, config: dict[str, Any]) -> bool:
    """Whether a criterion is the paper's: top-p of the magnitudes themselves."""
    entry = (config.get("criteria") or {}).get(criterion) or {}
    rule = entry.get("rule") or criterion
    return "file" not in entry and rule == "topp" and entry.get("power", 1) == 1


def headline(tables: Tables, config: dict[str, Any]) -> list[HeadlineGroup]:
    """Every curve's PPL-1% and critical sparsity, by criterion, size and site.

    Args:
        tables: of the run.
        config: content of run_config.yaml, which says what each criterion is.
    """
    source = dict(zip(tables.models["model"], tables.models["source"], strict=True))
    ppl = _by_curve(tables.headline(tables.loss_task()))
    critical = _by_curve(tables.headline(AVERAGE))
    sites = in_order(key[2] for key in {**ppl, **critical})
    groups = []
    for criterion in tables.criteria():
        comparable = is_paper_rule(criterion, config)
        for model in tables.by_size():
            known = PUBLISHED.get(source[model], {}) if comparable else {}
            rows = [
                _headline_row(site, ppl.get(key), critical.get(key), known.get(site))
                for site in sites
                if (key := (criterion, model, site)) in ppl or key in critical
            ]
            if rows:
                groups.append(HeadlineGroup(criterion, model, rows))
    return groups


def _headline_row(
    site: str, ppl: Any | None, critical: Any | None, published: Published | None
) -> HeadlineRow:
    return HeadlineRow(
        site=site,
        ppl=Cell(NOTHING) if ppl is None else cell(ppl),
        critical=Cell(NOTHING) if critical is None else cell(critical),
        measured=NOTHING if critical is None else percent(critical.paper_value),
        published=published,
    )


HEADLINE = ["criterion", "model", "site", "ppl_sparsity", "ppl_interval", "ppl_flags"]
HEADLINE += ["critical_sparsity", "critical_interval", "critical_flags", "largest_measured"]
HEADLINE += ["published", "published_source"]


def headline_records(groups: list[HeadlineGroup]) -> Iterator[dict[str, Any]]:
    """Rows of headline.csv: the table as it is shown, in percent."""
    for group in groups:
        for row in group.rows:
            yield {
                "criterion": group.criterion,
                "model": group.model,
                "site": row.site,
                "ppl_sparsity": row.ppl.value,
                "ppl_interval": row.ppl.interval,
                "ppl_flags": ", ".join(row.ppl.flags),
                "critical_sparsity": row.critical.value,
                "critical_interval": row.critical.interval,
                "critical_flags": ", ".join(row.critical.flags),
                "largest_measured": row.measured,
                "published": row.published.percent if row.published else None,
                "published_source": row.published.source if row.published else None,
            }


def _by_curve(rows: pd.DataFrame) -> dict[tuple[str, str, str], Any]:
    return {(row.criterion, row.model, row.site): row for row in records(rows)}


@dataclass(frozen=True)
class TaskTable:
    """Sparsity at the headline bar of one model: a row a curve, a column a task."""

    tasks: list[str]
    dense: list[str]
    rows: list[tuple[str, str, list[Cell]]]


def task_table(tables: Tables) -> TaskTable:
    """The table of one model's section, from that model's tables."""
    rows = tables.critical_sparsity
    rows = rows[rows["bar"] == HEADLINE_BAR]
    tasks = list(dict.fromkeys(rows["task"]))
    cells = {(row.criterion, row.site, row.task): row for row in records(rows)}
    first = {row.task: row for row in records(rows)}
    curves = list(dict.fromkeys((row.criterion, row.site) for row in records(rows)))
    curves.sort(key=lambda key: (tables.criteria().index(key[0]), site_rank(key[1])))
    return TaskTable(
        tasks=tasks,
        dense=[_dense(first[task]) for task in tasks],
        rows=[
            (
                *curve,
                [cell(cells[*curve, t]) if (*curve, t) in cells else Cell(NOTHING) for t in tasks],
            )
            for curve in curves
        ],
    )


def _dense(row: Any) -> str:
    if pd.isna(row.dense_value):
        return "failed"
    if row.kind in IN_NATS:
        bound = " (bound)" if row.kind == "bound" else ""
        return f"{row.dense_value:.3f} nats{bound}"
    chance = f", chance {percent(row.chance)}" if pd.notna(row.chance) else ""
    return f"{percent(row.dense_value)} %{chance}"


def items(tables: Tables) -> list[str]:
    """Samples of each task in the order of `task_table`, and how many the context or a budget has cut."""
    cut = tables.curves.groupby("task")["unfinished_items"].max()
    rows = tables.critical_sparsity.drop_duplicates("task")
    return [_items(row, cut.get(row.task, 0)) for row in records(rows)]


def _items(row: Any, at_most: float) -> str:
    """A task's samples; `at_most` answers were cut at any of its levels."""
    text = f"{int(row.items):,} samples"
    if row.cut_items:
        text += f", {int(row.cut_items):,} without their beginning"
    if row.windowed_items:
        text += f", {int(row.windowed_items):,} in windows"
    most = max(row.unfinished_items, at_most)
    if most:
        text += f", {int(row.unfinished_items):,} answers cut at their budget of tokens"
        if most > row.unfinished_items:
            text += f" (up to {int(most):,} at a level)"
    return text


def numeric_failures(tables: Tables) -> list[dict[str, str]]:
    """Failed nodes, one row for the levels and tasks that share a reason."""
    keys = ["model", "criterion", "site", "reason"]
    return [
        {
            **dict(zip(keys, map(str, key), strict=True)),
            "levels": ", ".join(dict.fromkeys(rows["level"])),
            "tasks": ", ".join(dict.fromkeys(rows["task"])),
        }
        for key, rows in tables.failures.groupby(keys, sort=False)
    ]


def not_compared(tables: Tables, config: dict[str, Any]) -> list[str]:
    """Pairs of `compare` that the run has one model of, or both and nothing to set side by side; and why.

    Args:
        tables: of the run.
        config: content of run_config.yaml.
    """
    run = {model for block in config.get("run") or () for model in block["models"]}
    pairs = [list(pair) for pair in config.get("compare") or ()]
    shown = tables.twins[["first", "second"]].drop_duplicates().to_numpy().tolist()
    found = []
    for pair in pairs:
        missing = [model for model in pair if model not in run]
        if pair not in shown and len(missing) < len(pair):
            why = f"{missing[0]} is not in this run" if missing else "they have no curve in common"
            found.append(f"{pair[0]} and {pair[1]} ({why})")
    return found


def missed_targets(tables: Tables) -> list[dict[str, str]]:
    """Levels of calibrated criteria that places did not come near, one row a curve and level."""
    rows = tables.layers[tables.layers["target"].notna()]
    found: dict[tuple[str, ...], list[str]] = {}
    for row in records(rows):
        if missed(row.target_of, row.target, row.reached):
            key = (row.model, row.criterion, row.site, row.level, row.target_of)
            place = str(row.layer) if row.tensor == plain(row.site) else f"{row.tensor} {row.layer}"
            found.setdefault(key, []).append(
                f"{place}: {_told(row.target_of, row.reached)} of {_told(row.target_of, row.target)}"
            )
    names = ("model", "criterion", "site", "level", "of")
    return [
        {**dict(zip(names, key, strict=True)), "layers": ", ".join(layers)}
        for key, layers in found.items()
    ]


def _told(of: str, number: float) -> str:
    return f"{percent(number)} %" if of == "sparsity" else f"CETT {number:.3g}"


def sources(groups: list[HeadlineGroup]) -> list[str]:
    """Where the published values of the headline table are from, each once."""
    rows = (row for group in groups for row in group.rows)
    return list(dict.fromkeys(row.published.source for row in rows if row.published))


def split_config(text: str) -> tuple[list[tuple[str, str]], str]:
    """Versions (package, version) from the comments at the top of run_config.yaml, and the rest."""
    lines = text.splitlines()
    head = 0
    while head < len(lines) and lines[head].startswith("#"):
        head += 1
    pairs = [line.lstrip("# ").partition(" ") for line in lines[:head]]
    return [(name, version) for name, _, version in pairs], "\n".join(lines[head:]).strip()
