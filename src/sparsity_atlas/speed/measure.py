"""Stage `speed`: what a curve's zeros gain in time on this machine.

The maps of each kind of part, and whole tokens of the model, are timed dense and without the weights that
zeros meet: at 0, 10, ... 90 % and where the curve crosses the headline bar, by thresholds that are found at
each token as the criterion does, and by constants that drop as much. The masks are the model's own over real
text. Times are results of a machine: nothing is continued from them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sparsity_atlas import cli
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.base import Criterion, keeps_by_threshold
from sparsity_atlas.criteria.calibration_file import read_calibration
from sparsity_atlas.criteria.expert_rules import ExpertRules
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.loading.devices import how
from sparsity_atlas.loading.pretrained import load
from sparsity_atlas.models.manifest import from_manifest
from sparsity_atlas.models.token_weights import weights_of_a_token
from sparsity_atlas.speed.speed_table import NO_EXPERTS, OK, SCHEMA, TOKEN
from sparsity_atlas.terms import AVERAGE, DIFFUSION, EXPERTS, PlaceKey, by_projection

if TYPE_CHECKING:
    from sparsity_atlas.speed.text_vectors import Text
    from sparsity_atlas.speed.timed_rows import Point

SHARES = tuple(round(0.1 * step, 1) for step in range(10))
BAR = 0.99
# Tokens that zeros are counted in and maps are given, in sequences of so many at most.
TOKENS, SEQUENCE = 128, 64


def own_points(curve: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Where a curve crosses the headline bar: sparsity and level, by task and bar.

    Of accuracies that of all tasks together. A curve that is never below it has its largest sparsity; one
    that is below it from its first level on has none at which quality is kept.

    Args:
        curve: content of curve.json.
    """
    return {
        f"{row['task']} {row['bar_label']}": (row["value"], row.get("crossing_level"))
        for row in curve["critical"]
        if row["bar"] == BAR
        and row["relation"] in ("=", ">=")
        and (row["kind"] != "accuracy" or row["task"] == AVERAGE)
    }


