"""lm-eval tasks whose requests are built and tokenised once, for every node of a session."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.utils import handle_non_serializable, hash_string

from sparsity_atlas.errors import TaskFailure
from sparsity_atlas.garbage import kept_as_it_is
from sparsity_atlas.lm.sharing import Untried
from sparsity_atlas.tasks import request_cache
from sparsity_atlas.tasks.choices import Choices, Group, can_score, grouped
from sparsity_atlas.tasks.insertion.opening import behind, opened
from sparsity_atlas.tasks.reported_metrics import mislabelled
from sparsity_atlas.tasks.request_cache import Beside, Labels, Row

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from sparsity_atlas.lm.journalled import JournalledLM
    from sparsity_atlas.lm.work import Arranged, Encoding
from sparsity_atlas.tasks.loaded import LoadedTask


class PreparedTask:
    """An lm-eval task that answers from memory what `lm_eval.evaluator.evaluate` asks for.

    Attributes:
        instances: the task's requests.
        documents: its documents, in order.
        metrics: by filter, of each document; of the last evaluation.
    """

    def __init__(self, task: Task, documents: list[dict[str, Any]], rows: list[Row]) -> None:
        self._task = task
        self.eval_docs = task.eval_docs  # a property that may process every document anew
        self.documents = documents
        name = task.task_name  # lm-eval makes a random one up at each call, in case there is none
        self.instances = [
            Instance(
                *(row.kind, documents[row.doc_id], row.arguments, row.idx),
                metadata=(name, row.doc_id, row.repeats),
            )
            for row in rows
        ]
        task._instances = self.instances
        self.metrics: dict[str, list[dict[str, Any]]] = {}
        self._choices: Choices | None = None
        self._scored: list[dict[str, float] | None] = []
        # Code of the task's own may change the document that it is given.
        built_in = type(task).process_results is ConfigurableTask.process_results
        self._copies = not built_in or callable(task.config.process_results)
        if not self._copies:
            for name in ("doc_to_text", "doc_to_choice", "doc_to_target"):
                setattr(task, name, _remembered(getattr(task, name), documents))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def choices(self, documents: list[dict[str, Any]]) -> list[Group] | None:
        """What `take` takes; None where lm-eval itself must look at each document."""
        if self._copies or not can_score(self._task):
            return None
        return grouped(self._task, documents, self.instances)

    def take(self, choices: list[Group] | None) -> None:
        """Score by these."""
        if choices is not None:
            self._choices = Choices(self._task, choices, self.instances)

    def build_all_requests(self, **_: Any) -> None:
        """Forget earlier answers; the requests are built."""
        self.metrics = {}
        for instance in self.instances:
            instance.resps = []
            instance.filtered_resps = {}

    def doc_iterator(self, **_: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """The documents with their numbers; called once for each filter."""
        name = list(self.instances[0].filtered_resps)[len(self.metrics)]
        self.metrics[name] = []
        self._scored = self._choices.score(name) if self._choices is not None else []
        return enumerate(copy.deepcopy(self.documents) if self._copies else self.documents)

    def process_results(self, document: dict[str, Any], results: Any) -> dict[str, Any]:
        """A document's metrics, which are kept."""
        kept = next(reversed(self.metrics.values()))
        known = self._scored[len(kept)] if self._scored else None
        found: dict[str, Any] = (
            self._task.process_results(document, results) if known is None else known
        )
        kept.append(found)
        return found


def _remembered(method: Callable[..., Any], documents: list[dict[str, Any]]) -> Callable[..., Any]:
    """A task's reading of its documents, each done once: a template is compiled every time."""
    known: dict[int, Any] = {}
    ours = {id(document) for document in documents}

    def read(document: Any, *arguments: Any, **options: Any) -> Any:
        if arguments or options or id(document) not in ours:
            return method(document, *arguments, **options)
        if id(document) not in known:
            known[id(document)] = method(document)
        return known[id(document)]

    return read


