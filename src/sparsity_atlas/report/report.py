"""Stage `report`: results/index.html, one page that opens from disk and loads nothing.

page      from the tables, figures and configuration of a finished run
partial   from whatever a failed or stopped run left, tables and figures included
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from sparsity_atlas import cli
from sparsity_atlas.config import grid
from sparsity_atlas.config.record import render
from sparsity_atlas.config.schema import parse
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.figures import FIGURES, by_layer, score_curves
from sparsity_atlas.figures.draw import draw_all
from sparsity_atlas.figures.style import (
    arrange,
    fewer_colors,
    shows_nothing,
    styled,
    to_screen,
    to_svg,
)
from sparsity_atlas.files.csv import write_csv
from sparsity_atlas.files.whole import write_text
from sparsity_atlas.progress import told, unsaid
from sparsity_atlas.report import beside_published, page
from sparsity_atlas.report.failures import Remains, take_stock
from sparsity_atlas.report.guidelines import guidelines
from sparsity_atlas.report.measured_time import own_points
from sparsity_atlas.speed.speed_table import OK
from sparsity_atlas.tables.read import FILES, Tables, read_tables
from sparsity_atlas.tables.summarize import write_tables

TEMPLATE = Path(__file__).with_name("report.html.j2")
PARTIAL = "partial"
# Of embedded images; with base64 and the rest the page stays below 10 MB.
BUDGET = 6_500_000
# Inches of a figure that a phone shows at a readable size.
PHONE = 4.0
_SVG_WIDTH = re.compile(rb'<svg[^>]* width="([\d.]+)pt"')
# What is drawn for each model's section: heading and function.
MODEL_FIGURES = (
    ("Curves of every task", score_curves.all_tasks),
    ("Induced sparsity by layer", by_layer.layer_sparsity),
)


@dataclass(frozen=True)
class Image:
    """A figure in the page: its heading, its data URI, and what to say about it.

    wide: it needs more than a phone's width and is scrolled there.
    """

    name: str
    title: str
    uri: str
    wide: bool
    caption: str = ""
    tables: str = ""


def data_uri(content: bytes, suffix: str) -> str:
    """An image as a URI that holds it."""
    kind = {"svg": "image/svg+xml", "png": "image/png"}[suffix]
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def run_images(figures: Sequence[Path]) -> Iterator[Image]:
    """The run's figures that show something, in the order of `FIGURES`.

    A large SVG gives way to the PNG beside it.
    """
    given = {path.stem: path for path in figures}
    contents = {name: path.read_bytes() for name, path in given.items() if name in FIGURES}
    shown = [name for name in FIGURES if name in contents and not shows_nothing(contents[name])]
    share = BUDGET / 2 / max(len(shown), 1)
    for name in shown:
        entry, path, content = FIGURES[name], given[name], contents[name]
        width = _SVG_WIDTH.search(content)
        if width is None:
            raise AtlasError(f"{path}: not a figure of ours; delete it and run again")
        if len(content) > share:
            path = path.with_suffix(".png")
            content = fewer_colors(path.read_bytes())
        numbers = ", ".join(f"{table}.csv" for table in entry.tables)
        uri = data_uri(content, path.suffix.removeprefix("."))
        wide = float(width[1]) > PHONE * 72
        yield Image(name, entry.title, uri, wide, entry.caption, numbers)


def model_images(tables: Tables, share: float) -> Iterator[Image]:
    """The figures of one model's section, from that model's tables.

    Args:
        tables: of one model.
        share: bytes that an SVG may have; above it a PNG for the screen stands in.
    """
    for title, draw in MODEL_FIGURES:
        figure = draw(tables)
        arrange(figure)
        content, suffix = to_svg(figure), "svg"
        if len(content) > share:
            content, suffix = to_screen(figure), "png"
        wide = figure.get_figwidth() > PHONE
        yield Image(draw.__name__, title, data_uri(content, suffix), wide)


def build(
    tables: Tables, figures: Sequence[Path], config: str, remains: Remains | None = None
) -> str:
    """The page.

    Args:
        tables: of the run.
        figures: its SVG files, with the PNG files beside them.
        config: text of run_config.yaml.
        remains: what is missing, for a run that did not finish.
    """
    versions, settings = page.split_config(config)
    content = yaml.safe_load(settings) or {}
    groups = page.headline(tables, content)
    sections = []
    with styled():
        for about in told(tables.models.to_dict("records"), "drawn", "models"):
            own = tables.of(about["model"])
            share = BUDGET / 2 / len(MODEL_FIGURES) / len(tables.models)
            sections.append(
                {
                    "about": about,
                    "tasks": page.task_table(own),
                    "items": page.items(own),
                    "images": list(model_images(own, share)),
                }
            )
    images = list(run_images(figures))
    shown = {image.name for image in images}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        loss_task=tables.loss_task(),
        bounds=bool((tables.critical_sparsity["kind"] == "bound").any()),
        groups=groups,
        sources=page.sources(groups),
        images=images,
        left_out=[
            entry.title for name, entry in FIGURES.items() if entry.missed and name not in shown
        ],
        not_compared=page.not_compared(tables, content),
        beside=list(beside_published.shown(tables, content)),
        sections=sections,
        remains=remains,
        numeric=page.numeric_failures(tables),
        missed=page.missed_targets(tables),
        timed=bool((tables.speed["status"] == OK).any()),
        own_points=own_points(tables),
        advised=[one for one in guidelines(tables) if one.advices],
        versions=versions,
        settings=settings,
    )


def whole(
    tables: Tables, figures: Sequence[Path], config: str, output: Path, table: Path, beside: Path
) -> None:
    """Write the page of a finished run, then its tables; clear away a partial run's."""
    write_text(output, build(tables, figures, config))
    _write_tables(tables, config, table, beside)
    shutil.rmtree(output.parent / PARTIAL, ignore_errors=True)


