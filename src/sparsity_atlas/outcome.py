"""What becomes of a task's run: rows of the sample table, and its entry in eval.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    from sparsity_atlas.lm import Usage
    from sparsity_atlas.sparsify import Slot
    from sparsity_atlas.tasks import LoadedTask


def sample_rows(
    task: LoadedTask, samples: dict[str, list[dict[str, Any]]], usage: dict[tuple[str, int], Usage]
) -> list[dict[str, Any]]:
    """A task's rows of the sample table, in the order of leaf and document.

    Args:
        task: the task.
        samples: lm-eval's samples of each leaf.
        usage: `AtlasLM.usage` after the run.

    Raises:
        AtlasError: the documents have no field of the name that `cluster` gives.
    """
    return [row for leaf in sorted(samples) for row in _leaf_rows(task, leaf, samples[leaf], usage)]


def _leaf_rows(
    task: LoadedTask, leaf: str, samples: list[dict[str, Any]], usage: dict[tuple[str, int], Usage]
) -> list[dict[str, Any]]:
    """One row a document; a document has one sample for each filter of its task."""
    by_document: dict[int, dict[str, Any]] = {}
    for sample in samples:
        document = sample["doc_id"]
        if document not in by_document:
            used = usage[leaf, document]
            by_document[document] = {
                "task": task.name,
                "leaf": leaf,
                "doc_id": document,
                "doc_hash": sample["doc_hash"],
                "cluster": _cluster(task, sample["doc"]),
                "metrics": [],
                "nats": used.nats,
                "predicted": used.predicted,
                "prefill_tokens": used.prefill_tokens,
                "prefill_zeros": used.prefill_zeros.tolist(),
                "generation_tokens": used.generation_tokens,
                "generation_zeros": used.generation_zeros.tolist(),
            }
        by_document[document]["metrics"] += [
            (f"{metric},{sample['filter']}", float(sample[metric]))
            for metric in sample["metrics"]
            # Weighted metrics (a log-likelihood over its words) are pairs; nats and predicted say more.
            if isinstance(sample[metric], int | float | np.number | np.bool_)
        ]
    return [by_document[document] for document in sorted(by_document)]


def _cluster(task: LoadedTask, document: dict[str, Any]) -> str | None:
    if task.cluster is None:
        return None
    if task.cluster not in document:
        raise AtlasError(
            f"tasks.{task.name}: cluster: documents have no field '{task.cluster}'; "
            f"they have {', '.join(document)}"
        )
    return str(document[task.cluster])


def task_result(
    task: LoadedTask, outcome: dict[str, Any], rows: list[dict[str, Any]], slots: list[Slot]
) -> dict[str, Any]:
    """What eval.json says of a task.

    Args:
        task: the task.
        outcome: what `lm_eval.evaluator.evaluate` returned.
        rows: as `sample_rows` gives them.
        slots: what was counted.
    """
    kinds = sorted({leaf.OUTPUT_TYPE for leaf in task.leaves.values()})
    scores = {**outcome["results"], **outcome.get("groups", {})}
    result: dict[str, Any] = {
        "status": "ok",
        "items": len(rows),
        "output_types": kinds,
        "leaves": sorted(task.leaves),
        "chance": _chance(task),
        "scores": {name: _numbers(scores[name]) for name in sorted(scores)},
        "higher_is_better": outcome["higher_is_better"],
        "sparsity": _sparsity(rows, slots),
        "tokens": {
            phase: sum(row[f"{phase}_tokens"] for row in rows)
            for phase in ("prefill", "generation")
        },
    }
    if kinds == ["loglikelihood_rolling"]:
        # Nats a token, the only perplexity that does not depend on how words or bytes are counted.
        result["loss"] = sum(row["nats"] for row in rows) / sum(row["predicted"] for row in rows)
    return result


def _numbers(scores: dict[str, Any]) -> dict[str, float | None]:
    """lm-eval's numbers; one that is no finite number is None."""
    numbers = {}
    for key, value in scores.items():
        if "," in key and isinstance(value, int | float | np.number):
            numbers[key] = float(value) if np.isfinite(value) else None
    return numbers


def _chance(task: LoadedTask) -> float | None:
    """Accuracy of a guess: mean of 1 / options over a multiple-choice task's documents."""
    shares = []
    for leaf in task.leaves.values():
        if leaf.OUTPUT_TYPE != "multiple_choice":
            return None
        shares += [
            1 / len(leaf.doc_to_choice(document))
            for _, document in leaf.doc_iterator(limit=task.limit)
        ]
    return sum(shares) / len(shares)


def _sparsity(rows: list[dict[str, Any]], slots: list[Slot]) -> dict[str, Any]:
    """Induced sparsity: zeros over entries of each tensor, pooled and by layer, padding excluded."""
    summary: dict[str, Any] = {}
    zeros = {
        phase: np.sum([row[f"{phase}_zeros"] for row in rows], axis=0)
        for phase in ("prefill", "generation")
    }
    tokens = {phase: sum(row[f"{phase}_tokens"] for row in rows) for phase in zeros}
    for tensor in dict.fromkeys(slot.tensor for slot in slots):
        index = [i for i, slot in enumerate(slots) if slot.tensor == tensor]
        widths = np.array([slots[i].width for i in index])
        every = sum(zeros.values())[index]
        summary[tensor] = {
            "zeros": int(every.sum()),
            "entries": int(sum(tokens.values()) * widths.sum()),
            "total": _ratio(every.sum(), sum(tokens.values()) * widths.sum()),
            "prefill": _ratio(zeros["prefill"][index].sum(), tokens["prefill"] * widths.sum()),
            "generation": _ratio(
                zeros["generation"][index].sum(), tokens["generation"] * widths.sum()
            ),
            "layers": [
                _ratio(count, sum(tokens.values()) * width)
                for count, width in zip(every, widths, strict=True)
            ],
        }
    return summary


def _ratio(zeros: float, entries: float) -> float | None:
    return float(zeros) / float(entries) if entries else None
