"""Stage `truthfulness`: how well numbers of an answer tell whether it is right.

A number's worth is its AUROC, the chance that it is higher for a right answer than for a wrong one: of the
local intrinsic dimension of the last token's vector with its sign turned (2402.18048: right answers have the
lower one), of the induced sparsity of the sample under a node, and of the model's own confidence. Intervals
are by bootstrap over the samples, and so are the differences from the confidence, on the same draws.

Every layer has its numbers. Which of them is best is never read from the samples that it is judged on: the
samples are halved, the layer is picked on one half and judged on the other, and the mean of both is given.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sparsity_atlas import cli
from sparsity_atlas.activations.point_dimension import point_dimensions
from sparsity_atlas.activations.store import ActivationStore
from sparsity_atlas.curves.node_samples import NodeSamples
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.files.parquet import read_parquet, write_parquet
from sparsity_atlas.files.whole import read_manifest
from sparsity_atlas.statistics.auroc import FEWEST_OF_EACH, resampled_aurocs, units_of_each
from sparsity_atlas.statistics.bootstrap import interval
from sparsity_atlas.truthfulness import own_answers
from sparsity_atlas.truthfulness.truth_table import (
    GEOMLE,
    LID,
    LOGPROB,
    MARGIN,
    SCHEMA,
    SPARSITY,
)

# A sample is right where its metric is at least this: for metrics that are shares, as that paper's.
RIGHT = 0.5
# Of the bootstrap: twice as many areas as there are predictors are taken in each.
REPLICATES = 2000


class Predictor(NamedTuple):
    """A number of each sample.

    Attributes:
        about: its columns of `SCHEMA`.
        values: float64 [samples]; NaN where a sample has none of its own.
        sign: -1 where the lower one is taken for right.
        reason: why there are no values.
    """

    about: dict[str, Any]
    values: np.ndarray
    sign: int = 1
    reason: str = ""


@dataclass(frozen=True)
class Outcomes:
    """Which answers of a task were right.

    Attributes:
        right: bool [samples].
        cluster: [samples], or None; see `resampled_aurocs`.
    """

    right: np.ndarray
    cluster: np.ndarray | None

    @classmethod
    def of(cls, samples: pa.Table) -> Outcomes:
        """From rows of `own_answers.SCHEMA`."""
        cluster = samples["cluster"].to_pylist()
        named = None if None in cluster or not cluster else np.array(cluster)
        return cls(samples["value"].to_numpy() >= RIGHT, named)

    def among(self, there: np.ndarray) -> Outcomes:
        """Those of some samples; `there` is bool [samples]."""
        return Outcomes(self.right[there], None if self.cluster is None else self.cluster[there])

    def reason(self) -> str:
        """Why nothing can be said of them; else empty."""
        good, bad = int(self.right.sum()), int((~self.right).sum())
        if not good or not bad:
            return f"all {good + bad} answers are {'right' if good else 'wrong'}"
        few = zip(units_of_each(self.right, self.cluster), ("right", "wrong"), strict=True)
        for count, kind in few:
            if count < FEWEST_OF_EACH:
                what = "answers" if self.cluster is None else "clusters with an answer"
                return f"{count} {what} that are {kind}, {FEWEST_OF_EACH} are needed"
        return ""

    def halves(self, seed: int) -> np.ndarray:
        """Whether a sample is in the first half, bool [samples]; a cluster is in one of them."""
        ids = np.arange(len(self.right)) if self.cluster is None else self.cluster
        names, member = np.unique(ids, return_inverse=True)
        first = np.random.default_rng(seed).permutation(len(names)) < len(names) // 2
        found: np.ndarray = first[member]
        return found


def confidences(samples: pa.Table) -> Iterator[Predictor]:
    """How sure the model was of each answer, from rows of `own_answers.SCHEMA`; the reference last."""
    for name in (LOGPROB, MARGIN):
        values = samples[name].to_numpy(zero_copy_only=False).astype(np.float64)
        if not np.isnan(values).all():
            lacking = int(np.isnan(values).sum())
            yield Predictor(
                {"predictor": name}, values, 1, f"{lacking} answers have none" if lacking else ""
            )


def local_dimensions(
    store: ActivationStore, tensors: Sequence[str], neighbours: int, seed: int
) -> Iterator[Predictor]:
    """Both estimates of each layer's vectors, of each sample among all of them."""
    for tensor in tensors:
        for layer in store.layers(tensor):
            points = store.read(tensor, layer).astype(np.float64)
            reason = ""
            found = (np.empty(0), np.empty(0))
            try:
                found = point_dimensions(points, neighbours, seed)
            except ValueError as error:
                reason = f"{error} for {neighbours} neighbours"
            for name, values in zip((LID, GEOMLE), found, strict=True):
                about = {"predictor": name, "tensor": tensor, "layer": layer}
                yield Predictor(about, values, -1, reason)


