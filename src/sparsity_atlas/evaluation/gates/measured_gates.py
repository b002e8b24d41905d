"""What a text before its prompts does to a model's gates: the same tokens with and without it.

Of the first documents of a task with `inserted`, in the dense model, one sequence a pass. Only tokens that
both prompts end with are looked at, so that what was put before them counts in none of the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import torch

from sparsity_atlas.evaluation.gates.gate_table import NAME, SCHEMA, read_table
from sparsity_atlas.evaluation.headed_table import CountTable, continued
from sparsity_atlas.files.whole import digest
from sparsity_atlas.sites.hooks import observe
from sparsity_atlas.tasks.prepared import build

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.lm.journalled import JournalledLM
    from sparsity_atlas.lm.prompts import PromptLM
    from sparsity_atlas.sites.find import Part, Vectors
    from sparsity_atlas.tasks.loaded import LoadedTask
    from sparsity_atlas.tasks.prepared import Prepared

# First documents of each leaf that are looked at.
DOCUMENTS = 64
# ε of an entry near zero is so many standard deviations, by the median absolute deviation (arXiv 2510.01032).
NEAR, KAPPA = 0.13, 1.4826


def gate_numbers(before: Tensor, after: Tensor) -> dict[str, float]:
    """The numbers of SCHEMA, from the gates of the same tokens [tokens, width].

    near_zero: share with |g| ≤ ε, where ε = 0.13 · 1.4826 · MAD(|g|) of all entries before; the same ε after.
    l1, l2: mean over tokens of the vectors' norms. gini: of |g|, mean over tokens.
    """
    sizes = before.double().abs()
    middle = sizes.median()
    near = NEAR * KAPPA * (sizes - middle).abs().median()
    found = {}
    for when, values in (("before", before), ("after", after)):
        magnitude = values.double().abs()
        found[f"near_zero_{when}"] = float((magnitude <= near).double().mean())
        found[f"l1_{when}"] = float(magnitude.sum(-1).mean())
        found[f"l2_{when}"] = float(magnitude.norm(dim=-1).mean())
        found[f"gini_{when}"] = float(_gini(magnitude).mean())
    return found


def _gini(magnitude: Tensor) -> Tensor:
    """Gini coefficient of each row; see `metrics.gini`. Of a row of zeros 0."""
    width = magnitude.shape[-1]
    rank = 2 * torch.arange(1, width + 1, device=magnitude.device).double() - width - 1
    total = magnitude.sum(-1)
    return magnitude.sort(-1).values @ rank / (width * torch.where(total > 0, total, 1))


def common_end(before: Sequence[int], after: Sequence[int]) -> int:
    """How many tokens two prompts end with alike."""
    count = 0
    while count < min(len(before), len(after)) and before[-1 - count] == after[-1 - count]:
        count += 1
    return count


def prompts(lm: JournalledLM, task: LoadedTask, seed: int) -> dict[tuple[str, int], list[int]]:
    """Token ids of each document's first prompt; of what is scored without one, of all that is run.

    Raises:
        TaskFailure: as `prepared.prepare`.
    """
    rows, encodings = build(lm, task, seed=seed)
    found: dict[tuple[str, int], list[int]] = {}
    for row, tokens in zip(rows, encodings, strict=True):
        start: list[int] = []
        if row.kind == "loglikelihood_rolling":
            first = [] if lm.prefix_token_id is None else [lm.prefix_token_id]
            start = [*first, *(tokens[1] if len(tokens) > 1 else [])]
        # Where there is no prompt, what is scored is looked at.
        answer = tokens[1] if row.kind == "loglikelihood" and row.arguments[0] == "" else []
        found.setdefault((row.leaf, row.doc_id), [*start, *tokens[0], *answer])
    return found


@dataclass(frozen=True)
class _Model:
    lm: PromptLM
    parts: Sequence[Part]

    def gates(self, ids: Sequence[int], last: int) -> dict[tuple[str, int], Tensor]:
        """Of each part and layer with a gate those of the last tokens [tokens, width]."""
        seen: dict[tuple[str, int], Tensor] = {}

        def look(vectors: Vectors) -> None:
            seen[vectors.part.name, vectors.part.layer] = vectors.values[0, -last:].clone()

        model = self.lm.model
        with torch.no_grad(), observe(self.parts, ("gate",), look):
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        return seen


class Untouched(Protocol):
    """What of a `Session` is looked at here."""

    lm: JournalledLM
    parts: list[Part]
    tasks: dict[str, LoadedTask]
    seed: int

    def prepared(self, name: str) -> Prepared:
        """A task with its requests."""


def gate_rows(session: Untouched, name: str) -> pa.Table:
    """A task's rows of SCHEMA; none of a model without gates, or one whose gates are its experts' alone.

    Args:
        session: with the dense model.
        name: of a task with a text before its prompts.

    Raises:
        TaskFailure: as `prepared.prepare`.
    """
    lm, task = session.lm, session.tasks[name]
    parts = [
        part for part in session.parts if "gate" in part.tensors and part.rows_are_tokens("gate")
    ]
    rows: list[dict[str, Any]] = []
    if not parts:
        return SCHEMA.empty_table()
    after = prompts(lm, task, session.seed)
    before = prompts(lm, task.as_it_is(), session.seed)
    clusters = _clusters(session.prepared(name).clusters)
    model = _Model(lm, parts)
    for (leaf, number), ids in after.items():
        if number >= DOCUMENTS:
            continue
        plain = before[leaf, number]
        more = len(ids) - len(plain)
        # As long as the model takes it; what is cut off stands at the beginning.
        plain, ids = plain[-lm.max_length :], ids[-lm.max_length :]
        last = common_end(plain, ids)
        if not last:
            continue
        pair = model.gates(plain, last), model.gates(ids, last)
        about = {"task": name, "leaf": leaf, "doc_id": number, "tokens": last}
        about |= {"cluster": clusters.get((leaf, number)), "inserted": more}
        for (part, layer), gates in pair[0].items():
            numbers = gate_numbers(gates, pair[1][part, layer])
            rows.append({**about, "part": part, "layer": layer, **numbers})
    return pa.Table.from_pylist(rows, SCHEMA)


def _clusters(by_leaf: Mapping[str, Sequence[str | None]]) -> dict[tuple[str, int], str | None]:
    return {(leaf, i): one for leaf, some in by_leaf.items() for i, one in enumerate(some)}


def keep_gates(session: Untouched, folder: Path, keys: Mapping[str, str]) -> None:
    """Write gates.parquet beside a dense baseline, with the tasks that have a text before their prompts.

    Args:
        session: with the dense model.
        folder: of the baseline.
        keys: fingerprints of its finished tasks.
    """
    names = [name for name, task in session.tasks.items() if task.inserted and name in keys]
    path = folder / NAME
    if not names:
        path.unlink(missing_ok=True)
        return
    kept = continued(path, [], read_table)
    found = CountTable([])
    for name in names:
        key = digest([keys[name], DOCUMENTS, NEAR])
        same = kept.tasks.get(name) == key
        found.rows[name] = kept.rows[name] if same else gate_rows(session, name)
        found.tasks[name] = key
    found.write(path)
