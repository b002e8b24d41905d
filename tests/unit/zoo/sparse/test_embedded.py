"""The embedded models that differ from the middle one in their FFN or are trained for zeros, and tiny."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from model_parts import ffns_of
from sparsity_atlas.loading.checkpoint import Checkpoint
from sparsity_atlas.loading.pretrained import load, load_tokenizer
from sparsity_atlas.models.manifest import describe
from sparsity_atlas.sites.find import bind_parts, describe_parts, find_parts, observe
from sparsity_atlas.zoo import card, recipe
from sparsity_atlas.zoo.sparse.penalty import Stages
from sparsity_atlas.zoo.sparse.variants import variant

pytestmark = pytest.mark.usefixtures("one_thread")

ZOO = Path(__file__).parents[4] / "workflow" / "resources" / "zoo"
MEDIUM = recipe.architecture("medium")
# Name: the nonlinearity, whether there is no gate, the class.
VARIANTS = {
    "medium-gelu": ("gelu", False, "LlamaForCausalLM"),
    "medium-gelu-ungated": ("gelu", True, "ArceeForCausalLM"),
    "medium-relu-ungated": ("relu", True, "ArceeForCausalLM"),
    "medium-relu2-ungated": ("relu2", True, "ArceeForCausalLM"),
}
PROSPARSE = "medium-prosparse"
STEPS = (1024, 2560, 6400, 16384)
CHECKPOINTS = [f"tiny/step-{step}" for step in STEPS]
EVERY = [*VARIANTS, PROSPARSE, *CHECKPOINTS]


def facts_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ZOO / name / "training.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", EVERY)
def test_it_is_what_its_card_says(name):
    facts = facts_of(name)
    shape = recipe.described(facts["architecture"])
    assert card.card(facts) == (ZOO / name / "README.md").read_text(encoding="utf-8")
    assert (ZOO / name / "model.safetensors").stat().st_size < 15e6
    weights = load_file(ZOO / name / "model.safetensors")
    counted = sum(tensor.numel() for tensor in weights.values())
    assert counted == facts["total_parameters"]
    assert counted - weights["model.embed_tokens.weight"].numel() == shape.non_embedding_parameters
    tokenizer = ZOO / ("tiny" if name.startswith("tiny") else name) / "tokenizer.json"
    shared = ZOO / "large" / "tokenizer.json"
    assert json.loads(tokenizer.read_text()) == json.loads(shared.read_text())
    assert tokenizer.stat().st_size < shared.stat().st_size / 2


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_middle_model_but_for_its_ffn(name):
    facts, (activation, ungated, _) = facts_of(name), VARIANTS[name]
    assert (name, recipe.described(facts["architecture"])) == variant(
        "medium", MEDIUM, activation, ungated
    )
    assert recipe.Training(**facts["training"]) == recipe.Training()
    assert "from" not in facts
    assert describe(Checkpoint(ZOO / name), None)["activation"] == activation
    assert facts["non_embedding_parameters"] == facts_of("medium")["non_embedding_parameters"]
    assert facts["valid"]["nats_per_token"] == pytest.approx(
        facts_of("medium")["valid"]["nats_per_token"], abs=0.1
    )


def test_the_finetune_has_more_zeros_than_its_twin_at_about_its_loss():
    facts, twin = facts_of(PROSPARSE), facts_of("medium-relu")
    shape = recipe.described(facts["architecture"])
    assert shape == replace(
        recipe.architecture("medium-relu"), learning_rate=facts["architecture"]["learning_rate"]
    )
    assert facts["fatrelu"] > 0
    assert Stages(tuple(map(tuple, facts["l1"]))).weight(facts["training"]["steps"]) > 0
    assert np.mean(facts["zeros"]) > 0.8
    # One per cent of the loss.
    assert facts["valid"]["nats_per_token"] < 1.01 * twin["valid"]["nats_per_token"]


def test_checkpoints_are_of_one_training():
    found = [facts_of(name) for name in CHECKPOINTS]
    assert [facts["steps_done"] for facts in found] == list(STEPS)
    assert [facts["tokens_seen"] for facts in found] == [step * 32_768 for step in STEPS]
    for facts in found:
        assert recipe.described(facts["architecture"]) == recipe.architecture("tiny")
        assert recipe.Training(**facts["training"]) == recipe.Training()
    losses = [facts["valid"]["nats_per_token"] for facts in found]
    assert losses == sorted(losses, reverse=True)
    # The curve of each is the beginning of the last one's.
    for facts in found[:-1]:
        kept = [point for point in facts["curve"] if point[0] % 200 == 0]
        assert kept == found[-1]["curve"][: len(kept)]


@pytest.mark.parametrize("name", EVERY)
def test_the_pipeline_loads_it_and_proves_its_sites(name):
    """By the stages' own loader; what its down projections read has the zeros that its card tells of."""
    facts = facts_of(name)
    model = load(Checkpoint(ZOO / name), dtype="float32", device="cpu")
    expected = VARIANTS.get(name, (None, None, "LlamaForCausalLM"))[2]
    assert type(model).__name__ == expected
    parts = find_parts(model)
    gated = facts["architecture"].get("gated", True)
    tensors = ("input", "up", "gate", "intermediate") if gated else ("input", "intermediate")
    assert [ffn.tensors for ffn in ffns_of(parts)] == [tensors] * facts["architecture"]["layers"]
    words = Checkpoint(ZOO / name, tokenizer=ZOO / "tiny" if name in CHECKPOINTS else None)
    tokenizer = load_tokenizer(words)
    text = "He opened the door and looked into the room, where the old men were waiting for him."
    ids = tokenizer(tokenizer.bos_token + text, return_tensors="pt")["input_ids"]
    zeros: list[float] = []

    def count(vectors: Any) -> None:
        zeros.append(float((vectors.values == 0).double().mean()))

    bound = bind_parts(model, describe_parts(parts))
    with torch.inference_mode(), observe(bound, ["intermediate"], count):
        bits = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) / np.log(2)
    assert bits / len(text) < (2.4 if name in CHECKPOINTS else 1.6)
    if "zeros" in facts:
        assert zeros == pytest.approx(facts["zeros"], abs=0.08)
    elif name == "medium-gelu-ungated":
        # In float32 GELU rounds to zero where its argument is below -5.5, which few neurons reach.
        assert 0 < max(zeros) < 0.01
    else:
        assert max(zeros) == 0