@dataclass
class Prepared:
    """A task of the configuration, ready for one model.

    Attributes:
        contents: what `lm_eval.evaluator.evaluate` takes.
        work: the batches.
        hashes: of each leaf's documents.
        clusters: of each leaf's documents; None where each is by itself.
        chance: accuracy of a guess; None where there is nothing to choose.
        mislabelled: documents whose label is none of their options; lm-eval counts them as wrong.
    """

    contents: dict[str, Any]
    work: Arranged
    hashes: dict[str, list[str]]
    clusters: dict[str, list[str | None]]
    chance: float | None
    mislabelled: int

    @property
    def leaves(self) -> dict[str, PreparedTask]:
        """lm-eval's tasks by name."""
        leaves: dict[str, PreparedTask] = self.contents["tasks"]
        return leaves


def prepare(lm: JournalledLM, task: LoadedTask, *, seed: int, share: bool = True) -> Prepared:
    """Build and tokenise a task's requests.

    Args:
        lm: with the model's tokenizer and the settings of its prompts.
        task: the task.
        seed: of few-shot draws.
        share: whether requests may share what they have in common, where the model can.

    Raises:
        TaskFailure: nothing to evaluate, a request that cannot be scored, or no field of the name that
            `cluster` gives.
    """
    if task.problem:
        raise TaskFailure(task.problem)
    with kept_as_it_is():
        return _prepare(lm, task, seed, share)


def prepare_kept(
    lm: JournalledLM, task: LoadedTask, *, seed: int, share: bool = True
) -> Prepared | None:
    """As `prepare`, where that runs neither the model nor code of the task's own; None elsewhere."""
    if any(map(task.may_change, task.leaves)):
        return None
    lm.tries = False
    try:
        return prepare(lm, task, seed=seed, share=share)
    except (TaskFailure, Untried):
        return None  # both come up again when the task's turn comes
    finally:
        lm.tries = True


def build_ahead(lm: JournalledLM, task: LoadedTask, *, seed: int) -> None:
    """Put a task's requests into the cache, and their batches, as far as they follow without the model.

    Args:
        lm: as of `prepare`; its model needs no weights.
        task: the task.
        seed: of few-shot draws.

    Raises:
        TaskFailure: see `prepare`.
    """
    made_of = None if task.problem else request_cache.key(lm, task, seed=seed)
    if made_of is not None:
        with kept_as_it_is():
            found = _requests(lm, task, seed, made_of)
            lm.arrange_ahead(found.of_kind, found.encodings, Beside(made_of))


class _Requests(NamedTuple):
    """A task's requests, built or as they were kept.

    Attributes:
        leaves: by name.
        of_kind: as often as lm-eval will ask for each.
        encodings: gives those of the same.
        labels: of the documents.
    """

    leaves: dict[str, PreparedTask]
    of_kind: dict[str, list[Instance]]
    encodings: Callable[[], dict[str, list[Encoding]]]
    labels: Labels


def _requests(
    lm: JournalledLM, task: LoadedTask, seed: int, made_of: dict[str, Any] | None
) -> _Requests:
    known = request_cache.read(made_of) if made_of else None
    if not lm.tries and (known is None or any(row.kind == "generate_until" for row in known.rows)):
        raise Untried
    rows, encoded = build(lm, task, seed=seed) if known is None else (known.rows, [])
    leaves = {}
    requests: dict[str, list[Instance]] = defaultdict(list)
    numbers: dict[str, list[int]] = defaultdict(list)  # of their rows
    for name, loaded in task.leaves.items():
        # A copy: a task may be prepared in two ways, and answers for one of them.
        leaf = copy.copy(loaded)
        documents = task.documents_of(name)
        own = [number for number, row in enumerate(rows) if row.leaf == name]
        leaves[name] = PreparedTask(leaf, documents, [rows[number] for number in own])
        for number, instance in zip(own, leaves[name].instances, strict=True):
            row = rows[number]
            # As often as lm-eval will ask for it.
            requests[row.kind] += [instance] * row.repeats
            numbers[row.kind] += [number] * row.repeats
    labels = _labels(task, leaves) if known is None else known.labels
    if known is None and made_of:
        request_cache.write(made_of, rows, encoded, labels)

    def encodings() -> dict[str, list[Encoding]]:
        every = encoded if known is None else known.encodings()
        return {kind: [every[number] for number in some] for kind, some in numbers.items()}

    return _Requests(leaves, requests, encodings, labels)