def induced_sparsity(folder: Path, node: str, task: str, samples: pa.Table) -> Predictor:
    """What a node dropped in each sample: zeros over entries at its site, all phases together.

    Requests that run the same tokens are counted with the first one's document: a sample of which all are
    another's has no entries, and thus no sparsity.

    Args:
        folder: of the node.
        node: criterion/site/level.
        task: name in the configuration.
        samples: rows of `own_answers.SCHEMA`.
    """
    about = {"predictor": SPARSITY, "node": node}
    evaluated = NodeSamples(folder, node.split("/")[1])
    if not evaluated.ok(task):
        return Predictor(about, np.empty(0), 1, evaluated.manifest["tasks"][task]["reason"])
    rows = evaluated.rows(task)
    entries = evaluated.entries(rows)
    shares = np.full(len(rows), np.nan)
    np.divide(evaluated.zeros(rows), entries, out=shares, where=entries > 0)
    keys = zip(rows["leaf"].to_pylist(), rows["doc_id"].to_pylist(), strict=True)
    known = dict(zip(keys, shares.tolist(), strict=True))
    wanted = zip(samples["leaf"].to_pylist(), samples["doc_id"].to_pylist(), strict=True)
    values = np.array([known.get(key) for key in wanted], dtype=object)
    lacking = sum(value is None for value in values)
    return Predictor(
        about, values.astype(np.float64), 1, f"{lacking} samples are not there" if lacking else ""
    )


