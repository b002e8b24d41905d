"""What becomes of a task's run: rows of the sample table, and its entry in eval.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sparsity_atlas.evaluation.samples import SCHEMA
from sparsity_atlas.tasks.score import choose_metric, sample_values
from sparsity_atlas.terms import ACCOUNTS, PHASES

if TYPE_CHECKING:
    from sparsity_atlas.evaluation.samples import SampleTable
    from sparsity_atlas.lm.forward import Abilities
    from sparsity_atlas.lm.usage import Usage
    from sparsity_atlas.sparsify.counted_vectors import Slot
    from sparsity_atlas.tasks.loaded import LoadedTask
    from sparsity_atlas.tasks.prepared import Prepared


def sample_rows(task: LoadedTask, prepared: Prepared, usage: Usage) -> pa.Table:
    """A task's rows of the sample table, in the order of leaf and document.

    Args:
        task: the task.
        prepared: after the run.
        usage: `AtlasLM.usage` after the run.
    """
    names = sorted(prepared.leaves)
    place = {document: row for row, document in enumerate(usage.documents)}
    keys = [(name, i) for name in names for i in range(len(prepared.leaves[name].documents))]
    order = np.array([place[key] for key in keys])
    columns: dict[str, Any] = {
        "task": pa.array([task.name] * len(keys)),
        "leaf": pa.array([name for name, _ in keys]),
        "doc_id": pa.array([number for _, number in keys], pa.int64()),
        "doc_hash": pa.array([one for name in names for one in prepared.hashes[name]]),
        "cluster": pa.array(
            [one for name in names for one in prepared.clusters[name]], pa.string()
        ),
        "metrics": pa.array(
            [one for name in names for one in _metrics(prepared.leaves[name].metrics)],
            SCHEMA.field("metrics").type,
        ),
        "nats": pa.array(usage.nats[order]),
        "predicted": pa.array(usage.predicted[order]),
        "cut_tokens": pa.array(usage.cut[order]),
        "unfinished": pa.array(usage.unfinished[order]),
        "windows": pa.array(usage.windows[order]),
    }
    for account, zeros in usage.zeros.items():
        tokens = usage.tokens[account][order]
        columns[f"{account}_tokens"] = pa.array(tokens)
        columns[f"{account}_zeros"] = _lists(zeros[order] if tokens.any() else zeros[order, :0])
    return pa.table(columns, schema=SCHEMA)


def _metrics(by_filter: dict[str, list[dict[str, Any]]]) -> list[list[tuple[str, float]]]:
    """Of each document its numbers, by "metric,filter"."""
    return [
        [
            (f"{metric},{name}", float(value))
            for name, found in zip(by_filter, of_document, strict=True)
            for metric, value in found.items()
            # Weighted metrics (a log-likelihood over its words) are pairs; nats and predicted say more.
            if _is_number(value)
        ]
        for of_document in zip(*by_filter.values(), strict=True)
    ]


def _is_number(value: Any) -> bool:
    """Whether a metric is one number; code of a task's own may leave it in a tensor."""
    return (
        isinstance(value, int | float | np.number | np.bool_) or getattr(value, "shape", None) == ()
    )


def _lists(values: np.ndarray) -> pa.Array:
    """A column of lists from an array [rows, length]."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))


def task_result(
    prepared: Prepared, outcome: dict[str, Any], usage: Usage, slots: list[Slot]
) -> dict[str, Any]:
    """What eval.json says of a task.

    Args:
        prepared: the task, after the run.
        outcome: what `lm_eval.evaluator.evaluate` returned.
        usage: `AtlasLM.usage` after the run.
        slots: what was counted.
    """
    kinds = sorted({leaf.OUTPUT_TYPE for leaf in prepared.leaves.values()})
    scores = {**outcome["results"], **outcome.get("groups", {})}
    result: dict[str, Any] = {
        "status": "ok",
        "items": len(usage.documents),
        "output_types": kinds,
        "leaves": sorted(prepared.leaves),
        "chance": prepared.chance,
        "mislabelled": prepared.mislabelled,
        "scores": {name: _numbers(scores[name]) for name in sorted(scores)},
        "higher_is_better": outcome["higher_is_better"],
        "sparsity": sparsity([usage], slots),
        "tokens": {account: int(tokens.sum()) for account, tokens in usage.tokens.items()},
        "batches": _batches(prepared.work.abilities),
        "largest": asdict(prepared.work.largest),
        "cut": {
            "items": int((usage.cut > 0).sum()),
            "tokens": int(usage.cut.sum()),
            "unfinished": int((usage.unfinished > 0).sum()),
            "windowed": int((usage.windows > 1).sum()),
            "windows": int(usage.windows.sum()),
        },
    }
    if kinds == ["loglikelihood_rolling"]:
        # Nats a token, the only perplexity that does not depend on how words or bytes are counted.
        result[prepared.work.likelihood] = float(usage.nats.sum() / usage.predicted.sum())
    return result


def _batches(abilities: Abilities) -> str:
    """Whose batches were run: rows that requests share, rows of their own, or lm-eval's."""
    if abilities.follows:
        return "lm_eval"
    return "shared" if abilities.branches else "plain"


