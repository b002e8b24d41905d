"""Stage `summarize`: the tables. Every number that a figure shows stands in one of them.

critical_sparsity.csv   model × criterion × site × task × bar: critical and PPL-p% sparsity
curves.csv              … × level (× phase): induced sparsity, score, retained accuracy, added loss
comparison.csv          model × site × task × sparsity × criterion: scores at equal induced sparsity, and
                        their paired differences from the first criterion
twins.csv               pair × criterion × site × task × sparsity or bar: what the second model of a pair
                        loses more than the first, and how much earlier or later it crosses a bar
layers.csv              … × level (× phase) × tensor × layer: induced sparsity under the tasks, and, from the
                        captured text, induced sparsity and FFN-output error; of a calibrated
                        criterion what its level asked of the layer, and what its calibration got
layer_profile.csv       model × criterion × site × tensor × mean sparsity × layer: what each layer drops
                        where all layers together drop so much
metrics.csv             model × tensor × layer (× part × expert): effective rank, Gini, Hoyer, zeros,
                        kurtosis, quantiles of the magnitudes
magnitudes.csv          model × tensor (× part): histogram of log10(|v| / RMS)
output_error.csv        model × criterion × site × level: over the layers, mean induced sparsity
                        and mean, smallest and largest FFN-output error on the captured text
prompt_reuse.csv        model × criterion × site × level × continuation × quantity × place × distance: what a
                        prompt's mask shares with later tokens' own, and what it costs, if asked for
masks.csv               model × criterion × site × level × tensor × quantity × place, on the captured text:
                        neurons that several tokens leave unused, and what neighbours share
inserted.csv            model × criterion × site × level × task: what a text before its prompts does to
                        the score
inserted_gates.csv      model × task × layer × quantity: and to the dense model's gates
allocation.csv          model × criterion × site × tensor × layer × sparsity, of criteria with an
                        allocation: damage of this layer alone at this sparsity, and its own sparsity
                        where this is the target
sensitivity.csv         model × criterion × site × level × tensor × layer: what this layer, sparsified
                        alone, adds to the loss
experts.csv             model × criterion × site × level × task × phase × layer × tensor × expert, of
                        mixtures of experts: tokens that were routed to it, and their induced sparsity
steps.csv               model × criterion × site × level × task × step × layer × tensor × region, of
                        masked-diffusion models' generations: induced sparsity, and the masks'
                        overlap with those of the step before and of step 0
scaling.csv             criterion × family × site × task × bar: slope over log10 of the
                        non-embedding parameters; of mixtures of experts, the active ones
truthfulness.csv        model × task × number of an answer (× tensor × layer, or × node): how well it tells
                        right answers from wrong ones
speed.csv               model × criterion × site × what is timed × context × tokens together × threshold ×
                        sparsity: what the zeros gain in time, on the machine that it names, if asked for
foretelling.csv         measure × criterion × site × cheap number: rank correlation over the models
training.csv            series × criterion × site × task × bar × checkpoint or law: activation ratio over the
                        training tokens; training_fits.csv and training_limits.csv, see `training`
models.csv              one row a model: source, architecture, sizes
failures.csv            every task that failed at a level, and why
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sparsity_atlas.config.revisions import Checkpoint
from sparsity_atlas.config.selection import unfold
from sparsity_atlas.curves.critical import CriticalRow
from sparsity_atlas.curves.points import CurvePoint
from sparsity_atlas.files.csv import Table, write_csv, write_side_by_side
from sparsity_atlas.files.parquet import read_parquet
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.models.token_weights import weights_of_a_token
from sparsity_atlas.speed.speed_table import SPEED, speed_rows
from sparsity_atlas.statistics.slopes import SCALING, Scaling
from sparsity_atlas.tables.allocations import ALLOCATION, allocation_rows
from sparsity_atlas.tables.comparison import COMPARISON, comparison_rows
from sparsity_atlas.tables.experts import EXPERTS, expert_rows
from sparsity_atlas.tables.foretelling import FORETELLING, Foretelling
from sparsity_atlas.tables.ideal import Ideal
from sparsity_atlas.tables.layer_table import ERRORS, LAYERS, captured_rows, error_rows, layer_rows
from sparsity_atlas.tables.mask_summary import MASKS, mask_rows, read_masks
from sparsity_atlas.tables.metric_table import (
    MAGNITUDES,
    METRICS,
    PART,
    magnitude_rows,
    metric_rows,
)
from sparsity_atlas.tables.model_table import (
    ACTIVE,
    CHECKPOINT,
    MODELS,
    SIZES,
    earlier,
    model_rows,
    model_sizes,
)
from sparsity_atlas.tables.steps import STEPS, step_rows
from sparsity_atlas.tables.studies.insertions import GATES, INSERTED, gate_rows, inserted_rows
from sparsity_atlas.tables.studies.profile import PROFILE, profile_rows
from sparsity_atlas.tables.studies.reused_masks import PROMPT_REUSE, reuse_rows
from sparsity_atlas.tables.training import FITS, LIMITS, TRAINING, Training
from sparsity_atlas.tables.twins import TWINS, twin_rows
from sparsity_atlas.terms import AVERAGE, NAMED_PARTS, plain
from sparsity_atlas.truthfulness.truth_table import TRUTHFULNESS, truth_rows


def _key(path: Path) -> dict[str, str]:
    """Model, criterion and site from results/{model}/{criterion}/{site}/<file>."""
    return dict(zip(("model", "criterion", "site"), path.parts[-4:-1], strict=True))


KEY = ["model", "criterion", "site"]
CRITICAL = [*KEY, *SIZES, *(one.name for one in fields(CriticalRow))]
CRITICAL += ["cut_items", "windowed_items", "unfinished_items", "ideal_speedup"]
POINTS = [*KEY, *(one.name for one in fields(CurvePoint)), "parameter_sparsity", "ideal_speedup"]
POINTS += ["unfinished_items"]
SENSITIVITY = [*KEY, "level", "tensor", "layer", "sparsity"]
SENSITIVITY += ["added_loss", "added_loss_low", "added_loss_high"]
FAILURES = [*KEY, "level", "task", "reason"]


def with_active(columns: list[str], sizes: dict[str, dict[str, int]]) -> list[str]:
    """Columns among which models' sizes are, with the active ones where there are some."""
    known = next(iter(sizes.values()), {})
    place = columns.index("layers")
    return [*columns[:place], *(one for one in ACTIVE if one in known), *columns[place:]]


