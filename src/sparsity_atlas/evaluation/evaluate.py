"""Stage `evaluate`: one node (or the dense baseline) on all its tasks.

A node's folder holds `samples.parquet` with every finished task (of a mixture of experts also
`experts.parquet`, of a masked-diffusion model `steps.parquet`), a journal for the task in hand, and
`eval.json`, written last. A task that stands in these tables under the same fingerprint is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas import cli
from sparsity_atlas.code_version import code_version
from sparsity_atlas.criteria import source_file
from sparsity_atlas.criteria.calibration_file import Calibration, check_disjoint, read_calibration
from sparsity_atlas.errors import NumericalFailure, TaskFailure
from sparsity_atlas.evaluation.expert_table import expert_rows
from sparsity_atlas.evaluation.kept import Finished, Kept
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.outcome import check_measured, headline, sample_rows, task_result
from sparsity_atlas.evaluation.step_table import step_rows
from sparsity_atlas.files.journal import Journal
from sparsity_atlas.files.whole import canonical, digest, locked, write_manifest
from sparsity_atlas.loading.devices import how
from sparsity_atlas.loading.pretrained import load, load_tokenizer
from sparsity_atlas.models.manifest import from_manifest
from sparsity_atlas.sites.available import Available
from sparsity_atlas.sites.part import Part, chosen
from sparsity_atlas.terms import KINDS

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from sparsity_atlas.lm.journalled import JournalledLM
    from sparsity_atlas.sparsify.attach import Counter
    from sparsity_atlas.sparsify.counted_vectors import Slot
    from sparsity_atlas.tasks.loaded import LoadedTask
    from sparsity_atlas.tasks.prepared import Prepared

# The table is written whole, once in so many seconds; until then a finished task's journal stays.
WRITE_SECONDS = 30.0


@dataclass
class Session:
    """A loaded model with its tasks: what every node of that model shares.

    Attributes:
        identity: all but the node and the task that a result depends on; goes into fingerprints.
    """

    lm: JournalledLM
    parts: list[Part]
    tasks: dict[str, LoadedTask]
    seed: int
    identity: dict[str, Any]
    _prepared: dict[tuple[str, bool], Prepared] = field(default_factory=dict)
    _disjoint: set[str] = field(default_factory=set)  # digests of calibration texts
    _metrics: set[tuple[str, str | None]] = field(default_factory=set)  # that were looked at

    @classmethod
    def open(cls, manifest_path: Path, settings: dict[str, Any], code: str) -> Session:
        """Load a model and its tasks.

        Args:
            manifest_path: the model's manifest.
            settings: as `grid.evaluation_slice` gives it.
            code: code version of the evaluation.

        Raises:
            AtlasError: model or tasks cannot be used.
        """
        manifest, checkpoint = from_manifest(manifest_path, kinds=KINDS)
        from sparsity_atlas.lm.by_kind import language_model
        from sparsity_atlas.lm.prompts import PromptSettings
        from sparsity_atlas.models.memory import Sizes
        from sparsity_atlas.models.positions import check_positions
        from sparsity_atlas.sites.find import bind_parts
        from sparsity_atlas.tasks.load import load_tasks

        tasks = load_tasks(settings["tasks"], settings["seed"])
        model = load(checkpoint, **how(settings))
        tokenizer = load_tokenizer(checkpoint, add_bos_token=settings["add_bos_token"])
        lm = language_model(
            *(manifest, model, tokenizer),
            diffusion=settings.get("diffusion"),
            batch_size=settings["batch_size"],
            max_length=settings["max_length"],
            prompts=PromptSettings.of(settings),
        )
        lm.remember(manifest["digest"])
        lm.sizes = Sizes.of(manifest)
        check_positions(model, lm.max_length, f"models.{manifest['name']}: max_length")
        identity = {
            "model": manifest["digest"],
            "dtype": str(model.dtype).removeprefix("torch."),
            "batch_size": settings["batch_size"],
            "max_length": lm.max_length,
            **({"batched_as": lm.shortest} if lm.shortest else {}),
            **lm.identity(),
            "code": code,
        }
        return cls(lm, bind_parts(model, manifest["ffn"]), tasks, settings["seed"], identity)

    def with_code(self, code: str) -> Session:
        """The same model and tasks, for results of another code version: another criterion's."""
        return replace(self, identity={**self.identity, "code": code})

    def prepared(self, name: str, *, share: bool = True) -> Prepared:
        """A task with its requests, which are built when they are first asked for.

        Args:
            name: of the task.
            share: whether requests may share what they have in common.
        """
        key = (name, share)
        if key not in self._prepared:
            from sparsity_atlas.tasks.prepared import prepare

            task = self.tasks[name]
            with task.code("its requests cannot be built"):
                self._prepared[key] = prepare(self.lm, task, seed=self.seed, share=share)
        return self._prepared[key]

    def slots(self, node: Node | None) -> list[Slot]:
        """What is counted."""
        from sparsity_atlas.sparsify.counted_vectors import slots_of

        at = (*chosen(self.parts, node.site), node.rule) if node else (self.parts, None, None)
        return slots_of(*at)

    def attach(self, node: Node | None) -> contextlib.AbstractContextManager[Counter]:
        """Sparsify the model as the node says; None counts exact zeros of the dense model."""
        from sparsity_atlas.sparsify.attach import counted, sparsified

        if node is None:
            return counted(self.lm.model, self.parts)
        states = node.calibration.states if node.calibration else None
        parts, site = chosen(self.parts, node.site)
        return sparsified(self.lm.model, parts, site, node.rule, float(node.level), states)

    def check_metric(self, name: str, wanted: str | None) -> None:
        """Refuse a metric that a task will not report of each document; looked at once.

        Raises:
            AtlasError: see `check_wanted`.
        """
        from sparsity_atlas.tasks.reported_metrics import check_wanted

        if (name, wanted) not in self._metrics:
            check_wanted(self.tasks[name], wanted)
            self._metrics.add((name, wanted))

    def check_disjoint(self, calibration: Calibration) -> None:
        """Refuse tasks that evaluate what a criterion was calibrated on; looked at once a text.

        Raises:
            AtlasError: names the task and the document.
        """
        if calibration.about["text"] in self._disjoint:
            return
        for name, task in self.tasks.items():
            for leaf in task.leaves.values():
                check_disjoint(calibration, name, islice(leaf.eval_docs, task.limit))
        self._disjoint.add(calibration.about["text"])


