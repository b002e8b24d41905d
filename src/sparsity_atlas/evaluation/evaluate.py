"""Stage `evaluate`: one node (or the dense baseline) on all its tasks.

A node's folder holds `samples.parquet` with every finished task (of a mixture of experts also
`experts.parquet`, of a masked-diffusion model `steps.parquet`), a journal for the task in hand, and
`eval.json`, written last. A task that stands in these tables under the same fingerprint is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsity_atlas import cli
from sparsity_atlas.code_version import code_version
from sparsity_atlas.criteria import source_file
from sparsity_atlas.criteria.calibration_file import read_calibration
from sparsity_atlas.errors import AtlasError, NumericalFailure, TaskFailure
from sparsity_atlas.evaluation.expert_table import expert_rows
from sparsity_atlas.evaluation.kept import TEXTS, Finished, Kept
from sparsity_atlas.evaluation.node import Node
from sparsity_atlas.evaluation.outcome import check_measured, headline, sample_rows, task_result
from sparsity_atlas.evaluation.session import Session
from sparsity_atlas.evaluation.step_table import step_rows
from sparsity_atlas.evaluation.texts.text_table import text_rows
from sparsity_atlas.files.journal import Journal
from sparsity_atlas.files.whole import canonical, digest, locked, write_manifest
from sparsity_atlas.progress import Progress, ShareDone
from sparsity_atlas.sites.available import Available

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from sparsity_atlas.lm.work import Arranged


# The table is written whole, once in so many seconds; until then a finished task's journal stays.
WRITE_SECONDS = 30.0


def evaluate_node(
    session: Session,
    node: Node | None,
    folder: Path,
    metrics: dict[str, str | None] | None = None,
    told: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Evaluate one node on the session's loaded model, continuing what `folder` already holds.

    Args:
        session: model and tasks.
        node: None for the dense baseline.
        folder: where the node's files are kept.
        metrics: of tasks, as the configuration names them; looked at here, if given, so that one that
            there will not be is known before the first forward pass.
        told: takes the share of it that is done, after each batch.

    Returns:
        What was written to `eval.json`. A task that cannot be run, or in which NaN or an infinity came
        up, has the status `failed` and the reason; the others are not affected.

    Raises:
        AtlasError: a rule that leaves a part of the prompt dense, of a model that has no such pass; a metric
            that a task does not report; of the dense baseline also one that is not there
            of each document, after the samples are kept.
    """
    for name, metric in (metrics or {}).items():
        session.check_metric(name, metric)
    if node and node.rule.dense_prompt is not None and session.lm.denoises:
        raise AtlasError(
            "criteria: dense_prompt: a masked-diffusion model runs its prompt with its answer in each step; "
            "leave it out"
        )
    identity = {**session.identity, **(node.identity() if node else {"criterion": None})}
    names = Available.in_parts(session.parts).names("of this run", node.site) if node else ()
    identity |= {"site": names[0]} if names else {}
    with locked(folder / ".lock"):
        by_step = node is not None and session.lm.denoises
        kept = Kept.read(
            folder,
            session.slots(node),
            by_step=by_step,
            texts=session.keep_texts,
            names=names,
        )
        written = time.monotonic()
        session.lm.forget_early()
        done = ShareDone(session.tasks, told)
        turns = _Turns(session, node, kept, identity, done)
        for name in turns:
            task = session.tasks[name]
            fingerprint = {
                **identity,
                "task": task.identity_with(partial(_leaves, session, name)),
            }
            key = digest(fingerprint)
            journal_path = _journal(folder, name)
            if kept.has(name, key):
                journal_path.unlink(missing_ok=True)
                done.leave(name)
            else:
                try:
                    found = run_task(session, node, name, journal_path, fingerprint, turns)
                except (TaskFailure, NumericalFailure) as failure:
                    found = Finished.failed(str(failure))
                kept.put(name, key, found, journal_path)
                done.end(name)
            if time.monotonic() - written >= WRITE_SECONDS:
                kept.write()
                written = time.monotonic()
        kept.write()
        if node is None:
            from sparsity_atlas.evaluation.gates.measured_gates import keep_gates

            for name, metric in (metrics or {}).items():
                check_measured(name, metric, kept.samples)
            keep_gates(session, folder, kept.samples.finished())
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


def _journal(folder: Path, name: str) -> Path:
    return folder / f"{name}.journal"