def critical_rows(
    key: dict[str, str], curve: dict[str, Any], sizes: dict[str, dict[str, int]], whole: int
) -> Iterator[dict[str, Any]]:
    """A curve's rows of critical_sparsity.csv.

    Args:
        key: model, criterion and site.
        curve: content of curve.json.
        sizes: as `model_sizes` gives them.
        whole: the model's `weights_of_a_token`.
    """
    ideal = Ideal(curve, whole)
    accuracies = {row["task"] for row in curve["critical"] if row["kind"] == "accuracy"}
    accuracies -= {AVERAGE, *curve.get("beside", ())}
    for row in curve["critical"]:
        tasks = accuracies if row["task"] == AVERAGE else {row["task"]}
        cut = {
            f"{name}_items": sum(curve["cut"][task][count] for task in tasks)
            for name, count in (
                *(("cut", "items"), ("windowed", "windowed")),
                ("unfinished", "unfinished"),
            )
        }
        speedup = ideal.at(row["task"], row["value"])
        yield {**key, **sizes[key["model"]], **row, **cut, "ideal_speedup": speedup}


def point_rows(key: dict[str, str], curve: dict[str, Any], whole: int) -> Iterator[dict[str, Any]]:
    """A curve's rows of curves.csv; arguments as those of `critical_rows`."""
    ideal = Ideal(curve, whole)
    for row in (*curve["points"], *curve["phase_points"]):
        yield {**key, **row, "ideal_speedup": ideal.of(row["parameter_sparsity"])}


