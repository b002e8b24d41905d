"""Stage `answers`: what a model answers in a task, and the vectors of each answer's last token.

The task is run as in the dense baseline, with the same batches, so that the answers are those that were
scored there. Then each prompt runs once more with the model's own answer, its last token included, and that
token's vectors are stored. A journal of the task and one of the blocks of vectors lie beside the store while
the job runs: a killed one goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from sparsity_atlas import cli
from sparsity_atlas.activations.layout import Shape
from sparsity_atlas.activations.store import ActivationStore, check_space
from sparsity_atlas.code_version import code_version
from sparsity_atlas.errors import AtlasError, NumericalFailure, TaskFailure
from sparsity_atlas.evaluation.evaluate import run_task
from sparsity_atlas.evaluation.session import Session
from sparsity_atlas.files.journal import Journal
from sparsity_atlas.files.parquet import write_parquet
from sparsity_atlas.files.whole import digest, locked, read_manifest, write_manifest
from sparsity_atlas.tasks.score import choose_metric, sample_values
from sparsity_atlas.terms import CAUSAL
from sparsity_atlas.truthfulness.answered import Answer, answers, check_answered

if TYPE_CHECKING:
    from sparsity_atlas.tasks.prepared import Prepared
    from sparsity_atlas.truthfulness.last_tokens import Place, Prompted

SCHEMA = pa.schema(
    [
        ("leaf", pa.string()),  # lm-eval's task
        ("doc_id", pa.int64()),
        ("cluster", pa.string()),  # items made alike; null: each item by itself
        ("value", pa.float64()),  # of the metric
        ("tokens", pa.int64()),  # of the answer
        ("logprob", pa.float64()),  # mean over the answer's tokens, nats
        ("margin", pa.float64()),  # of the choice above the next option; null where it was written
    ]
)
# Batches of a block, which is stored at once.
BATCHES = 16


class Answered(NamedTuple):
    """A sample: its row of `SCHEMA` as far as it is known before the last pass, and what runs there."""

    row: dict[str, Any]
    prompted: Prompted


def asked(
    session: Session, name: str, journal: Path, study: dict[str, Any], fingerprint: dict[str, Any]
) -> tuple[list[Answered], dict[str, Any]]:
    """Run a task and find its answers.

    Args:
        session: with the task.
        name: of the task.
        journal: of the task's batches.
        study: as `grid.answers_slice` gives it.
        fingerprint: of the dense task.

    Returns:
        The answers, in the order of leaf and document, and what the manifest says of them.

    Raises:
        TaskFailure, NumericalFailure: the task cannot be run, or has no metric of each document.
        AtlasError: its metric is a loss.
    """
    finished = run_task(session, None, name, journal, fingerprint)
    kind, key = choose_metric(name, study["metric"], finished.result)
    if kind != "accuracy" or key is None:
        raise AtlasError(
            f"studies.truthfulness.tasks: '{name}' has a {kind}, by which nothing is right"
        )
    rows = finished.samples.to_pylist()
    values = sample_values(name, key, (row["metrics"] for row in rows))
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(study["samples"], len(rows))).round())
    places = chosen.astype(int).tolist()
    prepared = session.prepared(name)
    found: list[tuple[dict[str, Any], Answer]] = []
    for leaf in dict.fromkeys(rows[place]["leaf"] for place in places):
        own = [place for place in places if rows[place]["leaf"] == leaf]
        documents = [rows[place]["doc_id"] for place in own]
        given = answers(prepared.leaves[leaf], key, documents)
        for place, answer in zip(own, given, strict=True):
            about = {one: rows[place][one] for one in ("leaf", "doc_id", "cluster")}
            found.append(({**about, "value": values[place], "margin": answer.margin}, answer))
    every = _prompted(session, [answer for _, answer in found])
    told = [
        Answered({**row, "tokens": one.answered}, one)
        for (row, _), one in zip(found, every, strict=True)
        if one is not None
    ]
    counts = {"documents": len(rows), "without_answer": len(found) - len(told)}
    return told, {"metric": key, **counts}


def _prompted(session: Session, given: Sequence[Answer]) -> list[Prompted | None]:
    """Token ids of prompts and answers, cut on the left to what the model can read; None: no answer."""
    from lm_eval.api.instance import Instance

    from sparsity_atlas.truthfulness.last_tokens import Prompted

    lm = session.lm
    requests = [
        Instance("loglikelihood", {}, (one.prompt, one.text), 0, metadata=("answers", number, 1))
        for number, one in enumerate(given)
        if one.text
    ]
    found: list[Prompted | None] = [None] * len(given)
    for request, encoded in zip(requests, lm.encode("loglikelihood", requests), strict=True):
        prompt, answer = encoded
        if answer:
            tokens = np.array([*prompt, *answer][-lm.max_length :], np.int64)
            found[request.doc_id] = Prompted(tokens, min(len(answer), len(tokens)))
    return found


def capture_last(
    session: Session,
    prepared: Prepared,
    told: Sequence[Answered],
    tensors: Sequence[str],
    store_path: Path,
    fingerprint: dict[str, Any],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run all prompts with their answers and store the vectors of last tokens, a row a sample.

    Args:
        session: model.
        prepared: the task.
        told: the samples.
        tensors: names of tensors, and `RESIDUAL`.
        store_path: the Zarr store.
        fingerprint: of everything that the vectors depend on.

    Returns:
        Rows of `SCHEMA`, and the store's record of each tensor.

    Raises:
        NumericalFailure: NaN or an infinity came up.
    """
    from sparsity_atlas.truthfulness.last_tokens import places

    wanted = places(session.parts, tensors)
    # A model whose numbers follow the longest sequence of a batch sees each by itself.
    batch = 1 if prepared.work.abilities.follows else session.lm.batch_size
    block = min(BATCHES * batch, len(told))
    key, dtype = digest(fingerprint), session.identity["dtype"]
    layers = {tensor: [layer for name, layer in wanted if name == tensor] for tensor in tensors}
    plan = {"fingerprint": key, "block": block}
    journal = Journal(store_path.with_suffix(".zarr.journal"), plan)
    if journal.records and not store_path.is_dir():
        journal.delete()  # the store was deleted, the journal beside it was not
        journal = Journal(journal.path, plan)
    try:
        if not journal.records:
            shutil.rmtree(store_path, ignore_errors=True)  # of another study
            item = session.lm.model.dtype.itemsize
            check_space(store_path, sum(wanted.values()) * item * len(told))
        store = ActivationStore(store_path, writable=True)
        if not journal.records:
            for tensor, own in layers.items():
                shapes = {layer: Shape(1, wanted[tensor, layer], 0) for layer in own}
                store.create(tensor, shapes, len(told), block, dtype)
        for start in range(len(journal.records) * block, len(told), block):
            some = [one.prompted for one in told[start : start + block]]
            vectors, likely = _block(session, wanted, some, batch)
            checksums = {
                tensor: [store.put(tensor, layer, start, vectors[tensor, layer]) for layer in own]
                for tensor, own in layers.items()
            }
            journal.append({"checksums": checksums, "logprob": likely})
            cli.logger.info("%d of %d answers are captured", start + len(some), len(told))
        for tensor, own in layers.items():
            blocks = [one["checksums"][tensor] for one in journal.records]
            record = {"fingerprint": key, "dtype": dtype, "rows": block, "blocks": blocks}
            store.finish(tensor, {**record, "layers": own})
        store.sweep()
    finally:
        journal.close()
    means = [one for record in journal.records for one in record["logprob"]]
    samples = [{**one.row, "logprob": mean} for one, mean in zip(told, means, strict=True)]
    return samples, {tensor: store.complete(tensor) for tensor in layers}