def check_measured(name: str, metric: str | None, table: SampleTable) -> None:
    """See that a task's curve can be drawn: its metric is there, of each document.

    Args:
        name: of the task.
        metric: as the configuration names it.
        table: with the task's result and rows.

    Raises:
        AtlasError: it is not; a task that failed is let pass.
    """
    result = table.tasks[name]["result"]
    if result["status"] == "ok":
        kind, key = choose_metric(name, metric, result)
        if kind == "accuracy":
            sample_values(name, key, table.rows[name]["metrics"].to_pylist())


def headline(task: dict[str, Any]) -> str:
    """A task's entry in eval.json in few words, for the log."""
    scores = [
        f"{key} {value:.4f}"
        for one in task["scores"].values()
        for key, value in one.items()
        if value is not None
    ]
    shares = [f"{tensor} {share['total']:.1%} zero" for tensor, share in task["sparsity"].items()]
    return ", ".join([*scores[:4], *shares])


def _numbers(scores: dict[str, Any]) -> dict[str, float | None]:
    """lm-eval's numbers; one that is no finite number is None."""
    numbers = {}
    for key, value in scores.items():
        if "," in key and _is_number(value):
            numbers[key] = float(value) if np.isfinite(value) else None
    return numbers


def sparsity(usages: list[Usage], slots: list[Slot]) -> dict[str, Any]:
    """Induced sparsity: zeros over entries of each tensor, pooled and by layer, padding excluded.

    `total`, `layers` and the phases weigh a token by how often it was run or would be without sharing;
    `unique` counts each token of a document once. `outputs` are the weights that meet an entry of each layer;
    `products` and `zero_products` count entries as often as weights meet them.
    """
    zeros = {one: sum(usage.zeros[one].sum(0) for usage in usages) for one in ACCOUNTS}
    tokens = {one: sum(int(usage.tokens[one].sum()) for usage in usages) for one in ACCOUNTS}
    run = sum(tokens[phase] for phase in PHASES)
    summary: dict[str, Any] = {}
    for tensor in dict.fromkeys(slot.key.tensor for slot in slots):
        index = [i for i, slot in enumerate(slots) if slot.key.tensor == tensor]
        widths = np.array([slots[i].width for i in index])
        outputs = np.array([slots[i].outputs for i in index])
        every = sum(zeros[phase] for phase in PHASES)[index]
        shares = {
            one: _ratio(zeros[one][index].sum(), tokens[one] * widths.sum())
            for one in ACCOUNTS
            if tokens[one]
        }
        summary[tensor] = {
            "zeros": int(every.sum()),
            "entries": int(run * widths.sum()),
            "total": _ratio(every.sum(), run * widths.sum()),
            **shares,
            "zero_products": int((every * outputs).sum()),
            "products": int(run * (widths * outputs).sum()),
            "outputs": outputs.tolist(),
            "layers": _by_layer([slots[i].key.layer for i in index], every, run * widths),
        }
    return summary


def _by_layer(layers: list[int], zeros: np.ndarray, entries: np.ndarray) -> list[float | None]:
    """Share of zeros of each layer, all its parts that have the tensor together; None: left dense."""
    numbers = np.array(layers)
    return [
        _ratio(zeros[numbers == layer].sum(), entries[numbers == layer].sum())
        for layer in range(max(layers) + 1)
    ]


def _ratio(zeros: float, entries: float) -> float | None:
    return float(zeros) / float(entries) if entries else None
