#!/usr/bin/env python3
"""Do better demonstrations raise how much can be dropped? Chosen ones against random ones, at equal sparsity.

    python examples/demonstrations.py rank workflow/resources/tasks/cloze.jsonl demonstrations \\
        --model workflow/resources/zoo/small
    snakemake --cores all --configfile=demonstrations/demonstrations.yaml
    python examples/demonstrations.py compare results demonstrations.csv --curve zoo-large/topp/intermediate

`rank` takes items with `context`, `choices` and `answer`. A candidate's worth is the mean log-posterior of
the right options of some other items under a small model when the candidate stands before them. It writes
two lm-eval tasks on the items that are left, which differ in their few-shot sampler alone: `Chosen` takes the
best candidates, lm-eval's own draws anew for each item. `compare` reads both curves of a run: retained
accuracy at equal induced sparsity and critical sparsity, chosen minus random, with 95 % intervals by a
bootstrap over the items, the same ones for both.

This is a reduced form of 2301.11916, which trains concept tokens (prompt tuning) of a task and ranks
candidates by the likelihood of these tokens behind them, then hands the choice on to larger models. Here no
token is trained: that the task is known stands in the posterior of its labels. Models of a few million
parameters hardly learn from demonstrations, so that no difference here is none in large ones.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from lm_eval.api.samplers import ContextSampler

KINDS = ("chosen", "random")
SHOTS, BETWEEN = 4, "\n\n"
TOPP = ("0.98", "0.95", "0.9", "0.8", "0.7", "0.6", "0.5")
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)
MOSTLY = 0.95  # of the draws


class Chosen(ContextSampler):
    """An lm-eval sampler: the candidates with the highest `worth`, the best one next to the question."""

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **_: Any) -> Sequence[Any]:
        """The n best of the pool, without the item in question."""
        pool = [one for one in df or self.fewshot_docs() if one != eval_doc]
        return sorted(pool, key=lambda one: one["worth"])[len(pool) - n :]


def asked(item: dict[str, Any], option: int) -> str:
    """An item with one of its options, as the tasks write it."""
    return f"{item['context']} {item['choices'][option]}"


def log_posteriors(likely: Any, before: str, items: list[dict[str, Any]]) -> np.ndarray:
    """Log-posterior of each item's right option behind a text.

    Args:
        likely: gives the log-likelihood of the ends of texts: [(text, end)] -> [...].
        before: the text.
        items: each with its options.
    """
    pairs = [
        (before + item["context"], f" {option}") for item in items for option in item["choices"]
    ]
    scores = iter(likely(pairs))
    found = []
    for item in items:
        own = np.array([next(scores) for _ in item["choices"]])
        found.append(own[item["answer"]] - np.logaddexp.reduce(own))
    return np.array(found)


def rank(
    likely: Any, candidates: list[dict[str, Any]], others: list[dict[str, Any]]
) -> list[float]:
    """The worth of each candidate: mean log-posterior of the right options of others behind it."""
    return [
        float(log_posteriors(likely, asked(one, one["answer"]) + BETWEEN, others).mean())
        for one in candidates
    ]


def small_model(folder: Path) -> Any:
    """Log-likelihoods of the ends of texts under a model, by lm-eval's own class."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=64)

    def likely(pairs: list[tuple[str, str]]) -> list[float]:
        requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        return [score for score, _ in lm.loglikelihood(requests, disable_tqdm=True)]

    return likely


def sampler_module() -> str:
    """A module with `Chosen` alone: of what a task's code names, the pipeline follows every file."""
    source = Path(__file__).read_text(encoding="utf-8")
    found = (node for node in ast.parse(source).body if getattr(node, "name", "") == "Chosen")
    imports = (
        "from __future__ import annotations",
        "from collections.abc import Sequence\nfrom typing import Any",
        "from lm_eval.api.samplers import ContextSampler\n",
    )
    return "\n\n".join([*imports, f"{ast.get_source_segment(source, next(found))}\n"])