def evaluate_node(
    session: Session,
    node: Node | None,
    folder: Path,
    metrics: dict[str, str | None] | None = None,
) -> dict[str, Any]:
    """Evaluate one node on the session's loaded model, continuing what `folder` already holds.

    Args:
        session: model and tasks.
        node: None for the dense baseline.
        folder: where the node's files are kept.
        metrics: of tasks, as the configuration names them; looked at here, if given, so that one that
            there will not be is known before the first forward pass.

    Returns:
        What was written to `eval.json`. A task that cannot be run, or in which NaN or an infinity came
        up, has the status `failed` and the reason; the others are not affected.

    Raises:
        AtlasError: a metric that a task does not report; of the dense baseline also one that is not there
            of each document, after the samples are kept.
    """
    for name, metric in (metrics or {}).items():
        session.check_metric(name, metric)
    identity = {**session.identity, **(node.identity() if node else {"criterion": None})}
    names = Available.in_parts(session.parts).names("of this run", node.site) if node else ()
    identity |= {"site": names[0]} if names else {}
    with locked(folder / ".lock"):
        by_step = node is not None and session.lm.denoises
        kept = Kept.read(folder, session.slots(node), by_step=by_step, names=names)
        written = time.monotonic()
        for name, task in session.tasks.items():
            fingerprint = {
                **identity,
                "task": task.identity_with(partial(_leaves, session, name)),
            }
            key = digest(fingerprint)
            journal_path = folder / f"{name}.journal"
            if kept.has(name, key):
                journal_path.unlink(missing_ok=True)
            else:
                try:
                    done = _run(session, node, name, journal_path, fingerprint)
                except (TaskFailure, NumericalFailure) as failure:
                    done = Finished.failed(str(failure))
                kept.put(name, key, done, journal_path)
            if time.monotonic() - written >= WRITE_SECONDS:
                kept.write()
                written = time.monotonic()
        kept.write()
        for name, metric in (metrics or {}).items() if node is None else ():
            check_measured(name, metric, kept.samples)
        manifest = _manifest(session, node, kept)
        write_manifest(folder / "eval.json", manifest)
    return manifest


