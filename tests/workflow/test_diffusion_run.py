"""A whole run of a masked-diffusion model: what was counted over the steps of its texts is in the report."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pytest

from checkout import Checkout
from masked_diffusion import save_diffusion
from sparsity_atlas.evaluation.step_table import NAME, read_table
from sparsity_atlas.figures import FIGURES
from sparsity_atlas.figures.style import shows_nothing
from tiny_lm import GENERATION, rolling_documents, sentences, write_task

FIGURES_OF_STEPS = ("step_sparsity", "step_overlap", "step_layers")
STEPS = 4


def configuration() -> dict[str, Any]:
    return {
        "replicates": 100,
        "capture": {"text": "words", "tokens": 128, "sequence_length": 16},
        "models": {"filled": {"path": "models/filled", "batch_size": 4}},
        "texts": {"words": {"file": "words.jsonl"}},
        "tasks": {"words": {"task": "words", "include": "my_tasks"}},
        "run": [
            {
                **{"models": ["filled"], "criteria": ["topp"], "sites": ["intermediate"]},
                **{"levels": [0.8, 0.5], "tasks": ["words"]},
            }
        ],
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout.make(tmp_path_factory.mktemp("diffusion") / "atlas")
    save_diffusion(checkout.path / "models/filled")
    lines = (json.dumps({"text": text}) + "\n" for text in sentences(40))
    (checkout.path / "words.jsonl").write_text("".join(lines))
    options = {**GENERATION["generation_kwargs"], "max_gen_toks": 8, "steps": STEPS}
    words = {**GENERATION, "generation_kwargs": options}
    write_task(checkout.path / "my_tasks", "words", rolling_documents(5, 4), **words)
    done = checkout.run(config=configuration())
    assert done.returncode == 0, done.stdout
    return checkout


def test_steps_reach_the_table(ran: Checkout) -> None:
    rows = pd.read_csv(ran.results / "steps.csv", dtype={"level": str})
    assert set(rows["level"]) == {"0.8", "0.5"}
    assert set(rows["step"].dropna()) == set(range(STEPS))
    layers = pd.read_csv(ran.results / "layers.csv", dtype={"level": str})
    for level, own in rows[rows["step"].isna()].groupby("level"):
        # Prompt and answer in all steps are all tokens that the task ran.
        zeros = (own["sparsity"] * own["tokens"]).groupby(own["layer"]).sum()
        shares = zeros / own.groupby("layer")["tokens"].sum()
        wanted = layers[(layers["level"] == level) & (layers["phase"] == "all")]
        assert shares.tolist() == pytest.approx(wanted["sparsity"].tolist(), rel=1e-9)


def test_the_figures_stand_in_the_report(ran: Checkout) -> None:
    page = (ran.results / "index.html").read_text(encoding="utf-8")
    for name in FIGURES_OF_STEPS:
        assert not shows_nothing((ran.results / f"figures/{name}.svg").read_bytes())
        assert f'id="figure-{name}"' in page
        assert FIGURES[name].title in page


def test_the_untouched_model_has_no_table(ran: Checkout) -> None:
    assert {path.parent.name for path in ran.results.rglob(NAME)} == {"0.8", "0.5"}


def test_a_node_alone_has_the_same_bytes(ran: Checkout) -> None:
    """Asked for by its path, after what it had was lost."""
    path = ran.results / "filled/topp/intermediate/0.5" / NAME
    content = path.read_bytes()
    assert set(read_table(path).tasks) == {"words"}
    for one in path.parent.iterdir():
        if one.is_file():
            one.unlink()
    done = ran.run("results/filled/topp/intermediate/0.5/eval.json", config=configuration())
    assert done.returncode == 0, done.stdout
    assert path.read_bytes() == content