def _prepare(lm: JournalledLM, task: LoadedTask, seed: int, share: bool) -> Prepared:
    made_of = request_cache.key(lm, task, seed=seed)
    leaves, requests, encodings, labels = _requests(lm, task, seed, made_of)
    for name, leaf in leaves.items():
        leaf.take(labels.choices.get(name))
    return Prepared(
        contents={**task.contents, "tasks": leaves},
        work=lm.work(
            requests,
            encodings,
            share=share,
            greedy=_asking_greedy(leaves),
            keep=Beside(made_of) if made_of else None,
        ),
        hashes=labels.hashes,
        clusters={
            name: [task.cluster_of(one) for one in leaf.documents] for name, leaf in leaves.items()
        },
        chance=labels.chance,
        mislabelled=labels.mislabelled,
    )


def _asking_greedy(leaves: dict[str, PreparedTask]) -> set[str]:
    """Those of which a metric is whether an answer is the likeliest."""
    known = {"multiple_choice": "exact_match", "loglikelihood": "acc"}
    return {
        name
        for name, leaf in leaves.items()
        # Code of a task's own may look at it, whatever its metrics are called.
        if leaf._copies or known.get(leaf.OUTPUT_TYPE, "") in (leaf._metric_fn_list or ())
    }


def _labels(task: LoadedTask, leaves: dict[str, PreparedTask]) -> Labels:
    hashes, choices = {}, {}
    wrong = 0
    shares: list[float] | None = []
    for name, leaf in leaves.items():
        hashes[name] = [_hash(one) for one in leaf.documents]
        # As they are where labels are read, and nothing has looked at the documents.
        documents = copy.deepcopy(leaf.documents) if task.may_change(name) else leaf.documents
        wrong += mislabelled(leaf, documents)
        if leaf.OUTPUT_TYPE != "multiple_choice":
            shares = None
        elif shares is not None:
            shares += [1 / len(leaf.doc_to_choice(one)) for one in documents]
        found = leaf.choices(documents)
        if found is not None:
            choices[name] = found
    return Labels(hashes, sum(shares) / len(shares) if shares else None, wrong, choices)


def build(lm: JournalledLM, task: LoadedTask, *, seed: int) -> tuple[list[Row], list[Encoding]]:
    """A task's requests and their token ids; arguments and errors as those of `prepare`."""
    # As lm-eval does, which loads a task and builds its requests in one go.
    task.drawn.restore()
    chat = lm.prompts.apply_chat_template
    budget = {"max_gen_toks": task.max_gen_toks} if task.max_gen_toks else {}
    settings = {**budget, **lm.prompts.gen_kwargs}
    built: list[tuple[str, Instance]] = []
    for name, leaf in task.leaves.items():
        leaf.set_fewshot_seed(seed)
        leaf.build_all_requests(
            limit=task.limit,
            system_instruction=lm.prompts.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat and lm.prompts.fewshot_as_multiturn,
            chat_template=opened(lm.apply_chat_template, task.inserted) if chat else None,
        )
        built += [(name, _with(settings, one)) for one in leaf.instances]
    if budget and not any(one.request_type == "generate_until" for _, one in built):
        raise TaskFailure(f"max_gen_toks: '{task.lm_eval_name}' generates nothing")
    rows: list[Row] = []
    encodings: list[Encoding] = []
    for kind in dict.fromkeys(instance.request_type for _, instance in built):
        some = [(name, instance) for name, instance in built if instance.request_type == kind]
        asked = [instance for _, instance in some]
        if task.inserted and (kind == "loglikelihood_rolling" or not chat):
            encodings += behind(lm, kind, asked, task.inserted)
        else:
            encodings += lm.encode(kind, asked)
        rows += [Row(name, kind, one.doc_id, one.idx, one.repeats, one.args) for name, one in some]
    return rows, encodings


def _with(gen_kwargs: dict[str, Any], request: Instance) -> Instance:
    """A request with settings of generation that outweigh its task's, as those of lm-eval's command."""
    if gen_kwargs and request.request_type == "generate_until":
        prompt, own, *rest = request.args
        request.arguments = (prompt, {**own, **gen_kwargs}, *rest)
    return request


def _hash(document: dict[str, Any]) -> str:
    """The hash of a document that lm-eval logs."""
    text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
    digest: str = hash_string(text)
    return digest
