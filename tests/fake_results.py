"""A results folder as a run leaves it, of any shape and made in seconds: all files that tables,
figures and the report read, with plausible numbers from the real estimators."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fake_steps import write_steps
from sparsity_atlas.activations import metrics
from sparsity_atlas.config.revisions import Checkpoint
from sparsity_atlas.curves.critical import BARS, critical
from sparsity_atlas.curves.equal_sparsity import crossing_rows, equal_rows, write_equal
from sparsity_atlas.curves.points import CurvePoint, curve_points, estimate_all
from sparsity_atlas.evaluation.expert_table import COUNTS, NAME, SCHEMA
from sparsity_atlas.evaluation.headed_table import CountTable
from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.files.whole import write_manifest
from sparsity_atlas.statistics.bootstrap import TaskSamples
from sparsity_atlas.studies import output_error, prompt_table, sensitivity
from sparsity_atlas.studies.token_masks import MaskTables
from sparsity_atlas.tables import summarize
from sparsity_atlas.tables.read import Tables, read_tables
from sparsity_atlas.terms import STORED, TENSORS, PlaceKey, plain

LEVELS = ("0.97", "0.9", "0.75", "0.5")
ENTRIES = 1000
LAYERS = 3
# That a token meets at a site: half of a model of a million.
WEIGHTS = 500_000
# Of a mixture, and how many of them a token meets.
EXPERTS, EACH = 8, 2


def write_model(
    folder: Path, parameters: int = 1_000_000, *, active: int = 0, **other: Any
) -> None:
    """model.json."""
    write_manifest(
        folder / "model.json",
        {
            "name": folder.name,
            "source": {"path": f"zoo/{folder.name}"},
            "revision": None,
            "digest": "ab" * 32,
            "architecture": "LlamaForCausalLM",
            "model_type": "llama",
            "kind": "causal",
            "dtype": "bfloat16",
            "parameters": {
                **{"total": 2 * parameters, "non_embedding": parameters},
                "loaded": 2 * parameters,
                **({"active": 2 * active, "active_non_embedding": active} if active else {}),
            },
            "memory": {"vocabulary": 1000, "pieces": True, "heads": 0, "cache": 384},
            "layers": LAYERS,
            "hidden": 64,
            "width": 256,
            "sites": ["input", "up", "gate", "intermediate", "all_inputs"],
            "activation": "silu",
            "ffn": [],
            **other,
        },
    )


def samples(
    task: str,
    kind: str,
    levels: Sequence[str],
    *,
    tolerance: float = 0.5,
    items: int = 300,
    clusters: int | None = None,
    chance: float | None = None,
    dense: float = 0.7,
    failed: Sequence[str] = (),
    seed: int = 0,
) -> TaskSamples:
    """Paired samples of a model that gets worse beyond a sparsity of about `tolerance`."""
    rng = np.random.default_rng(seed)
    sparsity = np.array([(1 - float(level)) ** 0.5 for level in levels])
    damage = (sparsity / tolerance) ** 6 * 0.01
    if kind == "accuracy":
        luck = rng.random(items)
        base = (luck < dense).astype(float)
        value = (luck < dense * (1 - damage[:, None])).astype(float)
        weight = np.ones(items)
    else:
        weight = rng.integers(20, 60, items).astype(float)
        base = weight * rng.normal(4, 0.3, items)
        value = base + weight * (damage[:, None] + rng.normal(0, 0.02, (len(levels), items)))
    for level in failed:
        value[levels.index(level)] = np.nan
    zeros = np.repeat(np.round(sparsity * ENTRIES).astype(np.int64)[:, None], items, axis=1)
    return TaskSamples(
        task=task,
        kind=kind,
        value=value,
        weight=weight,
        dense=base,
        zeros=zeros,
        entries=np.full(zeros.shape, ENTRIES),
        cluster=None if clusters is None else np.arange(items) % clusters,
        chance=chance,
    )


def write_curve(
    folder: Path,
    tasks: Sequence[TaskSamples],
    levels: Sequence[str],
    replicates: int = 100,
    phases: Sequence[str] = (),
) -> None:
    """All files of results/M/C/S, of its nodes only eval.json; `phases` are those of its last task."""
    site = plain(folder.name)
    estimates = estimate_all(tasks, replicates, 0)
    shares = {level: (1 - float(level)) ** 0.5 for level in levels}
    failures = [
        {"level": level, "task": task.task, "reason": "NaN in model.layers.1.mlp"}
        for task in tasks
        for level, value in zip(levels, task.value, strict=True)
        if np.isnan(value).any()
    ]
    write_manifest(
        folder / "curve.json",
        {
            "levels": list(levels),
            "weights": WEIGHTS,
            "points": [
                {**asdict(one), "parameter_sparsity": one.sparsity, "unfinished_items": 0}
                for one in curve_points(estimates, levels)
            ],
            "critical": [asdict(one) for one in critical(estimates, BARS, levels)],
            "layers": {
                level: {
                    tensor: [share * (0.8 + 0.1 * layer) for layer in range(LAYERS)]
                    for tensor in TENSORS[site]
                }
                for level, share in shares.items()
            },
            "scores": {level: {task.task: {} for task in tasks} for level in ("dense", *levels)},
            "cut": {task.task: {"items": 0, "windowed": 0, "unfinished": 0} for task in tasks},
            "samples": {
                task.task: {"items": task.items, "documents": str(task.items), "tokens": "t"}
                for task in tasks
            },
            **_phases(phases, levels, tasks, TENSORS[site]),
            "failures": failures,
        },
    )
    equal = equal_rows(estimates) + crossing_rows(estimates, BARS)
    write_equal(folder / "equal_sparsity.parquet", equal)
    write_manifest(folder / "search.json", {"levels": [{"level": level} for level in levels]})
    for level in levels:
        write_manifest(folder / level / "eval.json", {"tasks": {}})
    rows = [
        {"level": level, "layer": layer, "sparsity": share, "error": share**2 * (1 + layer / 10)}
        for level, share in shares.items()
        for layer in range(LAYERS)
    ]
    write_parquet(folder / "sparsity.parquet", pa.Table.from_pylist(rows, output_error.SCHEMA))
    write_masks(folder, shares, site)
    write_parquet(folder / "prompt_reuse.parquet", prompt_table.SCHEMA.empty_table())
    rows = []
    for level, share in shares.items():
        for tensor in TENSORS[site]:
            for layer in range(LAYERS):
                loss = 0.01 * share**2 * (1 + layer)
                interval = {"added_loss_low": 0.9 * loss, "added_loss_high": 1.1 * loss}
                rows.append(
                    {"level": level, "tensor": tensor, "layer": layer, "sparsity": share}
                    | {"added_loss": loss, **interval}
                )
    write_parquet(folder / "sensitivity.parquet", pa.Table.from_pylist(rows, sensitivity.SCHEMA))


def write_masks(folder: Path, shares: dict[str, float], site: str) -> None:
    """masks.parquet of four sequences of eight tokens."""
    masks = MaskTables(8)
    draw = np.random.default_rng(0).random((4, 8, 64))
    for level, share in shares.items():
        for tensor, layer in itertools.product(TENSORS[site], range(LAYERS)):
            kept = torch.from_numpy(draw >= share * (0.8 + 0.1 * layer))
            masks.add(level, PlaceKey(layer, "ffn", tensor), kept)
    write_parquet(folder / "masks.parquet", masks.table())


def _phases(
    phases: Sequence[str],
    levels: Sequence[str],
    tasks: Sequence[TaskSamples],
    tensors: Sequence[str],
) -> dict[str, Any]:
    """What curve.json says by phase; each is a little sparser than the one before."""
    shares = {level: (1 - float(level)) ** 0.5 for level in levels}
    unknown = dict.fromkeys(one.name for one in fields(CurvePoint))
    points = [
        {**unknown, "task": tasks[-1].task, "kind": tasks[-1].kind, "level": level, "phase": phase}
        | {"status": "ok", "sparsity": share * (0.8 + 0.1 * place), "parameter_sparsity": share}
        | {"unfinished_items": None}
        for place, phase in enumerate(phases)
        for level, share in {"dense": 0.0, **shares}.items()
    ]
    layers = {
        level: {
            phase: {
                tensor: [share * (0.7 + 0.1 * (layer + place)) for layer in range(LAYERS)]
                for tensor in tensors
            }
            for place, phase in enumerate(phases)
        }
        for level, share in shares.items()
    }
    return {"phase_points": points, "phases": layers}


def write_experts(node: Path, tasks: Sequence[str], site: str | None, share: float) -> None:
    """A mixture's node: eval.json and experts.parquet.

    Args:
        node: its folder.
        tasks: their names.
        site: of it; None for the dense baseline.
        share: sparsity of an expert that has a load of its equal share.
    """
    rng = np.random.default_rng(zlib.crc32(str(node).encode()))
    tensors = STORED[2:] if site is None else TENSORS[plain(site)]
    rows = []
    for task, layer, tensor in itertools.product(tasks, range(LAYERS), tensors):
        tokens = rng.multinomial(4000, rng.dirichlet([2.0] * EXPERTS))
        tokens[-1] = 0 if layer == 0 else tokens[-1]
        for expert, count in enumerate(tokens.tolist()):
            own = share * (0.8 + 0.1 * layer + 0.1 * rng.standard_normal() - 0.2 * count / 4000)
            numbers = (count, 64 * count, int(64 * count * min(max(own, 0), 1)))
            unique = {
                f"unique_{name}": number for name, number in zip(COUNTS, numbers, strict=True)
            }
            rows.append(
                {"task": task, "phase": "scoring", "layer": layer, "part": "experts"}
                | {"tensor": tensor, "expert": expert, **unique}
                | dict(zip(COUNTS, numbers, strict=True))
            )
    table = pa.Table.from_pylist(rows, SCHEMA)
    slots = [
        [layer, "experts", tensor, EXPERTS, EACH] for layer in range(LAYERS) for tensor in tensors
    ]
    of_task = {task: table.filter(pc.equal(table["task"], task)) for task in tasks}
    CountTable(slots, dict.fromkeys(tasks, "f"), of_task).write(node / NAME)
    names = {"by_expert": list(tensors), "fingerprints": dict.fromkeys(tasks, "f")}
    write_manifest(node / "eval.json", {"tasks": {}, **names})


def write_metrics(model: Path, site: str) -> None:
    """capture/{site}.json and metrics/{site}.parquet."""
    write_manifest(model / "capture" / f"{site}.json", {"site": site})
    rng = np.random.default_rng(zlib.crc32(f"{model.name} {site}".encode()))
    rows = []
    for tensor in TENSORS[site]:
        for layer in range(LAYERS):
            values = rng.standard_t(3, size=(128, 64)).astype(np.float32)
            rows.append({"tensor": tensor, "layer": layer, **metrics.layer_metrics(values)})
    (model / "metrics").mkdir(exist_ok=True)
    path = model / "metrics" / f"{site}.parquet"
    write_parquet(path, pa.Table.from_pylist(rows, metrics.SCHEMA))


def make_results(
    results: Path,
    models: dict[str, dict[str, Any]],
    *,
    criteria: Sequence[str] = ("topp",),
    sites: Sequence[str] = ("intermediate", "input"),
    levels: Sequence[str] = LEVELS,
    tasks: dict[str, dict[str, Any]] | None = None,
    replicates: int = 100,
    phases: Sequence[str] = (),
) -> Path:
    """Fill a results folder; returns it.

    Args:
        results: the folder.
        models: arguments of `write_model` by name; `tolerance` may be among them, `experts`: true, and
            `steps` of a masked-diffusion model's generations.
        criteria: every model has all of them,
        sites: at all of these
        levels: and at all of these.
        tasks: arguments of `samples` by name; by default one loss and one accuracy task.
        replicates: of the bootstrap.
        phases: of the last task, where it has several.
    """
    chosen = {"prose": {"kind": "loss"}, "pairs": {"kind": "accuracy", "chance": 0.5}}
    tasks = chosen if tasks is None else tasks
    for name, about in models.items():
        about = dict(about)
        tolerance = about.pop("tolerance", 0.5)
        routed = about.pop("experts", False)
        steps = about.pop("steps", 0)
        about |= {"kind": "diffusion"} if steps else {}
        if routed:
            about["ffn"] = [{"layer": layer, "part": "experts"} for layer in range(LAYERS)]
        write_model(results / name, **about)
        write_manifest(results / name / "dense" / "eval.json", {"tasks": {}})
        if routed:
            write_experts(results / name / "dense", list(tasks), None, 0.0)
        for site in sites:
            write_metrics(results / name, plain(site))
            for criterion in criteria:
                seed = zlib.crc32(f"{name} {criterion} {site}".encode())
                bend = tolerance * (1 if site == "intermediate" else 0.8)
                drawn = [
                    samples(task, levels=levels, tolerance=bend, seed=seed, **arguments)
                    for task, arguments in tasks.items()
                ]
                write_curve(results / name / criterion / site, drawn, levels, replicates, phases)
                for level in levels if routed else ():
                    node = results / name / criterion / site / level
                    write_experts(node, list(tasks), site, (1 - float(level)) ** 0.5)
                for level in levels if steps else ():
                    node = results / name / criterion / site / level
                    write_steps(node, list(tasks), site, (1 - float(level)) ** 0.5, LAYERS, steps)
    return results


def result_files(results: Path, last: str = "") -> tuple[list[Path], ...]:
    """What `summarize.write_tables` reads: manifests, curves, sparsities, metrics, sensitivities.

    Args:
        results: the folder.
        last: criterion whose files come last; by default all are in the order of their names.
    """
    patterns = ("*/model.json", "*/*/*/curve.json", "*/*/*/sparsity.parquet", "*/metrics/*.parquet")
    patterns += ("*/*/*/sensitivity.parquet",)
    return tuple(
        sorted(sorted(results.glob(pattern)), key=lambda path: last in path.parts)
        for pattern in patterns
    )


def make_tables(
    results: Path,
    last: str = "",
    pairs: Sequence[tuple[str, str]] = (),
    checkpoints: Mapping[str, Checkpoint] | None = None,
) -> Tables:
    """Write a run's tables, and read them."""
    speed = sorted(results.glob("*/*/*/speed.parquet"))
    files = result_files(results, last)
    summarize.write_tables(results, *files, pairs, checkpoints, speed=speed)
    return read_tables(sorted(results.glob("*.csv")))
