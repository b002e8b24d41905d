"""What the parts of a layer have in common: sites, sizes, the module around them, outputs past the hooks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixtures import tiny_mixture
from model_parts import attentions_of, ffns_of
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.available import Available
from sparsity_atlas.sites.block import layer_path
from sparsity_atlas.sites.by_projection import queries_keys_values
from sparsity_atlas.sites.find import Part, Vectors, describe_parts, find_parts
from sparsity_atlas.sites.part import (
    chosen,
    having,
    measure,
    sites_of,
)
from sparsity_atlas.terms import (
    ATTENTION_SITES,
    FFN_SITES,
    SITES,
    SPELLED,
    TENSORS,
    PlaceKey,
    by_projection,
    confined,
    everywhere,
    in_every_layer,
    layers_named,
    parts_named,
    plain,
    stored,
    tensors_at,
    well_spelled,
)
from tiny_models import HIDDEN, LAYERS, WIDTH, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    return find_parts(tiny_model("llama", initializer_range=0.3))


def test_parts_stand_in_the_order_of_a_forward_pass(parts: list[Part]) -> None:
    names = [(part.layer, part.name) for part in parts]
    assert names == [(layer, name) for layer in range(LAYERS) for name in ("attention", "ffn")]


def test_a_site_is_there_where_every_part_of_its_kind_has_it(parts: list[Part]) -> None:
    """A layer may be without attention, or an attention alone."""
    assert sites_of(parts) == SITES
    assert sites_of(ffns_of(parts)) == FFN_SITES
    without = [part for part in parts if (part.layer, part.name) != (1, "attention")]
    assert sites_of(without) == SITES
    assert sites_of([attentions_of(parts)[0], ffns_of(parts)[1]]) == SITES
    assert sites_of(attentions_of(parts)[:1]) == ("qkv_input", "o_input")
    assert sites_of(find_parts(tiny_model("gpt2"))) == (
        *("input", "intermediate", "all_inputs"),
        *ATTENTION_SITES,
    )


def test_of_two_parts_beside_attention_both_must_have_it(parts: list[Part]) -> None:
    """A site is sparsified in all of a layer, or it is not that layer's."""
    ungated = replace(ffns_of(parts)[0], gate=None, name="shared")
    assert sites_of([*parts[:2], ungated]) == (
        *("input", "intermediate", "all_inputs"),
        *ATTENTION_SITES,
    )
    assert [part.name for part in having([*parts[:2], ungated], "up")] == ["ffn"]
    assert [part.name for part in having([*parts[:2], ungated], "input")] == ["ffn", "shared"]


def test_a_dense_model_has_one_part_beside_attention(parts: list[Part]) -> None:
    found = Available.in_parts(parts)
    assert found == Available(SITES, {"ffn": FFN_SITES})
    # Its manifest is that of earlier releases.
    assert found.describe() == {"sites": list(SITES)}
    assert Available.in_manifest(found.describe()) == found
    assert chosen(parts, "input") == (parts, "input")
    assert chosen(parts, "input@ffn") == (ffns_of(parts), "input")


def test_sites_of_each_part_of_a_mixture() -> None:
    parts = find_parts(tiny_mixture("deepseek_v3"))
    found = Available.in_parts(parts)
    assert found == Available(FFN_SITES, dict.fromkeys(("ffn", "shared", "experts"), FFN_SITES))
    assert Available.in_manifest(found.describe()) == found
    for name in ("ffn", "shared", "experts"):
        own, site = chosen(parts, f"gate@{name}")
        assert (site, {part.name for part in own}) == ("gate", {name})
    several, _ = chosen(parts, "gate@ffn+experts")
    assert [(part.layer, part.name) for part in several] == [(0, "ffn"), (1, "experts")]


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("o_input", "models.m: no site 'o_input' in this model; it has input, intermediate$"),
        (
            "input@shared",
            "models.m: 'input@shared': no part 'shared' in this model; it has experts",
        ),
        (
            "input@ffn+experts",
            "models.m: 'input@ffn\\+experts': no part 'ffn' in this model; it has experts$",
        ),
        (
            "intermediate@experts",
            "models.m: 'intermediate@experts': no site 'intermediate' in its part 'experts', which has",
        ),
    ],
)
def test_what_a_model_does_not_have_is_refused(site: str, message: str) -> None:
    available = Available(("input", "intermediate"), {"experts": ("input",)})
    with pytest.raises(AtlasError, match=f"^{message}") as caught:
        available.check("m", site)
    assert "\n" not in str(caught.value)
    available.check("m", "input@experts")