def _block(
    session: Session, wanted: dict[Place, int], some: Sequence[Prompted], batch: int
) -> tuple[dict[Place, np.ndarray], list[float | None]]:
    """Vectors of a block's last tokens as they are stored, and each answer's mean log-probability."""
    from sparsity_atlas.activations.spool import as_stored
    from sparsity_atlas.truthfulness.last_tokens import run

    # Alike in length, so that little is filled up.
    order = sorted(range(len(some)), key=lambda row: len(some[row].tokens))
    pieces: dict[Place, list[np.ndarray]] = {place: [] for place in wanted}
    likely = np.empty(len(some))
    for first in range(0, len(some), batch):
        rows = order[first : first + batch]
        made, likely[rows] = run(
            session.parts, list(wanted), [some[row] for row in rows], session.lm.padding_id
        )
        for place, values in made.items():
            pieces[place].append(as_stored(values, session.identity["dtype"]))
    back = np.argsort(order)
    vectors = {place: np.concatenate(own)[back] for place, own in pieces.items()}
    return vectors, [None if np.isnan(one) else float(one) for one in likely]


def _study(
    session: Session, study: dict[str, Any], store: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of `SCHEMA`, and the manifest; journals stay."""
    ((name, task),) = session.tasks.items()
    identity = {**session.identity, "criterion": None}
    fingerprint = {
        **identity,
        "task": task.identity_with(lambda: session.prepared(name).leaves),
    }
    own = {**fingerprint, "study": study}
    about: dict[str, Any] = {"task": name, "fingerprint": digest(own)}
    try:
        told, counts = asked(session, name, store.with_suffix(".journal"), study, fingerprint)
        if not told:
            raise TaskFailure("the model answered nothing")
        prepared = session.prepared(name)
        rows, tensors = capture_last(session, prepared, told, study["tensors"], store, own)
    except (TaskFailure, NumericalFailure) as failure:
        shutil.rmtree(store, ignore_errors=True)
        return [], {**about, "status": "failed", "reason": str(failure), "tensors": {}}
    return rows, {**about, "status": "ok", "samples": len(rows), **counts, "tensors": tensors}


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas answers", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="the model's manifest")
    parser.add_argument(
        "--settings", required=True, type=json.loads, help="JSON: the task and how to run it"
    )
    parser.add_argument(
        "--study", required=True, type=json.loads, help="JSON: metric, tensors, number of samples"
    )
    parser.add_argument("--code", help="code version, part of the fingerprint; unset: of this code")
    parser.add_argument("--output", required=True, type=Path, help="manifest to write")
    parser.add_argument("--samples", required=True, type=Path, help="Parquet file to write")
    arguments = parser.parse_args()

    model = read_manifest(arguments.model)
    if model.get("kind", CAUSAL) != CAUSAL:
        raise AtlasError(
            f"studies.truthfulness.models: '{model['name']}' fills masks in, and its tokens see those behind "
            "them; name the causal ones"
        )
    store = arguments.output.with_suffix(".zarr")
    session = Session.open(
        arguments.model, arguments.settings, arguments.code or code_version("answers")
    )
    for name, task in session.tasks.items():
        check_answered(name, task.leaves.values())
        session.check_metric(name, arguments.study["metric"])
    with locked(store.with_suffix(".lock")):
        rows, manifest = _study(session, arguments.study, store)
        write_parquet(arguments.samples, pa.Table.from_pylist(rows, SCHEMA))
        write_manifest(arguments.output, manifest)
        for end in (".journal", ".zarr.journal"):
            store.with_suffix(end).unlink(missing_ok=True)
    cli.logger.info("%s", manifest.get("reason") or f"{len(rows)} answers")