def partial(results: Path, config: dict[str, Any]) -> Remains:
    """Make tables, figures and the page from what a run left.

    Only the page takes its usual place. The rest goes to results/partial, because Snakemake would
    take it for the run's own. Without headline.csv it knows that the page is still to be made.
    """
    parsed = parse(config)
    remains = take_stock(results, parsed)
    folder = results / PARTIAL
    write_tables(
        folder,
        remains.models,
        remains.curves,
        remains.sparsity,
        remains.metrics,
        remains.sensitivity,
        grid.pairs(parsed),
        grid.checkpoints(parsed),
        remains.truthfulness,
        remains.speed,
    )
    tables = read_tables([folder / f"{name}.csv" for name in FILES])
    draw_all(tables, folder / "figures")
    figures = [folder / "figures" / f"{name}.svg" for name in FIGURES]
    settings = render(parsed)
    (results / "headline.csv").unlink(missing_ok=True)
    _write_tables(tables, settings, folder / "headline.csv", folder / "published.csv")
    write_text(results / "index.html", build(tables, figures, settings, remains))
    return remains


def _write_tables(tables: Tables, config: str, headline: Path, beside: Path) -> None:
    """The headline table as the page shows it, and ours beside every published number; in percent."""
    content = yaml.safe_load(config) or {}
    write_csv(beside, beside_published.COLUMNS, beside_published.rows(tables, content))
    groups = page.headline(tables, content)
    write_csv(headline, page.HEADLINE, page.headline_records(groups))


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas report", description=__doc__)
    stages = parser.add_subparsers(dest="what", required=True)
    done = stages.add_parser("page", help="of a finished run")
    done.add_argument("--tables", required=True, nargs="+", type=Path, help="the run's CSV files")
    done.add_argument("--figures", required=True, nargs="+", type=Path, help="its figures as SVG")
    done.add_argument("--config", required=True, type=Path, help="run_config.yaml")
    done.add_argument("--output", required=True, type=Path, help="HTML file to write")
    done.add_argument("--headline", required=True, type=Path, help="CSV file to write")
    done.add_argument("--published", required=True, type=Path, help="CSV file to write")
    rest = stages.add_parser("partial", help="of a run that did not finish")
    rest.add_argument("--results", required=True, type=Path, help="the results folder")
    rest.add_argument(
        "--config", required=True, type=json.loads, help="JSON: the merged configuration"
    )
    arguments = parser.parse_args()

    if arguments.what == "page":
        tables = read_tables(arguments.tables)
        config = arguments.config.read_text(encoding="utf-8")
        outputs = arguments.output, arguments.headline, arguments.published
        whole(tables, arguments.figures, config, *outputs)
        return
    with unsaid():
        remains = partial(arguments.results, arguments.config)
    cli.logger.info(
        "%s: %d of %d curves; %d outputs failed, %d were not started",
        *(arguments.results / "index.html", len(remains.curves), remains.asked),
        *(len(remains.failures), len(remains.not_started)),
    )