class _Turns:
    """Which task is run next: the first that is left whose requests nobody is building.

    Results do not depend on the order: each task has seeds of its own, and tables are sorted.
    """

    def __init__(
        self,
        session: Session,
        node: Node | None,
        kept: Kept,
        identity: dict[str, Any],
        done: ShareDone,
    ) -> None:
        self._session, self._node, self._kept, self._identity = session, node, kept, identity
        self.done = done
        self._left = list(session.tasks)
        self._chosen: str | None = None
        self._looked_at: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        """The tasks, each when its turn comes."""
        while self._left:
            name = self._chosen or self._session.ahead.first_of(self._left)
            self._chosen = None
            self._left.remove(name)
            yield name

    def following(self) -> Arranged | None:
        """What is run next, if that is a task from its beginning; see `JournalledLM.following`."""
        for name in self._left:
            if self._session.ahead.ready(name):
                found = self._from_its_beginning(name)
                self._chosen = name if found else None
                return found
        return None

    def not_seen_to_fit(self) -> list[Arranged]:
        """The batches of tasks to come whose room nobody has looked at: of each when it is at hand.

        Where no process builds requests beside this one, they are built here, all before the first pass.
        """
        found = []
        for name in self._left:
            if name in self._looked_at or self._session.tasks[name].unfollowed:
                continue
            if self._is_kept(name):
                work = None
            elif self._session.ahead.process is None:
                try:
                    work = self._session.prepared(name, share=_shares(self._node)).work
                except (TaskFailure, NumericalFailure):
                    work = None  # which comes up again when its turn comes
            elif self._session.ahead.ready(name):
                work = self._session.at_hand(name, share=_shares(self._node))
            else:
                continue
            self._looked_at.add(name)
            if work is not None:
                self.done.know(name, work.positions)
                found.append(work)
        return found

    def _is_kept(self, name: str) -> bool:
        identity = self._session.tasks[name].identity
        return self._kept.has(name, digest({**self._identity, "task": identity}))

    def _from_its_beginning(self, name: str) -> Arranged | None:
        task = self._session.tasks[name]
        if task.unfollowed or _journal(self._kept.folder, name).exists():
            return None
        if self._is_kept(name):
            return None
        return self._session.at_hand(name, share=_shares(self._node))


def _shares(node: Node | None) -> bool:
    """Whether requests may share what they have in common, where the model can."""
    return node is None or not node.rule.sees_sequences


def _leaves(session: Session, name: str) -> Mapping[str, Task]:
    return session.prepared(name).leaves


def run_task(
    session: Session,
    node: Node | None,
    name: str,
    path: Path,
    fingerprint: dict[str, Any],
    turns: _Turns | None = None,
) -> Finished:
    """Run one task, with its journal at `path`; `turns` knows what is run after it.

    Raises:
        TaskFailure: it cannot be run.
        NumericalFailure: NaN or an infinity came up.
    """
    import torch
    from lm_eval import evaluator

    from sparsity_atlas.tasks.loaded import seed_as_lm_eval

    task = session.tasks[name]
    # Before anything is attached: it tries the untouched model.
    prepared = session.prepared(name, share=_shares(node))
    fitting = turns.not_seen_to_fit() if turns else []
    # Batches follow from what the model was seen to do right.
    journal = Journal(path, {**fingerprint, "abilities": asdict(prepared.work.abilities)})
    try:
        with torch.no_grad(), session.attach(node) as counter, task.code("cannot be evaluated"):
            # What scores a document may draw, and must not depend on where an earlier run was cut.
            seed_as_lm_eval(session.seed)
            session.lm.following = turns.following if turns else lambda: None
            session.lm.fitting = fitting
            if turns:
                turns.done.begin(name, prepared.work.positions)
                session.lm.ran = turns.done.ran
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
        session.lm.ran = lambda count, now: None
    usage = session.lm.usage
    return Finished(
        # As a later run reads it from the table, so that eval.json has the same bytes.
        json.loads(canonical(task_result(prepared, outcome, usage, counter.slots))),
        sample_rows(task, prepared, usage),
        {
            **{"by_expert": expert_rows(name, usage, counter)},
            **{"by_step": step_rows(name, usage.by_step)},
            **({TEXTS: text_rows(name, prepared)} if session.keep_texts else {}),
        },
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
    progress = Progress("evaluated", 1)
    folder = cli.folder_of(arguments.output)
    result = evaluate_node(session, node, folder, arguments.metrics, progress.reach)
    for name, task in result["tasks"].items():
        cli.logger.info("%s: %s", name, task.get("reason") or headline(task))