def _manifest(session: Session, node: Node | None, kept: Kept) -> dict[str, Any]:
    tasks = kept.samples.tasks
    results = {name: tasks[name]["result"] for name in session.tasks}
    data = {name: task.data for name, task in session.tasks.items() if task.data}
    return {
        "status": "failed" if any(one["status"] == "failed" for one in results.values()) else "ok",
        **(node.identity() if node else {"criterion": None}),
        "run": session.identity,
        "fingerprints": {name: tasks[name]["fingerprint"] for name in session.tasks},
        **kept.counted(),
        "tasks": results,
        **({"data": data} if data else {}),
    }


def _leaves(session: Session, name: str) -> Mapping[str, Task]:
    return session.prepared(name).leaves


def _run(
    session: Session, node: Node | None, name: str, path: Path, fingerprint: dict[str, Any]
) -> Finished:
    """Run one task, with its journal at `path`.

    Raises:
        TaskFailure: it cannot be run.
        NumericalFailure: NaN or an infinity came up.
    """
    import torch
    from lm_eval import evaluator

    from sparsity_atlas.criteria.base import SequenceCriterion
    from sparsity_atlas.tasks.loaded import seed_as_lm_eval

    task = session.tasks[name]
    # Before anything is attached: it tries the untouched model.
    share = node is None or not isinstance(node.rule, SequenceCriterion)
    prepared = session.prepared(name, share=share)
    # Batches follow from what the model was seen to do right.
    journal = Journal(path, {**fingerprint, "abilities": asdict(prepared.work.abilities)})
    try:
        with torch.no_grad(), session.attach(node) as counter, task.code("cannot be evaluated"):
            # What scores a document may draw, and must not depend on where an earlier run was cut.
            seed_as_lm_eval(session.seed)
            session.lm.start(journal, counter, prepared.work)
            outcome = evaluator.evaluate(
                session.lm,
                prepared.contents,
                limit=task.limit,
                # lm-eval wants it for tasks whose metric is none.
                log_samples=any(
                    "bypass" in getattr(leaf, "_metric_fn_list", ())
                    for leaf in prepared.leaves.values()
                ),
                bootstrap_iters=0,  # intervals come from the sample table
                confirm_run_unsafe_code=task.allow_code,
            )
    finally:
        journal.close()
    usage = session.lm.usage
    return Finished(
        # As a later run reads it from the table, so that eval.json has the same bytes.
        json.loads(canonical(task_result(prepared, outcome, usage, counter.slots))),
        sample_rows(task, prepared, usage),
        {"by_expert": expert_rows(name, usage, counter), "by_step": step_rows(name, usage.by_step)},
    )


def evaluation_code(criterion: dict[str, Any] | None) -> str:
    """Code version of an evaluation, with the criterion's own file."""
    return code_version("evaluate", str(source_file(criterion)) if criterion else None)


def main(
    command: Sequence[str] | None = None,
    open_session: Callable[[Path, dict[str, Any], str], Session] = Session.open,
) -> None:
    """Command line of the stage.

    Args:
        command: its arguments; None for those of this process.
        open_session: how to come by a loaded model: a worker has it already.
    """
    parser = argparse.ArgumentParser(prog="sparsity-atlas evaluate", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="the model's manifest")
    parser.add_argument(
        "--settings", required=True, type=json.loads, help="JSON: tasks and how to run them"
    )
    parser.add_argument(
        "--code", help="code version, part of every fingerprint; unset: of this code"
    )
    parser.add_argument(
        "--metrics", type=json.loads, help="JSON: the metric of each task's curve, to be checked"
    )
    parser.add_argument(
        "--criterion", type=json.loads, help="JSON; without it the dense baseline is run"
    )
    parser.add_argument("--site")
    parser.add_argument("--level")
    parser.add_argument(
        "--calibration", type=cli.optional_path, help="calibration of the criterion, if it has one"
    )
    parser.add_argument("--output", required=True, type=Path, help="eval.json to write")
    arguments = parser.parse_args(command)

    node = None
    calibration = read_calibration(arguments.calibration) if arguments.calibration else None
    if arguments.criterion is not None:
        node = Node.make(arguments.criterion, arguments.site, arguments.level, calibration)
    code = arguments.code or evaluation_code(arguments.criterion)
    session = open_session(arguments.model, arguments.settings, code)
    if calibration is not None:
        session.check_disjoint(calibration)
    result = evaluate_node(session, node, cli.folder_of(arguments.output), arguments.metrics)
    for name, task in result["tasks"].items():
        cli.logger.info("%s: %s", name, task.get("reason") or headline(task))