def test_a_site_of_all_parts_is_not_asked_for_twice() -> None:
    olmoe = Available(FFN_SITES, {"experts": FFN_SITES})
    with pytest.raises(
        AtlasError,
        match=r"^models\.m: 'gate@experts' is 'gate' in this model, .*: ask for one of them$",
    ):
        olmoe.check_all("m", ["up", "gate", "gate@experts"])
    olmoe.check_all("m", ["up", "gate@experts"])
    beside = Available(FFN_SITES, dict.fromkeys(("shared", "experts"), FFN_SITES))
    beside.check_all("m", ["gate", "gate@experts"])
    with pytest.raises(AtlasError, match="is 'gate' in this model"):
        beside.check_all("m", ["gate@shared+experts", "gate"])


def test_sites_as_paths_spell_them() -> None:
    assert confined("up", ()) == confined("up", ("experts", "ffn", "shared")) == "up"
    assert confined("up", ("experts", "shared")) == "up@shared+experts"
    assert (plain("up@shared+experts"), plain("up")) == ("up", "up")
    assert (parts_named("up@shared+experts"), parts_named("up")) == (("shared", "experts"), ())
    # By projection the FFN's two sites in all parts or six ways, and both of attention.
    count = len(SITES) + 6 * len(FFN_SITES) + 2 * 7 + 2
    assert len(set(SPELLED)) == len(SPELLED) == count
    for site in SPELLED:
        assert confined(plain(site), parts_named(site), each=by_projection(site)) == site


def test_sizes(parts: list[Part]) -> None:
    wider = replace(ffns_of(parts)[1], width=2 * WIDTH)
    assert measure(parts) == {"layers": LAYERS, "hidden": HIDDEN, "width": WIDTH}
    assert measure([*parts[:2], wider])["width"] == 2 * WIDTH


def test_the_module_around_a_layer(parts: list[Part]) -> None:
    """Found of any of its parts, and of several; nothing is around the only layer of a model but itself."""
    for layer in range(LAYERS):
        assert layer_path(layer, parts) == f"model.layers.{layer}"
        assert layer_path(layer, ffns_of(parts)) == f"model.layers.{layer}"


@pytest.mark.parametrize(
    ("site", "tensors"),
    [
        *(("input", ["input"]), ("up", ["up"]), ("gate", ["gate"])),
        *(("intermediate", ["intermediate"]), ("all_inputs", ["input", "intermediate"])),
    ],
)
def test_an_ffn_computes_its_output_with_a_site_changed(
    parts: list[Part], site: str, tensors: list[str]
) -> None:
    """What is dropped of a factor is dropped of the product; None leaves everything."""
    ffn = ffns_of(parts)[0]
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    given = {"input": x}
    seen: list[PlaceKey] = []

    def drop(vectors: Vectors, onto: Tensor) -> Tensor:
        seen.append(vectors.key)
        return torch.where(vectors.values > 0, onto, 0)

    with torch.no_grad():
        found = ffn.run(given, site, drop)
        kept = torch.where(x > 0, x, 0) if "input" in tensors else x
        u, g = ffn.factors(kept)
        assert g is not None
        mask = {"up": u > 0, "gate": g > 0, "intermediate": u * g > 0}
        i = u * g
        for name in tensors:
            i = torch.where(mask[name], i, 0) if name in mask else i
        torch.testing.assert_close(found, ffn.down(i))
        assert torch.equal(ffn.run(given, site, lambda *_: None), ffn.run(given, site))
    assert seen == [PlaceKey(0, "ffn", name) for name in tensors]
    assert (ffn.within(site), ffn.sources(site)) == ((site,), ("input",))