def sensitivity_rows(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Rows of sensitivity.csv."""
    from sparsity_atlas.studies.sensitivity import SCHEMAS

    for path in paths:
        for row in read_parquet(path, *SCHEMAS).to_pylist():
            yield {**_key(path), "part": None, **row}


def write_tables(
    folder: Path,
    models: list[Path],
    curves: list[Path],
    sparsity: list[Path],
    metrics: list[Path],
    sensitivity: list[Path],
    pairs: Sequence[tuple[str, str]] = (),
    checkpoints: Mapping[str, Checkpoint] | None = None,
    truthfulness: Sequence[Path] = (),
    speed: Sequence[Path] = (),
) -> None:
    """Write all tables of a run into a folder. One curve is in memory at a time.

    Args:
        folder: where the CSV files go.
        models: manifests of the models; every file of the other lists belongs to one of them.
        curves: curve.json files, with equal_sparsity.parquet beside each.
        sparsity: sparsity.parquet files, with masks.parquet and prompt_reuse.parquet beside each.
        metrics: Parquet files of `metrics`.
        sensitivity: Parquet files of `sensitivity`.
        pairs: models that are set side by side.
        checkpoints: those models that are one of a training; the last one stands for it where models are
            compared by size, or with one another.
        truthfulness: Parquet files of `truthfulness`.
        speed: Parquet files of `speed`.
    """
    checkpoints = checkpoints or {}
    before = earlier(checkpoints)
    sizes = model_sizes(models)
    whole = {path.parent.name: weights_of_a_token(read_manifest(path)) for path in models}
    described = model_rows(models, checkpoints)
    scaling = Scaling({row["model"]: row["family"] for row in described})
    foretelling, training = Foretelling(), Training(checkpoints, described)
    stored = {path.parent: path for path in sparsity}

    def read_curves(tables: dict[str, Table]) -> None:
        for path in curves:
            key, curve = _key(path), read_manifest(path)
            captured = captured_rows(stored[path.parent]) if path.parent in stored else []
            critical = list(critical_rows(key, curve, sizes, whole[key["model"]]))
            tables["critical_sparsity.csv"].add(critical)
            training.add(path, curve, critical)
            if key["model"] not in before:
                foretelling.add_critical(critical)
                for row in critical:
                    scaling.add(row)
            tables["curves.csv"].add(point_rows(key, curve, whole[key["model"]]))
            masks = read_masks(stored[path.parent]) if path.parent in stored else []
            tables["layers.csv"].add(layer_rows(key, curve, captured, masks))
            tables["inserted.csv"].add(inserted_rows(key, curve))
            tables["layer_profile.csv"].add(profile_rows(key, curve["layers"]))
            looks = list(error_rows(key, captured)), list(mask_rows(key, masks))
            foretelling.add_captured((key["model"], key["criterion"], key["site"]), *looks)
            tables["failures.csv"].add({**key, **row} for row in curve["failures"])

    critical = with_active(CRITICAL, sizes)
    columns = {"critical_sparsity.csv": critical, "curves.csv": POINTS, "layers.csv": LAYERS}
    columns |= {"layer_profile.csv": PROFILE, "inserted.csv": INSERTED}
    write_side_by_side(folder, {**columns, "failures.csv": FAILURES}, read_curves)
    errors = (row for path in sparsity for row in error_rows(_key(path), captured_rows(path)))
    parted = any("parts" in read_manifest(path) for path in models)
    write_csv(folder / "output_error.csv", ERRORS + PART[:1] * parted, errors)
    together = (row for path in sparsity for row in mask_rows(_key(path), read_masks(path)))
    write_csv(folder / "masks.csv", MASKS + PART[:1] * parted, together)
    write_csv(folder / "prompt_reuse.csv", PROMPT_REUSE, reuse_rows(sparsity))
    write_csv(folder / "inserted_gates.csv", GATES, gate_rows(models))
    write_csv(folder / "scaling.csv", SCALING, scaling.rows())
    write_csv(folder / "training.csv", TRAINING, training.rows())
    write_csv(folder / "training_fits.csv", FITS, training.fits)
    write_csv(folder / "training_limits.csv", LIMITS, training.limits())
    trained = CHECKPOINT if checkpoints else []
    write_csv(folder / "models.csv", [*with_active(MODELS, sizes), *trained], described)
    measured = metric_rows(metrics)
    named = any(row["part"] in NAMED_PARTS for row in measured)
    write_csv(folder / "metrics.csv", METRICS + PART * named, measured)
    foretelling.add_metrics(measured)
    write_csv(folder / "foretelling.csv", FORETELLING, foretelling.rows())
    write_csv(folder / "magnitudes.csv", MAGNITUDES + PART[:1] * named, magnitude_rows(measured))
    write_csv(folder / "comparison.csv", COMPARISON, comparison_rows(curves, sparsity))
    write_csv(folder / "twins.csv", TWINS, twin_rows(pairs, curves))
    write_csv(folder / "allocation.csv", ALLOCATION, allocation_rows(curves))
    write_csv(folder / "experts.csv", EXPERTS, expert_rows(curves, models))
    write_csv(folder / "truthfulness.csv", TRUTHFULNESS, truth_rows(truthfulness))
    write_csv(folder / "speed.csv", SPEED, speed_rows(speed))
    write_csv(folder / "steps.csv", STEPS, step_rows(curves, models))
    of_one = SENSITIVITY + PART[:1] * parted
    write_csv(folder / "sensitivity.csv", of_one, sensitivity_rows(sensitivity))


def write_summary(path: Path, model: Path, curves: list[Path]) -> None:
    """Write the rows of critical_sparsity.csv of one model's curves."""
    sizes, whole = model_sizes([model]), weights_of_a_token(read_manifest(model))
    rows = (
        row for one in curves for row in critical_rows(_key(one), read_manifest(one), sizes, whole)
    )
    write_csv(path, with_active(CRITICAL, sizes), rows)


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas summarize", description=__doc__)
    stages = parser.add_subparsers(dest="what", required=True)
    one = stages.add_parser("model", help="one model's summary")
    one.add_argument("--model", required=True, type=Path, help="its manifest")
    one.add_argument("--curves", required=True, nargs="*", type=Path, help="its curve.json files")
    one.add_argument("--output", required=True, type=Path, help="CSV file to write")
    every = stages.add_parser("tables", help="all tables of a run")
    every.add_argument("--curves", required=True, help="JSON: the run's curves (see selection.py)")
    every.add_argument(
        "--studies", required=True, help="JSON: the curves whose layers were looked at one by one"
    )
    every.add_argument(
        "--pairs", type=json.loads, default=[], help="JSON: pairs of models to set side by side"
    )
    every.add_argument(
        "--checkpoints",
        type=json.loads,
        default={},
        help="JSON: models that are checkpoints of a training: its name, theirs, and their tokens",
    )
    every.add_argument(
        "--truthfulness",
        type=json.loads,
        default=[],
        help="JSON: models and tasks that were studied",
    )
    every.add_argument(
        "--speed", type=json.loads, default=[], help="JSON: curves that were timed, a key each"
    )
    every.add_argument("--results", required=True, type=Path, help="the results' folder")
    arguments = parser.parse_args()

    if arguments.what == "model":
        write_summary(arguments.output, arguments.model, arguments.curves)
        return
    results, keys = arguments.results, list(unfold(arguments.curves))
    sites = dict.fromkeys((model, plain(site)) for model, _, site in keys)
    write_tables(
        results,
        [results / model / "model.json" for model in dict.fromkeys(key[0] for key in keys)],
        [results.joinpath(*key, "curve.json") for key in keys],
        [results.joinpath(*key, "sparsity.parquet") for key in keys],
        [results / model / "metrics" / f"{site}.parquet" for model, site in sites],
        [results.joinpath(*key, "sensitivity.parquet") for key in unfold(arguments.studies)],
        arguments.pairs,
        {model: Checkpoint(*one) for model, one in arguments.checkpoints.items()},
        [
            results / model / "truthfulness" / f"{task}.parquet"
            for model, task in arguments.truthfulness
        ],
        [results.joinpath(*key, "speed.parquet") for key in arguments.speed],
    )