def compared(
    outcomes: Outcomes, every: Sequence[Predictor], task: str, replicates: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Rows of `SCHEMA`, one a predictor, and one for each dimension at layers that are picked.

    Args:
        outcomes: of the task's samples, of which something can be said.
        every: the confidences first, the reference last among them.
        task: whose draws of the bootstrap are taken.
        replicates: B.
        seed: of the bootstrap and of the halves.
    """
    every = [_told(outcomes, one) for one in every]
    whole = [one for one in every if not one.reason]
    scores = np.array([one.sign * np.nan_to_num(one.values) for one in whole])
    counts = _counts(outcomes)
    draw = outcomes.right, outcomes.cluster, replicates, (seed, task)
    areas = resampled_aurocs(scores, *draw)
    sure = [i for i, one in enumerate(whole) if one.about["predictor"] in (LOGPROB, MARGIN)]
    place = sure[-1] if sure else None
    reference = None if place is None else areas[:, place]
    named = {"reference": None if place is None else whole[place].about["predictor"]}
    for number, one in enumerate(whole):
        there = ~np.isnan(one.values)
        some = outcomes.among(there)
        told = {**one.about, **_means(one.values[there], some.right), **named, **_counts(some)}
        alone, beside = areas[:, number], reference
        if not there.all():
            # The reference is judged on the same samples.
            pair = scores[[number] if place is None else [number, place]]
            both = resampled_aurocs(pair, *draw, among=there)
            alone, beside = both[:, 0], None if place is None else both[:, 1]
        yield {**told, **_ends(alone, beside)}
    first = outcomes.halves(seed)
    halves = [resampled_aurocs(scores, *draw, among=half) for half in (first, ~first)]
    for name, tensor in _dimensions(whole):
        own = [
            number
            for number, one in enumerate(whole)
            if (one.about["predictor"], one.about.get("tensor")) == (name, tensor)
        ]
        about = {"predictor": name, "tensor": tensor, **counts}
        judged = [_picked(*(half[:, own] for half in pair)) for pair in (halves, halves[::-1])]
        area = np.mean(judged, axis=0)
        if np.isnan(area).any():
            yield {**about, "reason": "a half of the samples has one kind of outcome"}
        else:
            yield {**about, **named, **_ends(area, reference)}
    for one in every:
        if one.reason:
            yield {**one.about, **counts, "reason": one.reason}


def _counts(outcomes: Outcomes) -> dict[str, int]:
    return {"samples": len(outcomes.right), "right": int(outcomes.right.sum())}


def _told(outcomes: Outcomes, one: Predictor) -> Predictor:
    """A predictor, with a reason where those samples that have a number are too few to tell."""
    there = ~np.isnan(one.values)
    if one.reason or there.all():
        return one
    few = outcomes.among(there).reason()
    return one._replace(reason=f"{(~there).sum()} samples have none: {few}" if few else "")


def _dimensions(every: Sequence[Predictor]) -> list[tuple[str, str]]:
    return list(
        dict.fromkeys(
            (one.about["predictor"], one.about["tensor"]) for one in every if "layer" in one.about
        )
    )


def _picked(picking: np.ndarray, judging: np.ndarray) -> np.ndarray:
    """Of [1 + B, layers] areas in two halves, that of the second where the first is largest: [1 + B]."""
    best = np.where(np.isnan(picking), -np.inf, picking).argmax(1)
    found: np.ndarray = judging[np.arange(len(best)), best]
    return found


def _means(values: np.ndarray, right: np.ndarray) -> dict[str, float]:
    return {"mean_right": float(values[right].mean()), "mean_wrong": float(values[~right].mean())}


def _ends(area: np.ndarray, reference: np.ndarray | None) -> dict[str, Any]:
    """An area with its interval, and its difference from the reference with that."""
    columns = {("auroc", "low", "high"): area}
    if reference is not None:
        columns["difference", "difference_low", "difference_high"] = area - reference
    found: dict[str, Any] = {"reason": ""}
    for names, drawn in columns.items():
        value, replicates = float(drawn[0]), drawn[1:]
        ends = interval(value, replicates) if len(replicates) else (None, None)
        found |= dict(zip(names, (value, *ends), strict=True))
    return found


def study(
    answered: Path, nodes: Sequence[tuple[str, Path]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """Rows of `SCHEMA` for one model and task.

    Args:
        answered: manifest of the answers, with their samples and store beside it.
        nodes: criterion/site/level, and the folder of each.
        settings: as `grid.truthfulness_slice` gives it.

    Raises:
        AtlasError: the store is not what the manifest tells of.
    """
    manifest = read_manifest(answered)
    if manifest["status"] != "ok":
        return [{"reason": manifest["reason"], "samples": 0, "right": 0}]
    task, seed = manifest["task"], settings["seed"]
    samples = read_parquet(answered.with_suffix(".parquet"), own_answers.SCHEMA)
    outcomes = Outcomes.of(samples)
    reason = outcomes.reason()
    if reason:
        return [{"reason": reason, **_counts(outcomes)}]
    store = ActivationStore(answered.with_suffix(".zarr"))
    tensors = manifest["tensors"]
    if {name: store.complete(name) for name in tensors} != tensors:
        raise AtlasError(f"{store.path}: not what {answered} tells of; delete both and run again")
    every = [
        *confidences(samples),
        *(induced_sparsity(folder, node, task, samples) for node, folder in nodes),
        *local_dimensions(store, list(tensors), settings["neighbours"], seed),
    ]
    replicates = min(settings["replicates"], REPLICATES)
    return list(compared(outcomes, every, task, replicates, seed))


def main() -> None:
    """Command line of the stage."""
    parser = argparse.ArgumentParser(prog="sparsity-atlas truthfulness", description=__doc__)
    parser.add_argument("--answers", required=True, type=Path, help="manifest of the answers")
    parser.add_argument(
        "--nodes",
        nargs="*",
        default=[],
        type=Path,
        help="eval.json of nodes whose sparsity is asked",
    )
    parser.add_argument(
        "--settings", required=True, type=json.loads, help="JSON: neighbours, bootstrap"
    )
    parser.add_argument("--output", required=True, type=Path, help="Parquet file to write")
    arguments = parser.parse_args()

    nodes = [("/".join(path.parts[-4:-1]), path.parent) for path in arguments.nodes]
    rows = study(arguments.answers, nodes, arguments.settings)
    for one in {row["reason"] for row in rows if row["reason"]}:
        cli.logger.warning("%s: %s", arguments.answers.stem, one)
    write_parquet(arguments.output, pa.Table.from_pylist(rows, SCHEMA))