def test_attention_has_an_output_for_each_of_its_tensors(parts: list[Part]) -> None:
    attention = attentions_of(parts)[0]
    assert attention.within("all_linear_inputs") == ("qkv_input", "o_input")
    assert attention.within("all_inputs") == ()
    assert ffns_of(parts)[0].within("all_linear_inputs") == ("all_inputs",)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        half = torch.where(x > 0, x, 0)
        maps = [one.module.weight for one in attention.qkv]
        found = attention.run(
            {"qkv_input": x}, "qkv_input", lambda _, onto: torch.where(x > 0, onto, 0)
        )
        torch.testing.assert_close(found, torch.cat([half @ weight.T for weight in maps], -1))


@pytest.mark.parametrize(
    ("parts", "layers", "spelled"),
    [
        ((), (3,), "up@layers3"),
        ((), (7, 0, 2, 1), "up@layers0-2+7"),
        ((), (1, 2), "up@layers1-2"),
        (("experts",), (0, 2), "up@experts@layers0+2"),
    ],
)
def test_a_site_in_some_layers_has_one_spelling(
    parts: tuple[str, ...], layers: tuple[int, ...], spelled: str
) -> None:
    assert confined("up", parts, layers) == spelled
    assert (plain(spelled), parts_named(spelled)) == ("up", parts)
    assert layers_named(spelled) == tuple(sorted(layers))
    assert in_every_layer(spelled) == confined("up", parts)
    assert well_spelled(spelled)
    assert well_spelled(in_every_layer(spelled))


@pytest.mark.parametrize(
    "site",
    [
        *(
            "up@layers",
            "up@layers2+0",
            "up@layers0+1",
            "up@layers3-1",
            "up@layers01",
            "up@layers1-1",
        ),
        *(
            "up@layers0@experts",
            "up@layers1234567",
            "up@layers0-",
            "down@layers0",
            "o_input@ffn@layers0",
        ),
    ],
)
def test_other_spellings_of_layers_are_no_sites(site: str) -> None:
    assert not well_spelled(site)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("input@layers1+5", "'input@layers1\\+5': layer 5 has none; those that have: layers0-3$"),
        ("input@ffn@layers1", "'input@ffn@layers1': layer 1 has none; those that have: layers0$"),
        ("input@layers0-3", "'input@layers0-3' is 'input' in this model, .*: leave `layers` out$"),
        ("input@ffn@layers0", "'input@ffn@layers0' is 'input@ffn' in this model"),
        ("o_input@layers0+2", "'o_input@layers0\\+2' is 'o_input' in this model"),
        ("all_linear_inputs@layers0-3", "is 'all_linear_inputs' in this model"),
        ("input@layers2+0", "'input@layers2\\+0' is spelled 'input@layers0\\+2'$"),
    ],
)
def test_layers_that_a_model_does_not_have_are_refused(site: str, message: str) -> None:
    """Attention in two layers, an FFN in the first, experts behind it."""
    maps = {"gate": {"module": "mlp.gate"}, "up": {"module": "mlp.up"}}
    ffn = [{"layer": 0, "attention": {"qkv": []}, **maps}]
    experts = [{"layer": number, "part": "experts"} for number in (1, 2, 3)]
    experts[1]["attention"] = {"qkv": []}
    parts = {name: list(FFN_SITES) for name in ("ffn", "experts")}
    available = Available.in_manifest({"sites": list(SITES), "parts": parts, "ffn": ffn + experts})
    with pytest.raises(AtlasError, match=f"^models\\.m: .*{message}") as caught:
        available.check("m", site)
    assert "\n" not in str(caught.value)
    for there in (
        "input@layers1+3",
        "input@experts@layers2",
        "o_input@layers2",
        "all_inputs@layers0",
    ):
        available.check_all("m", ["input", there])


def test_all_parts_of_some_layers_are_not_asked_for_twice() -> None:
    olmoe = Available(FFN_SITES, {"experts": FFN_SITES}, {"experts": frozenset(range(4))})
    with pytest.raises(AtlasError, match="'gate@experts@layers2' is 'gate@layers2' in this model"):
        olmoe.check_all("m", ["gate@layers2", "gate@experts@layers2"])
    olmoe.check_all("m", ["gate@layers1", "gate@experts@layers2", "gate"])
    names = ("up@layers0-1", "up@experts@layers0-1")
    assert all(olmoe.names("m", name) == names for name in names)
    assert olmoe.names("m", "up@layers3") == ("up@layers3", "up@experts@layers3")


