"""A whole run of a mixture of experts beside a dense model: what was counted by expert reaches the report."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest

from checkout import ROOT, Checkout
from sparsity_atlas.evaluation.expert_table import NAME, read_table
from sparsity_atlas.figures import FIGURES
from sparsity_atlas.figures.style import shows_nothing
from tiny_lm import CHOICE, choice_documents, save_model, sentences, write_task

EXPERTS, EACH = 6, 2
FIGURES_OF_EXPERTS = ("expert_sparsity", "expert_load")


def configuration() -> dict[str, Any]:
    models = ["routed", "plain"]
    return {
        "replicates": 100,
        "capture": {"text": "words", "tokens": 128, "sequence_length": 16},
        "models": {name: {"path": f"models/{name}", "batch_size": 4} for name in models},
        "texts": {"words": {"file": "words.jsonl"}},
        "tasks": {"choice": {"task": "choice", "include": "my_tasks"}},
        "run": [
            {
                **{"models": models, "criteria": ["topp"], "sites": ["intermediate"]},
                **{"levels": [0.8, 0.5], "tasks": ["choice"]},
            }
        ],
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout.make(tmp_path_factory.mktemp("mixture") / "atlas")
    save_model(checkout.path / "models/plain")
    save_model(
        checkout.path / "models/routed",
        kind="olmoe",
        num_experts=EXPERTS,
        num_experts_per_tok=EACH,
        intermediate_size=16,
    )
    lines = (json.dumps({"text": text}) + "\n" for text in sentences(40))
    (checkout.path / "words.jsonl").write_text("".join(lines))
    write_task(checkout.path / "my_tasks", "choice", choice_documents(8), **CHOICE)
    done = checkout.run(config=configuration())
    assert done.returncode == 0, done.stdout
    return checkout


def test_what_was_counted_reaches_the_table(ran: Checkout) -> None:
    rows = pd.read_csv(ran.results / "experts.csv", dtype={"level": str}, keep_default_na=False)
    assert set(rows["model"]) == {"routed"}
    assert set(rows["level"]) == {"dense", "0.8", "0.5"}
    assert set(zip(rows["task"], rows["phase"], strict=True)) == {
        ("choice", "scoring"),
        ("average", ""),
    }
    assert len(rows) == 3 * 2 * 2 * EXPERTS
    layers = pd.read_csv(ran.results / "layers.csv", dtype={"level": str})
    for level in ("0.8", "0.5"):
        (counted,) = read_table(
            ran.results / f"routed/topp/intermediate/{level}" / NAME
        ).rows.values()
        sums = counted.to_pandas().groupby("layer")[["zeros", "entries"]].sum()
        own = layers[(layers["model"] == "routed") & (layers["level"] == level)]
        shares = sums["zeros"] / sums["entries"]
        assert own["sparsity"].tolist() == pytest.approx(shares.tolist(), rel=1e-9)


def test_the_figures_stand_in_the_report(ran: Checkout) -> None:
    page = (ran.results / "index.html").read_text(encoding="utf-8")
    for name in FIGURES_OF_EXPERTS:
        svg = (ran.results / f"figures/{name}.svg").read_bytes()
        assert not shows_nothing(svg)
        assert f'id="figure-{name}"' in page
        assert FIGURES[name].title in page


def test_dense_models_have_no_table_by_expert(ran: Checkout) -> None:
    folders = {path.parent.relative_to(ran.results).parts[0] for path in ran.results.rglob(NAME)}
    assert folders == {"routed"}
    assert "by_expert" not in json.loads((ran.results / "plain/dense/eval.json").read_text())


def test_a_second_run_does_nothing(ran: Checkout) -> None:
    before = ran.times()
    done = ran.run(config=configuration())
    assert "Nothing to be done" in done.stdout
    assert ran.times() == before


def test_a_run_of_dense_models_has_neither_figures_nor_rows(ran: Checkout) -> None:
    config = configuration()
    config["run"][0]["models"] = ["plain"]
    done = ran.run(config=config)
    assert done.returncode == 0, done.stdout
    assert not [name for name in FIGURES_OF_EXPERTS if list(ran.results.glob(f"figures/{name}.*"))]
    assert len((ran.results / "experts.csv").read_text().splitlines()) == 1
    page = (ran.results / "index.html").read_text(encoding="utf-8")
    assert not [name for name in FIGURES_OF_EXPERTS if FIGURES[name].title in page]


def test_documented_columns_are_those_of_the_file(ran: Checkout) -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    section = text.split("/experts.parquet`\n")[1].split("\n###")[0]
    table = read_table(ran.results / "routed/dense" / NAME)
    (rows,) = table.rows.values()
    named = [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]
    assert named == rows.column_names
