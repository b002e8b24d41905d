"""A whole run of a masked-diffusion model beside a causal one: bounds and steps reach the report."""

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
from tiny_lm import (
    CHOICE,
    GENERATION,
    ROLLING,
    choice_documents,
    rolling_documents,
    save_model,
    sentences,
    write_task,
)

FIGURES_OF_STEPS = ("step_sparsity", "step_overlap", "step_layers")
STEPS = 4
WORDS = {**GENERATION["generation_kwargs"], "max_gen_toks": 8, "steps": STEPS}
TASKS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "pages": (ROLLING, rolling_documents(3)),
    "choice": (CHOICE, choice_documents(6)),
    "words": ({**GENERATION, "generation_kwargs": WORDS}, rolling_documents(5, 4)),
}


def configuration(samples: int = 4) -> dict[str, Any]:
    masked = {"path": "models/masked", "batch_size": 8, "diffusion": {"samples": samples}}
    return {
        "replicates": 100,
        "capture": {"text": "words", "tokens": 128, "sequence_length": 16},
        "models": {"masked": masked, "plain": {"path": "models/plain", "batch_size": 8}},
        "texts": {"words": {"file": "words.jsonl"}},
        "tasks": {name: {"task": name, "include": "my_tasks"} for name in TASKS},
        "run": [
            {
                **{"models": ["masked", "plain"], "criteria": ["topp"], "sites": ["intermediate"]},
                **{"levels": ["0.8", "0.5"], "tasks": list(TASKS)},
            }
        ],
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    checkout = Checkout.make(tmp_path_factory.mktemp("diffusion") / "atlas")
    save_diffusion(checkout.path / "models/masked")
    save_model(checkout.path / "models/plain")
    lines = (json.dumps({"text": text}) + "\n" for text in sentences(40))
    (checkout.path / "words.jsonl").write_text("".join(lines))
    for name, (kind, documents) in TASKS.items():
        write_task(checkout.path / "my_tasks", name, documents, **kind)
    done = checkout.run(config=configuration())
    assert done.returncode == 0, done.stdout
    return checkout


def test_whole_texts_have_a_bound_and_it_is_called_so(ran: Checkout) -> None:
    curves = pd.read_csv(ran.results / "curves.csv", dtype={"level": str})
    pages = curves[curves["task"] == "pages"].set_index(["model", "level"])
    assert set(curves["level"]) == {"dense", "0.8", "0.5"}
    assert pages.loc["masked", "kind"].unique().tolist() == ["bound"]
    assert pages.loc["plain", "kind"].unique().tolist() == ["loss"]
    for level in ("dense", "topp/intermediate/0.8", "topp/intermediate/0.5"):
        path = ran.results / f"masked/{level}/eval.json"
        own = json.loads(path.read_text())["tasks"]
        value = pages.loc[("masked", level.rsplit("/")[-1]), "value"]
        assert value == pytest.approx(own["pages"]["bound"])
        assert "loss" not in own["pages"]
    critical = pd.read_csv(ran.results / "critical_sparsity.csv")
    labels = critical[critical["task"] == "pages"].groupby("model")["bar_label"].agg(set)
    assert "PPL-bound-1%" in labels["masked"]
    assert "PPL-1%" in labels["plain"]
    models = pd.read_csv(ran.results / "models.csv").set_index("model")
    assert models["kind"].to_dict() == {"masked": "diffusion", "plain": "causal"}
    assert models.loc["masked", "family"].endswith(", diffusion")
    assert "added loss or bound" in (ran.results / "figures/added_loss.svg").read_text()
    page = " ".join((ran.results / "index.html").read_text().split())
    assert "that of its bound" in page
    assert page.count("of a bound") >= 2  # in the headline and under the model


def test_denoising_is_a_phase(ran: Checkout) -> None:
    own = json.loads((ran.results / "masked/topp/intermediate/0.8/eval.json").read_text())["tasks"]
    assert own["words"]["tokens"]["denoising"] > 0
    assert own["words"]["tokens"]["generation"] == own["words"]["tokens"]["prompt"] == 0
    assert own["choice"]["tokens"]["scoring"] > 0
    assert 0 < own["words"]["sparsity"]["intermediate"]["denoising"] < 1


def test_steps_reach_the_table(ran: Checkout) -> None:
    rows = pd.read_csv(ran.results / "steps.csv", dtype={"level": str})
    rows = rows[rows["task"] == "words"]
    assert set(rows["model"]) == {"masked"}
    assert set(rows["level"]) == {"0.8", "0.5"}
    assert set(rows["step"].dropna()) == set(range(STEPS))
    layers = pd.read_csv(ran.results / "layers.csv", dtype={"level": str})
    layers = layers[(layers["model"] == "masked") & (layers["phase"] == "denoising")]
    for level, own in rows[rows["step"].isna()].groupby("level"):
        # Prompt and answer in all steps are all tokens that the task ran.
        zeros = (own["sparsity"] * own["tokens"]).groupby(own["layer"]).sum()
        shares = zeros / own.groupby("layer")["tokens"].sum()
        wanted = layers[layers["level"] == level]
        assert shares.tolist() == pytest.approx(wanted["sparsity"].tolist(), rel=1e-9)


def test_figures_of_steps_stand_in_the_report(ran: Checkout) -> None:
    page = (ran.results / "index.html").read_text(encoding="utf-8")
    for name in FIGURES_OF_STEPS:
        assert not shows_nothing((ran.results / f"figures/{name}.svg").read_bytes())
        assert f'id="figure-{name}"' in page
        assert FIGURES[name].title in page


def test_untouched_and_causal_models_have_no_steps(ran: Checkout) -> None:
    found = {path.relative_to(ran.results).parts for path in ran.results.rglob(NAME)}
    assert found == {("masked", "topp", "intermediate", level, NAME) for level in ("0.8", "0.5")}


def test_its_settings_run_its_nodes_again_alone(ran: Checkout) -> None:
    planned = ran.plan(config=configuration(samples=5))
    assert planned.of("dense", "evaluate", "models", "capture") == {
        "dense masked/dense/eval.json",
        "evaluate masked/topp/intermediate/0.8/eval.json",
        "evaluate masked/topp/intermediate/0.5/eval.json",
    }


def test_a_node_alone_has_the_same_bytes(ran: Checkout) -> None:
    """Asked for by its path, after what it had was lost."""
    path = ran.results / "masked/topp/intermediate/0.5" / NAME
    content = path.read_bytes()
    assert "words" in read_table(path).tasks
    for one in path.parent.iterdir():
        if one.is_file():
            one.unlink()
    done = ran.run("results/masked/topp/intermediate/0.5/eval.json", config=configuration())
    assert done.returncode == 0, done.stdout
    assert path.read_bytes() == content
