"""What a model answered in a task that it has run: its own choice, or what it wrote."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsity_atlas.errors import AtlasError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from sparsity_atlas.tasks.prepared import PreparedTask

CHOICE, WRITTEN = "multiple_choice", "generate_until"


def _one(option: str) -> int:
    return 1


def _bytes(option: str) -> int:
    return len(option.encode("utf-8"))


# By what lm-eval divides an option's log-likelihood before it takes the likeliest; by nothing for others.
_LENGTHS: dict[str, Callable[[str], int]] = {"acc_norm": len, "acc_bytes": _bytes}


@dataclass(frozen=True)
class Answer:
    """A document's prompt and what the model answered.

    Attributes:
        prompt: text.
        text: of the answer; empty where the model wrote nothing.
        margin: by how much the choice's score, a log-likelihood in nats, is above the next option's; None
            where there was nothing to choose from.
    """

    prompt: str
    text: str
    margin: float | None


def check_answered(name: str, leaves: Iterable[PreparedTask | Any]) -> None:
    """Refuse a task in which a model gives no answer of its own.

    Args:
        name: of the task in the configuration.
        leaves: lm-eval's tasks.

    Raises:
        AtlasError: names the kind of its requests.
    """
    kinds = {leaf.OUTPUT_TYPE for leaf in leaves} - {CHOICE, WRITTEN}
    if kinds:
        raise AtlasError(not_answered(name, kinds))


def not_answered(name: str, kinds: Iterable[str]) -> str:
    """Why a task whose requests are of such kinds is refused."""
    return (
        f"studies.truthfulness.tasks: '{name}' asks for {', '.join(sorted(kinds))}, in which a model gives "
        f"no answer of its own; expected {CHOICE} or {WRITTEN}"
    )


def answers(leaf: PreparedTask, metric: str, documents: Iterable[int]) -> list[Answer]:
    """The answers to some documents of a task that has run.

    Args:
        leaf: with its answered requests.
        metric: `metric,filter` that says what is right, whose choice is taken: `acc_norm` and `acc_bytes`
            divide an option's log-likelihood by its length.
        documents: numbers of the documents.

    Raises:
        AtlasError: a document has more requests than options (`acc_mutual_info`).
    """
    asked: dict[int, list[Instance]] = defaultdict(list)
    for instance in leaf.instances:
        asked[instance.doc_id].append(instance)
    if leaf.OUTPUT_TYPE == WRITTEN:
        return [_written(asked[number][0]) for number in documents]
    length = _LENGTHS.get(metric.split(",")[0], _one)
    found = []
    for number in documents:
        options = leaf.doc_to_choice(leaf.documents[number])
        if len(options) != len(asked[number]):
            raise AtlasError(
                f"studies.truthfulness: '{leaf.task_name}' has {len(asked[number])} requests for "
                f"{len(options)} options, and which of them are its answers is not known"
            )
        some = sorted(asked[number], key=lambda one: one.idx)
        found.append(_chosen(some, [length(option) for option in options]))
    return found


def _written(instance: Instance) -> Answer:
    # The first one, where a prompt is continued several times.
    return Answer(instance.args[0], instance.resps[0], None)


def _chosen(instances: list[Instance], lengths: list[int]) -> Answer:
    import numpy as np  # Snakemake's process has no need of it

    # As lm-eval does, which takes the first of several that are as likely.
    scores = np.array([one.resps[0][0] for one in instances]) / np.array(lengths, dtype=np.float64)
    best = int(scores.argmax())
    margin = float(scores[best] - np.delete(scores, best).max()) if len(scores) > 1 else None
    prompt, text = instances[best].args
    return Answer(prompt, text, margin)
