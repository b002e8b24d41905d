"""Which maps are timed at a site, what need not be read of them, and what is said of all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtures import tiny_mixture
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.decoding.maps import GatedFFN
from sparsity_atlas.sites.find import find_parts, random_ids
from sparsity_atlas.speed.part_times import maps_at, part_rows
from sparsity_atlas.speed.speed_table import FIXED
from sparsity_atlas.speed.text_vectors import Text
from sparsity_atlas.speed.timed_rows import Point
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def bound_at(model: Any, site: str) -> tuple[Any, Any]:
    parts = find_parts(model)
    return parts, bind_all(create({"rule": "topp"}), parts, site)


@pytest.mark.parametrize(
    ("name", "settings", "site", "wanted"),
    [
        ("llama", {}, "all_linear_inputs", ["qkv", "o", "ffn"]),
        ("llama", {}, "gate", ["ffn"]),
        ("llama", {"hidden_act": "gelu"}, "all_inputs", ["up and gate", "down"]),
        ("llama", {"hidden_act": "gelu"}, "gate", []),
        ("opt", {}, "all_inputs", ["up", "down"]),
    ],
)
def test_maps_of_a_site(name: str, settings: dict[str, Any], site: str, wanted: list[str]) -> None:
    parts, bound = bound_at(tiny_model(name, **settings), site)
    found, why = maps_at(parts, site, bound)
    assert [one.name for one in found] == wanted
    layers = {part.layer for part in parts}
    assert all({part.layer for part in one.parts} == layers for one in found)
    if settings:
        assert why[0][0] == "ffn"
        assert "none of plain maps with silu or relu" in why[0][1]
    else:
        assert why == []


def test_experts_are_named() -> None:
    parts, bound = bound_at(tiny_mixture("qwen2_moe"), "intermediate")
    _, why = maps_at(parts, "intermediate", bound)
    assert ("experts", "routed experts have no sparse products") in why


@pytest.mark.parametrize(
    ("site", "maps"), [("input", 2), ("intermediate", 1), ("gate", 2), ("all_inputs", 3)]
)
def test_rows_say_what_is_left_out(site: str, maps: int) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    parts, bound = bound_at(model, site)
    text = Text(parts, site, bound, random_ids(model, (4, 8)))
    points = [Point(0.0, "", text.seen(1.0), bound), Point(0.5, "own", text.seen(0.5), bound)]
    ((ffn,), _) = maps_at(parts, site, bound)
    rows = list(part_rows(ffn, text, points, [1, 3], "cpu", cold=0))
    # Two numbers of tokens, two sparsities, two kinds of threshold.
    assert len(rows) == 8
    for row in rows:
        groups = text.groups(row["tokens"])
        seen = points[row["of"] == "own"].seen
        masks = seen.kept
        if row["threshold"] == FIXED:
            masks = {
                place: seen.vectors[place].abs() >= rule.constants
                for place, rule in seen.constants().items()
            }
        # Brute force: rows of W_u, W_g and W_d, of which each tensor's zeros spare some.
        shares = []
        for part in ffn.parts:
            for place, kept in masks.items():
                if place.layer == part.layer:
                    weight = {"intermediate": 1, "input": 2, "gate": 2}[place.tensor] / 3
                    shares += [weight * float((~kept[one].any(0)).float().mean()) for one in groups]
        wanted = sum(shares) / len(groups) / len(ffn.parts)
        assert row["unread_share"] == pytest.approx(wanted)
        assert row["ideal_speedup"] == pytest.approx(1 / (1 - wanted))
        assert row["speedup"] == pytest.approx(row["dense_us"] / row["sparse_us"])
        assert row["dense_by"] in ("library", "own")
    assert rows[0]["copies_bytes"] == (1 if site == "gate" else maps) * ffn.weights // 3 * 4
    several = {row["tokens"]: row["unread_share"] for row in rows if row["of"]}
    assert several[3] < several[1]


def test_copies_of_weights_make_caches_cold() -> None:
    model = tiny_model("llama")
    parts, bound = bound_at(model, "intermediate")
    ((ffn,), _) = maps_at(parts, "intermediate", bound)
    made = ffn.products("cpu", 7 * ffn.weights * 4)
    assert len(made) == 7
    assert all(isinstance(product, GatedFFN) for _, product in made)
    assert len({product.down.data_ptr() for _, product in made}) == 7
    assert all(torch.equal(product.down, part.down.weight()) for part, product in made)
