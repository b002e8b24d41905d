"""Which metrics a task will report, as far as that is known before it runs, and whether they will do."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import lm_eval.api.metrics  # noqa: F401 (registers them)
from lm_eval.api.registry import aggregation_registry, metric_registry
from lm_eval.api.task import ConfigurableTask

from sparsity_atlas.errors import AtlasError, TaskFailure
from sparsity_atlas.tasks.error_messages import close
from sparsity_atlas.tasks.loaded import RandomState
from sparsity_atlas.tasks.score import choose_metric

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from sparsity_atlas.tasks.loaded import LoadedTask

# What lm-eval computes of one document by itself, by output type.
_OF_CHOICES = {
    "acc",
    "f1",
    "mcc",
    "acc_norm",
    "acc_bytes",
    "exact_match",
    "brier_score",
    "likelihood",
}
_COMPUTED = {
    "loglikelihood": {"perplexity", "acc"},
    "loglikelihood_rolling": {"word_perplexity", "byte_perplexity", "bits_per_byte"},
    "multiple_choice": _OF_CHOICES | {"acc_mutual_info"},
}


def check_metric_list(config: dict[str, Any]) -> None:
    """Refuse metrics that lm-eval does not have; by itself it looks for them elsewhere, then stumbles.

    Args:
        config: a task's whole configuration.

    Raises:
        TaskFailure: names the metric, and close ones.
    """
    entries = config.get("metric_list")
    for entry in entries or ():
        if not isinstance(entry, dict):
            raise TaskFailure(f"metric_list: expected items like {{metric: acc}}, found '{entry}'")
        name, aggregation = entry.get("metric"), entry.get("aggregation")
        if not (isinstance(name, str) or callable(name)):
            raise TaskFailure(f"metric_list: expected items like {{metric: acc}}, found '{entry}'")
        if isinstance(aggregation, str) and aggregation not in aggregation_registry:
            near = close(aggregation, aggregation_registry)
            raise TaskFailure(
                f"metric_list: '{name}': lm-eval has no aggregation '{aggregation}'{near}"
            )
        if not isinstance(name, str) or name in metric_registry:
            continue
        own = config.get("process_results") is not None or entry.get("hf_evaluate")
        if not own and not {"aggregation", "higher_is_better"} <= entry.keys():
            near = close(name, metric_registry)
            raise TaskFailure(f"metric_list: lm-eval has no metric '{name}'{near}")
        if "aggregation" not in entry:
            raise TaskFailure(f"metric_list: '{name}' needs its aggregation, for instance mean")


def check_found(task: Task) -> None:
    """Refuse a metric that was found nowhere; lm-eval would call it after the last answer.

    Raises:
        TaskFailure: names the metric.
    """
    if scored_by_lm_eval(task) and task.OUTPUT_TYPE == "generate_until":
        for name, function in task._metric_fn_list.items():
            if function is None:
                raise TaskFailure(
                    f"'{task.task_name}': metric_list: neither lm-eval nor the library `evaluate` has "
                    f"'{name}'{close(name, metric_registry)}"
                )


def mislabelled(task: Task, documents: list[dict[str, Any]]) -> int:
    """Documents whose label is none of their options: whatever the model says, it is wrong.

    Raises:
        TaskFailure: no document has a label that can be met.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or not scored_by_lm_eval(task):
        return 0
    found = []
    for document in documents:
        options = task.doc_to_choice(document)
        label = _label(task, document)
        labels = label if isinstance(label, list) else [label]
        found.append(any(_is_option(one, options) for one in labels))
    if not any(found):
        raise TaskFailure(
            f"'{task.task_name}': no document has a label among its options; document 0: label "
            f"{_label(task, documents[0])!r}, {len(task.doc_to_choice(documents[0]))} options"
        )
    return found.count(False)


