"""All families of experts that the installed transformers has."""

from __future__ import annotations

import json

import pytest
import torch

from mixtures import (
    EACH,
    EXPERTS,
    HIDDEN,
    Alone,
    by_hand,
    decorated,
    first_projection,
    product,
    routing,
    tiny_mixture,
)
from sparsity_atlas.sites.experts.discovery import find_experts
from sparsity_atlas.sites.experts.gating import find_gating
from sparsity_atlas.sites.experts.implementation import chosen, installed
from sparsity_atlas.sites.find import bind_parts, describe_parts, find_parts, sites_of

FAMILIES = decorated()
CLASSES = [(family, name) for family, names in FAMILIES.items() for name in names]
UNGATED = {"NemotronHExperts"}
# The model type that stands for a folder, where it is not the folder's name.
TYPES = {
    **dict.fromkeys(("aria", "inkling2", "inkling2_loop", "gemma4", "glm5_next"), "{}_text"),
    **dict.fromkeys(("hy_v4_vl", "minimax_m3_vl", "mistral_large4", "muse_spark"), "{}_text"),
    **dict.fromkeys(("qwen3_5_moe", "qwen3_vl_moe"), "{}_text"),
}
# Families whose experts are tried by themselves and not in a model, and why.
NO_MODEL = {
    **dict.fromkeys(
        ("deepseek_ocr2", "ernie4_5_vl_moe", "qwen3_omni_moe", "unlimited_ocr"),
        "its text part cannot be made from its own configuration",
    ),
    **dict.fromkeys(
        ("diffusion_gemma", "dots3_note"), "its layers differ: no small configuration by rule"
    ),
    **dict.fromkeys(
        ("glm4v_moe", "mimo_v2_flash", "mistral4"), "its rotary embedding ties several sizes"
    ),
    "inkling": "its shared experts are one tensor outside the interface: refused",
    "qwen4_exp": "its sparse attention ties several sizes",
}
MODELS = [TYPES.get(family, "{}").format(family) for family in FAMILIES if family not in NO_MODEL]


@pytest.mark.parametrize(("family", "name"), CLASSES)
def test_computes_what_the_class_computes(family: str, name: str) -> None:
    model = Alone(family, name)
    given = routing(12)
    assert len(given[1].unique()) == EXPERTS
    expected = by_hand(model.experts.double(), *given)
    model.experts.float()
    with torch.no_grad():
        with chosen(model, "eager"):
            own = model(*given)
        with chosen(model, "grouped_mm"):
            default = model(*given)
        with installed(model):
            ours = model(*given)
    assert torch.equal(ours, default)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "name"), [one for one in CLASSES if one[1] not in UNGATED])
def test_factors_make_the_product(family: str, name: str) -> None:
    experts = Alone(family, name).experts
    assert experts.has_gate
    gating = find_gating(experts._apply_gate, 24, torch.device("cpu"), name)
    x, _, _ = routing(6)
    z = (first_projection(experts, 1, x) * 3).detach()
    u, g = gating.up(experts._apply_gate, z), gating.gate(experts._apply_gate, z)
    torch.testing.assert_close(u * g, product(experts, z), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", MODELS)
def test_found_in_a_model(family: str) -> None:
    model = tiny_mixture(family)
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False)[0]
        found = find_experts(model, ids, lambda one: model(input_ids=one, use_cache=False))
        with installed(model):
            watched = model(input_ids=ids, use_cache=False)[0]
        # The default of all but one, which runs its own loop.
        with chosen(model, "grouped_mm"):
            grouped = model(input_ids=ids, use_cache=False)[0]
    assert found
    assert {(one.count, one.each, one.hidden) for one in found} == {(EXPERTS, EACH, HIDDEN)}
    assert torch.equal(watched, grouped)
    torch.testing.assert_close(watched, before)
    parts = find_parts(model)
    assert [part.paths[0] for part in parts if part.name == "experts"] == [
        one.path for one in found
    ]
    described = json.loads(json.dumps(describe_parts(parts)))
    assert describe_parts(bind_parts(model, described)) == described
    assert "input" in sites_of(parts)
    assert "intermediate" in sites_of(parts)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False)[0], before)


def test_every_family_is_tried() -> None:
    assert set(NO_MODEL) <= set(FAMILIES)
    assert set(TYPES) <= set(FAMILIES)
    assert len(MODELS) + len(NO_MODEL) == len(FAMILIES) >= 60