def write_tasks(folder: Path, pool: list[dict[str, Any]], items: list[dict[str, Any]]) -> None:
    """The pool, the items, a task for each kind of demonstrations, and what has the pipeline run both."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in (("pool", pool), ("items", items)):
        # Both with the same fields, or the data set could not be read.
        lines = "".join(json.dumps({"worth": 0.0, **one}) + "\n" for one in some)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "chosen_demonstrations.py").write_text(sampler_module(), encoding="utf-8")
    files = {name: str((folder / f"{name}.jsonl").resolve()) for name in ("pool", "items")}
    for kind in KINDS:
        task = {
            **{"task": f"{kind}_demonstrations", "dataset_path": "json"},
            "dataset_kwargs": {"data_files": {"test": files["items"], "train": files["pool"]}},
            **{"test_split": "test", "fewshot_split": "train", "num_fewshot": SHOTS},
            **{"output_type": "multiple_choice", "doc_to_text": "context", "target_delimiter": " "},
            **{"doc_to_choice": "choices", "doc_to_target": "answer", "fewshot_delimiter": BETWEEN},
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        text = yaml.safe_dump(task)
        if kind == "chosen":
            text += "fewshot_config: {sampler: !function chosen_demonstrations.Chosen}\n"
        (folder / f"{kind}.yaml").write_text(text, encoding="utf-8")
    about = {"include": str(folder), "cluster": "template"}
    tasks = {kind: {"task": f"{kind}_demonstrations", **about} for kind in KINDS}
    block = {"models": ["zoo-large"], "criteria": ["topp"], "sites": ["intermediate"]}
    run = [{**block, "levels": [float(level) for level in TOPP], "tasks": list(KINDS)}]
    config = yaml.safe_dump({"tasks": tasks, "run": run, "compare": []})
    (folder / "demonstrations.yaml").write_text(config, encoding="utf-8")


def difference(apart: np.ndarray) -> dict[str, float]:
    """As measured, and its 95 % interval, from [1 + draws]; none where few of the draws have both curves."""
    known = np.isfinite(apart)
    drawn = float(known[1:].mean())
    ends = np.percentile(apart[1:][known[1:]], (2.5, 97.5)) if drawn >= MOSTLY else (np.nan,) * 2
    value = apart[0] if known[0] else np.nan
    return {"difference": value, "low": ends[0], "high": ends[1], "drawn": drawn}


def differences(results: Path, curve: str, replicates: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Chosen minus random, at equal induced sparsities and where 99 % of dense accuracy are crossed."""
    from sparsity_atlas.curves.critical import crossings, usable
    from sparsity_atlas.curves.curve import task_samples
    from sparsity_atlas.curves.equal_sparsity import at_sparsities
    from sparsity_atlas.curves.node_samples import NodeSamples
    from sparsity_atlas.statistics.bootstrap import estimate

    folder = results / curve
    site = folder.name
    levels = sorted(folder.glob("*/eval.json"), key=lambda path: -float(path.parent.name))
    nodes = [NodeSamples(path.parent, site) for path in levels]
    dense = NodeSamples(folder.parents[1] / "dense", site)
    columns: dict[str, dict[str, np.ndarray]] = {}
    for kind in KINDS:
        samples = task_samples(kind, None, dense, nodes)
        if samples is None:
            raise SystemExit(f"error: {dense.folder}: '{kind}' failed")
        # Under one name both have the same draws.
        estimates = estimate(replace(samples, task="demonstrations"), replicates, seed)
        own = columns[kind] = {"dense accuracy": estimates.dense_value}
        places = at_sparsities(estimates, SPARSITIES).T
        own |= {
            f"retained at {s:.0%}": values for s, values in zip(SPARSITIES, places, strict=True)
        }
        scores = usable(estimates)
        own["critical sparsity"] = (
            np.full(len(estimates.value), np.nan)
            if scores is None
            else crossings(estimates, scores, 0.99)
        )
    rows = []
    for name, chosen in columns["chosen"].items():
        other = columns["random"][name]
        with np.errstate(invalid="ignore"):  # two that are never crossed
            apart = chosen - other
        about = {"measure": name, "chosen": chosen[0], "random": other[0]}
        rows.append({**about, **difference(apart)})
    return pd.DataFrame(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages = parser.add_subparsers(dest="what", required=True)
    one = stages.add_parser("rank")
    one.add_argument("items", type=Path, help="JSONL with context, choices and answer")
    one.add_argument("output", type=Path, help="folder of the tasks")
    one.add_argument("--model", type=Path, required=True, help="folder of the small model")
    one.add_argument("--candidates", type=int, default=100)
    one.add_argument("--others", type=int, default=50, help="items that candidates are tried on")
    one.add_argument("--most", type=int, default=600, help="items of the tasks")
    two = stages.add_parser("compare")
    two.add_argument("results", type=Path)
    two.add_argument("output", type=Path, help="CSV file to write")
    two.add_argument("--curve", required=True, help="model/criterion/site")
    arguments = parser.parse_args()
    if arguments.what == "compare":
        found = differences(arguments.results, arguments.curve)
        found.to_csv(arguments.output, index=False, float_format="%.4g")
        sys.stdout.write(found.round(3).to_string(index=False) + "\n")
        return
    lines = arguments.items.read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    count, tried = arguments.candidates, arguments.candidates + arguments.others
    pool, others = items[:count], items[count:tried]
    for item, worth in zip(pool, rank(small_model(arguments.model), pool, others), strict=True):
        item["worth"] = worth
    write_tasks(arguments.output, pool, items[tried : tried + arguments.most])


if __name__ == "__main__":
    main()