def test_layers_of_a_model_are_those_of_its_manifest() -> None:
    parts = find_parts(tiny_mixture("deepseek_v3"))
    found = Available.in_parts(parts)
    stated = Available.in_manifest({**found.describe(), "ffn": describe_parts(parts)})
    assert stated.layers == found.layers
    assert set(found.layers["ffn"]) == {0}
    assert found.layers["experts"] == found.layers["shared"] == {1}
    own, site = chosen(parts, "gate@layers1")
    assert (site, [(part.layer, part.name) for part in own]) == (
        "gate",
        [(part.layer, part.name) for part in parts if part.layer == 1],
    )


@pytest.mark.parametrize(
    ("site", "parts", "layers"),
    [
        ("qkv_input@projections", (), ()),
        ("input@ffn@projections", ("ffn",), ()),
        ("all_inputs@shared+experts@projections@layers0-2", ("shared", "experts"), (0, 1, 2)),
    ],
)
def test_a_site_by_projection_has_one_spelling(
    site: str, parts: tuple[str, ...], layers: tuple[int, ...]
) -> None:
    whole = plain(site)
    assert confined(whole, parts, layers, each=True) == site
    assert (parts_named(site), layers_named(site), by_projection(site)) == (parts, layers, True)
    assert everywhere(site) == f"{whole}@projections"
    assert well_spelled(site)
    assert {stored(tensor) for tensor in tensors_at(site)} == set(TENSORS[whole])


@pytest.mark.parametrize("site", ["intermediate", "gate", "o_input"])
def test_one_map_s_vector_has_no_spelling_by_projection(site: str) -> None:
    assert not well_spelled(f"{site}@projections")


@pytest.mark.parametrize(
    ("kind", "site", "message"),
    [
        (
            "phi3",
            "qkv_input",
            "in its attention, queries, keys and values are made by qkv_proj, not",
        ),
        ("phi3", "input", "in its ffn, gate and up are made by one map, gate_up_proj"),
        ("gpt_neox", "all_inputs", "in its ffn, one map reads the FFN's input"),
        ("olmoe", "input", "in its experts, the rows that routed experts read have one mask"),
        ("deepseek_v3", "all_inputs", "in its experts, the rows that routed experts read"),
    ],
)
def test_maps_that_are_one_are_refused(kind: str, site: str, message: str) -> None:
    parts = find_parts((tiny_mixture if kind in ("olmoe", "deepseek_v3") else tiny_model)(kind))
    available = Available.in_parts(parts)
    described = {**available.describe(), "ffn": describe_parts(parts)}
    for one in (available, Available.in_manifest(described)):
        if site in one.sites:
            with pytest.raises(AtlasError, match=f"'{site}@projections': {message}"):
                one.check("m", f"{site}@projections")
        one.check("m", site)


def test_an_ungated_ffn_stands_beside_attention_by_projection() -> None:
    parts = find_parts(tiny_model("opt"))
    Available.in_parts(parts).check("m", "all_linear_inputs@projections")
    own, site = chosen(parts, "all_linear_inputs@projections")
    assert [part.tensors for part in own[:2]] == [
        ("q_input", "k_input", "v_input", "o_input"),
        ("up_input", "intermediate"),
    ]
    assert site == "all_linear_inputs@projections"


@pytest.mark.parametrize(
    ("paths", "order"),
    [
        (("a.q_proj", "a.k_proj", "a.v_proj"), (0, 1, 2)),
        (("a.value", "a.key", "a.query"), (2, 1, 0)),
        (("a.wq", "a.wk", "a.wv"), (0, 1, 2)),
        (("a.q_a_proj", "a.kv_a_proj"), None),
        (("a.one", "a.two", "a.three"), None),
        (("a.q_proj", "a.k_proj", "a.k_v"), None),
    ],
)
def test_names_tell_queries_keys_and_values(
    paths: tuple[str, ...], order: tuple[int, ...] | None
) -> None:
    assert queries_keys_values(paths) == order
