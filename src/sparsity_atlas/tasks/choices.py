"""Accuracies of multiple-choice documents, all at once: lm-eval's own rules, which it applies one by one.

What depends on a document alone (how long its options are, which is right) is found once for all nodes;
what is left are three comparisons of arrays. lm-eval also makes a softmax of each document's scores, for
metrics that hardly a task has; a task with one of those is left to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

ACCURACIES = ("acc", "acc_norm", "acc_bytes")


@dataclass(frozen=True)
class _Group:
    """Documents with the same number of options.

    Attributes:
        numbers: of the documents.
        lengths: for each accuracy what a score is divided by, [documents, options].
        right: 1 for each option that is right, [documents, options].
    """

    numbers: list[int]
    lengths: dict[str, np.ndarray]
    right: np.ndarray


def can_score(task: Task) -> bool:
    """Whether a task reports nothing but accuracies of choices, of its answers as they are.

    Args:
        task: whose results lm-eval itself would process.
    """
    return (
        task.OUTPUT_TYPE == "multiple_choice"
        and set(task._metric_fn_list) <= set(ACCURACIES)
        and task.config.filter_list is None
    )


class Choices:
    """The choices of a task's documents, and what is right."""

    def __init__(
        self, task: Task, documents: list[dict[str, Any]], instances: list[Instance]
    ) -> None:
        """Take a task's documents and their requests; nothing is read before the first score.

        Args:
            task: whose `doc_to_...` remember what they gave.
            documents: in order.
            instances: requests of these documents.
        """
        self._task = task
        self._documents = documents
        self._instances: list[list[Instance]] = [[] for _ in documents]
        for instance in instances:
            self._instances[instance.doc_id].append(instance)
        for some in self._instances:
            some.sort(key=lambda one: one.idx)
        self._groups: list[_Group] | None = None

    def score(self, filter_name: str) -> list[dict[str, float] | None]:
        """Metrics of each document by a filter's answers; None for one that lm-eval must look at."""
        if self._groups is None:
            self._groups = self._grouped()
        names = [name for name in ACCURACIES if name in self._task._metric_fn_list]
        found: list[dict[str, float] | None] = [None] * len(self._documents)
        for group in self._groups:
            answers = [
                [one.filtered_resps[filter_name][0] for one in self._instances[number]]
                for number in group.numbers
            ]
            scores = np.array(answers, dtype=np.float64)
            columns = []
            for name in names:
                best = (scores / group.lengths[name]).argmax(1)
                columns.append(group.right[np.arange(len(best)), best].tolist())
            for number, *values in zip(group.numbers, *columns, strict=True):
                found[number] = dict(zip(names, values, strict=True))
        return found

    def _grouped(self) -> list[_Group]:
        """Documents with as many options each, without those that are not labelled as they should be."""
        by_count: dict[int, list[int]] = {}
        labels: dict[int, list[int]] = {}
        for number, document in enumerate(self._documents):
            options = self._task.doc_to_choice(document)
            if not all(isinstance(one, str) for one in options):
                continue
            right = self._right(document, options)
            if right is not None and len(options) == len(self._instances[number]):
                labels[number] = right
                by_count.setdefault(len(options), []).append(number)
        return [self._group(count, some, labels) for count, some in by_count.items()]

    def _right(self, document: dict[str, Any], options: list[str]) -> list[int] | None:
        """The options that are right; None where lm-eval would warn of the label, or it is of no use."""
        task = self._task
        label = (task.doc_to_text if task.multiple_input else task.doc_to_target)(document)
        if isinstance(label, list) != bool(task.multiple_target):
            return None
        if isinstance(label, str):
            label = options.index(label) if label in options else None
        labels = label if isinstance(label, list) else [label]
        if not all(type(one) is int and 0 <= one < len(options) for one in labels):
            return None
        return labels

    def _group(self, count: int, numbers: list[int], labels: dict[int, list[int]]) -> _Group:
        options = [self._task.doc_to_choice(self._documents[number]) for number in numbers]
        right = np.zeros((len(numbers), count))
        for row, number in enumerate(numbers):
            right[row, labels[number]] = 1.0
        return _Group(
            numbers,
            {
                "acc": np.ones(1),
                "acc_norm": np.array([[float(len(one)) for one in some] for some in options]),
                "acc_bytes": np.array(
                    [[float(len(one.encode("utf-8"))) for one in some] for some in options]
                ),
            },
            right,
        )
