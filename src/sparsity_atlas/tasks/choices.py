"""Accuracies of multiple-choice documents, all at once: lm-eval's own rules, which it applies one by one.

What depends on a document alone (how long its options are, which is right) is found once and kept with
the requests; what is left are three comparisons of arrays. lm-eval also makes a softmax of each
document's scores, for metrics that hardly a task has; a task with one of those is left to it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task

ACCURACIES = ("acc", "acc_norm", "acc_bytes")


@dataclass(frozen=True)
class Group:
    """Documents with the same number of options.

    Attributes:
        numbers: of the documents.
        lengths: for each accuracy what a score is divided by, [documents][options], or one for all.
        right: of each document the options that are right.
    """

    numbers: list[int]
    lengths: dict[str, list[list[int]]]
    right: list[list[int]]


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

    def __init__(self, task: Task, groups: list[Group], instances: list[Instance]) -> None:
        """Take what is known of a task's documents, and their requests.

        Args:
            task: the task.
            groups: as `grouped` gives them.
            instances: requests of its documents.
        """
        self._names = [name for name in ACCURACIES if name in task._metric_fn_list]
        self._documents = 1 + max(instance.doc_id for instance in instances)
        by_document: list[list[Instance]] = [[] for _ in range(self._documents)]
        for instance in instances:
            by_document[instance.doc_id].append(instance)
        for some in by_document:
            some.sort(key=lambda one: one.idx)
        self._groups = [
            _Ready(group, [by_document[number] for number in group.numbers]) for group in groups
        ]

    def score(self, filter_name: str) -> list[dict[str, float] | None]:
        """Metrics of each document by a filter's answers; None for one that lm-eval must look at."""
        found: list[dict[str, float] | None] = [None] * self._documents
        for ready in self._groups:
            answers = [
                [one.filtered_resps[filter_name][0] for one in some] for some in ready.instances
            ]
            scores = np.array(answers, dtype=np.float64)
            columns = []
            for name in self._names:
                best = (scores / ready.lengths[name]).argmax(1)
                columns.append(ready.right[np.arange(len(best)), best].tolist())
            for number, *values in zip(ready.numbers, *columns, strict=True):
                found[number] = dict(zip(self._names, values, strict=True))
        return found


class _Ready:
    """A group's arrays, and its requests."""

    def __init__(self, group: Group, instances: list[list[Instance]]) -> None:
        self.numbers, self.instances = group.numbers, instances
        count = len(instances[0])
        self.right = np.zeros((len(instances), count))
        for row, right in enumerate(group.right):
            self.right[row, right] = 1.0
        self.lengths = {
            name: np.array(lengths, dtype=np.float64) for name, lengths in group.lengths.items()
        }


def grouped(task: Task, documents: list[dict[str, Any]], instances: list[Instance]) -> list[Group]:
    """Documents with as many options each, without those that are not labelled as they should be.

    Args:
        task: whose `doc_to_...` remember what they gave.
        documents: in order.
        instances: requests of these documents.
    """
    asked = Counter(instance.doc_id for instance in instances)
    by_count: dict[int, list[int]] = {}
    labels: dict[int, list[int]] = {}
    for number, document in enumerate(documents):
        options = task.doc_to_choice(document)
        if not all(isinstance(one, str) for one in options):
            continue
        right = _right(task, document, options)
        if right is not None and len(options) == asked[number]:
            labels[number] = right
            by_count.setdefault(len(options), []).append(number)
    return [_group(task, documents, some, labels) for some in by_count.values()]


def _right(task: Task, document: dict[str, Any], options: list[str]) -> list[int] | None:
    """The options that are right; None where lm-eval would warn of the label, or it is of no use."""
    label = (task.doc_to_text if task.multiple_input else task.doc_to_target)(document)
    if isinstance(label, list) != bool(task.multiple_target):
        return None
    if isinstance(label, str):
        label = options.index(label) if label in options else None
    labels = label if isinstance(label, list) else [label]
    if not all(type(one) is int and 0 <= one < len(options) for one in labels):
        return None
    return labels


def _group(
    task: Task,
    documents: list[dict[str, Any]],
    numbers: list[int],
    labels: dict[int, list[int]],
) -> Group:
    options = [task.doc_to_choice(documents[number]) for number in numbers]
    return Group(
        numbers,
        {
            "acc": [[1]],
            "acc_norm": [[len(one) for one in some] for some in options],
            "acc_bytes": [[len(one.encode("utf-8")) for one in some] for some in options],
        },
        [labels[number] for number in numbers],
    )