def nodes_of(curve: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Levels of a curve's nodes and the sparsity that they induced, mean over its tasks."""
    found: dict[str, list[float]] = {}
    for row in curve["points"]:
        if row["level"] != "dense" and row["sparsity"] is not None:
            found.setdefault(row["level"], []).append(row["sparsity"])
    return [(float(level), sum(some) / len(some)) for level, some in found.items()]


def why_not(
    kind: str, criterion: Criterion, bound: Mapping[PlaceKey, Criterion], site: str
) -> str | None:
    """Why a criterion's zeros gain nothing here, in a model of this kind; None: they may."""
    if kind == DIFFUSION:
        return "a denoising pass goes over more tokens than products are made for"
    if by_projection(site):
        return "maps that read one vector have masks of their own, and products share one"
    if all(place.part == EXPERTS for place in bound):
        return NO_EXPERTS
    for rule in bound.values():
        if isinstance(rule, ExpertRules):
            return "each routed expert has a rule of its own"
        if not keeps_by_threshold(rule):
            name = type(criterion).__name__
            return f"{name}: its masks follow from no threshold of one token"
    return None


def rows(
    manifest: dict[str, Any],
    model: Any,
    site: str,
    criterion: Criterion,
    states: Mapping[str, Any] | None,
    curve: Mapping[str, Any],
    ids: Any,
    settings: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Rows of the table, without what is the same in all of them.

    Args:
        manifest: content of model.json.
        model: as loaded.
        site: as paths spell it.
        criterion: the rule.
        states: its calibration.
        curve: content of curve.json.
        ids: int64 [sequences, positions] of text that no calibration looked at.
        settings: contexts and tokens.
    """
    import torch

    from sparsity_atlas.criteria.binding import bind_all
    from sparsity_atlas.sites.find import bind_parts
    from sparsity_atlas.sites.part import chosen
    from sparsity_atlas.speed.part_times import maps_at, part_rows
    from sparsity_atlas.speed.text_vectors import Text
    from sparsity_atlas.speed.timed_rows import refused
    from sparsity_atlas.speed.token_times import Whole, token_rows

    parts, plain_site = chosen(bind_parts(model, manifest["ffn"]), site)
    with torch.no_grad():
        bound = bind_all(criterion, parts, plain_site, states)
    why = why_not(manifest["kind"], criterion, bound, site)
    if why is not None:
        yield from (refused(name, why) for name in ("maps", TOKEN))
        return
    maps, refusals = maps_at(parts, plain_site, bound)
    yield from (refused(*one) for one in refusals)
    length = min(ids.shape[1], SEQUENCE)
    pieces = torch.from_numpy(ids).long()
    text = Text(parts, plain_site, bound, pieces[: -(-TOKENS // length), :length])
    most = max(settings["tokens"])
    if text.tokens < most:
        raise AtlasError(
            f"capture.tokens: {text.tokens} are too few to time {most} tokens together"
        )
    points = points_of(criterion, bound, text, curve)
    for one in maps:
        try:
            yield from part_rows(one, text, points, settings["tokens"], settings["device"])
        except torch.OutOfMemoryError:
            yield refused(one.name, "no memory is left for copies of its maps")
    whole = Whole(model, parts, plain_site, weights_of_a_token(manifest))
    contexts, tokens = settings["contexts"], settings["tokens"]
    yield from token_rows(whole, text, pieces.flatten(), points, contexts, tokens)


def points_of(
    criterion: Criterion, bound: Mapping[PlaceKey, Criterion], text: Text, curve: Mapping[str, Any]
) -> list[Point]:
    """The sparsities at which is timed: shares from the model as it is on, and the curve's own points.

    Args:
        criterion: the rule.
        bound: it at each place.
        text: that its zeros are counted in.
        curve: content of curve.json.
    """
    from sparsity_atlas.speed.text_vectors import Levels
    from sparsity_atlas.speed.timed_rows import Point

    dense = criterion.dense_level
    harshest = max((criterion.lowest, criterion.highest), key=lambda one: abs(one - dense))
    levels = Levels(text, dense, harshest, nodes_of(curve))
    points: list[Point] = []
    for share in SHARES:
        seen = levels.dropping(share)
        # What is zero by itself is not undone: such shares are all the same point.
        if not points or seen is not levels.dense:
            points.append(Point(share, "", seen, bound))
    for name, (value, level) in own_points(curve).items():
        seen = levels.dropping(value) if level is None else levels.at(level)
        points.append(Point(value, name, seen, bound))
    return points


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas speed", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="the model's manifest")
    parser.add_argument("--site", required=True)
    parser.add_argument("--store", required=True, type=Path, help="the Zarr store, for its text")
    parser.add_argument("--criterion", required=True, type=json.loads, help="JSON")
    parser.add_argument(
        "--calibration", type=cli.optional_path, help="calibration of the criterion, if it has one"
    )
    parser.add_argument("--curve", required=True, type=Path, help="the curve's curve.json")
    parser.add_argument(
        "--settings", required=True, type=json.loads, help="JSON: device, dtype, contexts, tokens"
    )
    parser.add_argument("--output", required=True, type=Path, help="Parquet file to write")
    arguments = parser.parse_args()
    from sparsity_atlas.speed.machine import alone

    with alone():
        _measure(arguments)


def _measure(arguments: argparse.Namespace) -> None:
    """Write the table that the command line asks for."""
    settings, site = arguments.settings, arguments.site
    criterion = create(arguments.criterion)
    curve = read_manifest(arguments.curve)
    manifest, checkpoint = from_manifest(arguments.model)
    from sparsity_atlas.sites.available import Available
    from sparsity_atlas.speed.machine import machine

    Available.in_manifest(manifest).check(manifest["name"], site)
    ids = ActivationStore(arguments.store).ids()
    ids = ids[settings["calibration_tokens"] // ids.shape[1] :]
    calibration = arguments.calibration
    states = read_calibration(calibration).states if calibration else None
    import torch

    model = load(checkpoint, **how(settings))
    if model.device.type == "cuda":
        # Of several GPUs the model's own: graphs and kernels go to the current one.
        torch.cuda.set_device(model.device)
    common = machine(settings["device"])
    common["dtype"] = str(model.dtype).removeprefix("torch.")
    found = []
    for row in rows(manifest, model, site, criterion, states, curve, ids, settings):
        found.append({**common, **row})
        if row["status"] != OK:
            cli.logger.info("%s: not timed: %s", row["timed"], row["reason"])
        elif row["of"]:
            cli.logger.info(
                "%s, %d together, %s, %s (%.1f %%): %.2f times as fast as dense, ideal %.2f",
                *(row["timed"], row["tokens"], row["threshold"], row["of"]),
                *(100 * row["sparsity"], row["speedup"], row["ideal_speedup"]),
            )
    write_parquet(arguments.output, pa.Table.from_pylist(found, SCHEMA))
