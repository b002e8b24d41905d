"""Prompts and what was answered, request by request: kept beside the samples where the user asks for them.

They hold the tasks' documents, which may be nobody else's to read: the file is its owner's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from sparsity_atlas.evaluation.headed_table import CountTable, read_headed

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from sparsity_atlas.sparsify.counted_vectors import Slot
    from sparsity_atlas.tasks.prepared import Prepared

NAME = "texts.parquet"
SCHEMA = pa.schema(
    [
        ("task", pa.string()),  # key in the configuration
        ("leaf", pa.string()),  # lm-eval's task; differs for a group
        ("doc_id", pa.int64()),
        ("request", pa.int64()),  # of the document's, in lm-eval's order
        ("kind", pa.string()),  # loglikelihood, loglikelihood_rolling or generate_until
        (
            "prompt",
            pa.string(),
        ),  # as the model gets it, before it is cut; of a whole document the document
        ("continuation", pa.string()),  # that is scored behind it; null: none is given
        ("target", pa.string()),  # what the task takes for right
        ("log_likelihood", pa.float64()),  # of what is scored
        ("greedy", pa.bool_()),  # whether the continuation is what the model would say
        ("generated", pa.list_(pa.string())),  # texts; null: nothing is generated
        # What lm-eval's filters make of these, by filter.
        ("filtered", pa.map_(pa.string(), pa.list_(pa.string()))),
    ]
)


def columns(slots: Sequence[Slot]) -> list[list[Any]]:
    """What a header says of them: nothing is counted there."""
    return [[name] for name in SCHEMA.names]


def text_rows(task: str, prepared: Prepared) -> pa.Table:
    """A task's rows, by leaf, document and request as the samples stand.

    Args:
        task: key in the configuration.
        prepared: after the run.
    """
    rows = []
    for name in sorted(prepared.leaves):
        leaf = prepared.leaves[name]
        targets: dict[int, str] = {}
        for one in sorted(leaf.instances, key=lambda one: (one.doc_id, one.idx)):
            if one.doc_id not in targets:
                targets[one.doc_id] = str(leaf.doc_to_target(one.doc))
            key = {"task": task, "leaf": name, "doc_id": one.doc_id, "request": one.idx}
            rows.append({**key, "target": targets[one.doc_id], **_answered(one)})
    return pa.Table.from_pylist(rows, SCHEMA)


def _answered(one: Instance) -> dict[str, Any]:
    kind, answers = one.request_type, one.resps
    asked = {"kind": kind, "prompt": str(one.args[0])}
    if kind == "generate_until":
        filtered = [(name, _texts(found)) for name, found in one.filtered_resps.items()]
        return {**asked, "generated": _texts(answers), "filtered": filtered}
    if kind == "loglikelihood":
        value, greedy = answers[0]
        asked |= {"continuation": str(one.args[1]), "greedy": bool(greedy)}
        return {**asked, "log_likelihood": float(value)}
    return {**asked, "log_likelihood": float(answers[0])}


def _texts(found: Any) -> list[str]:
    """Texts of an answer that may be one, or several that were sampled."""
    return [str(text) for text in found] if isinstance(found, list | tuple) else [str(found)]


def read_table(path: Path) -> CountTable:
    """Read a table.

    Raises:
        AtlasError: missing, damaged, or of a newer format.
    """

    def check(header: dict[str, Any]) -> None:
        tasks = header["tasks"]
        if not (isinstance(tasks, dict) and all(isinstance(one, str) for one in tasks.values())):
            raise TypeError("tasks have a fingerprint")
        if not isinstance(header["slots"], list):
            raise TypeError("slots are the columns")

    header, table = read_headed(path, SCHEMA, check)
    # Parquet has names of its own for the parts of lists and maps.
    table = table.replace_schema_metadata(None).cast(SCHEMA)
    rows = {name: table.filter(pc.equal(table["task"], name)) for name in header["tasks"]}
    return CountTable(header["slots"], header["tasks"], rows)