def check_wanted(task: LoadedTask, wanted: str | None) -> None:
    """Refuse a metric of the configuration that a task will not report, before it runs.

    Args:
        task: the task; where its own code decides what it reports, that are metrics of its list at most.
        wanted: as in the configuration.

    Raises:
        AtlasError: names the metrics that there will be, or says that some documents will lack it.
    """
    with task.code("its metrics cannot be listed"):
        reported = {name: _reported(leaf) for name, leaf in task.leaves.items()}
    if not reported or None in reported.values():
        return
    _, key = choose_metric(
        task.name,
        wanted,
        {
            "output_types": sorted({leaf.OUTPUT_TYPE for leaf in task.leaves.values()}),
            "leaves": sorted(reported),
            "scores": reported,
            "higher_is_better": {
                name: leaf.higher_is_better() for name, leaf in task.leaves.items()
            },
        },
    )
    if key is not None and not task.allow_code:
        _check_each_document(task, key)


def _check_each_document(task: LoadedTask, key: str) -> None:
    """Refuse a metric that the task's own code does not give for some document, whatever is answered."""
    documents = [
        (leaf, document)
        for leaf in task.leaves.values()
        if not scored_by_lm_eval(leaf)
        for document in islice(leaf.eval_docs, task.limit)
    ]
    drawn = RandomState.now()
    try:
        # Once for all of them: to change to a task's modules and back takes longer than a document.
        with task.code("answers that were made up"):
            lacking = sum(_lacks(*one, key.split(",")[0]) for one in documents)
    except TaskFailure:
        return  # it takes no such answers: what it makes of the model's own is seen when that runs
    finally:
        drawn.restore()
    if lacking:
        raise AtlasError(
            f"tasks.{task.name}: metric: '{key}' is missing in {lacking} of {len(documents)} documents; "
            "choose one that all of them have"
        )


def _lacks(leaf: Task, document: dict[str, Any], name: str) -> bool:
    """Whether a metric is not among the results of a document, of a right answer nor of a wrong one."""
    for right in (True, False):
        results = leaf.process_results(document, _made_up(leaf, document, right=right))
        # What is no dictionary fails the task when it runs.
        if not isinstance(results, dict) or name in results:
            return False
    return True


def _made_up(leaf: Task, document: dict[str, Any], *, right: bool) -> list[Any]:
    """What lm-eval would hand on of a document's requests, if the model's answer were right or wrong."""
    if leaf.OUTPUT_TYPE == "multiple_choice":
        rest = [(-9.0, False)] * (len(leaf.doc_to_choice(document)) - 1)
        return [(-1.0, True), *rest] if right else [*rest, (-1.0, True)]
    if leaf.OUTPUT_TYPE == "loglikelihood":
        return [(-1.0, right)]
    if leaf.OUTPUT_TYPE == "loglikelihood_rolling":
        return [-9.0]
    target = leaf.doc_to_target(document) if right else ""
    return [str(target[0] if isinstance(target, list) and target else target)]


def _label(task: Task, document: dict[str, Any]) -> Any:
    return (task.doc_to_text if task.multiple_input else task.doc_to_target)(document)


def _is_option(label: Any, options: list[str]) -> bool:
    return label in options if isinstance(label, str) else label in range(len(options))


def scored_by_lm_eval(task: Task) -> bool:
    """Whether a task's answers are scored by lm-eval's own rules for its output type."""
    kind = type(getattr(task, "_task", task))  # of a task whose requests are prepared
    own = kind.process_results is not ConfigurableTask.process_results
    return not own and task.config.process_results is None


def _reported(task: Task) -> set[str] | None:
    """`metric,filter` of all that a task may report; None where a function decides that."""
    if not scored_by_lm_eval(task):
        # Of a metric beyond these it is not known whether more of it is better.
        return {f"{name},{one.name}" for name in task.higher_is_better() for one in task._filters}
    names = set(task._metric_fn_list)
    if task.OUTPUT_TYPE in _COMPUTED:
        names &= _COMPUTED[task.OUTPUT_TYPE]
    elif not names <= set(metric_registry):
        return None  # a function may report under other names
    return {f"{name},{one.name}" for name in names for one in task._filters}
