"""Criteria without a calibration that look at weights, at groups, or at nothing."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from drawn_rows import LEVEL, TYPES, rows, smallest_supports
from model_parts import find_ffns
from sparsity_atlas import kernels
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.binding import bind_all
from sparsity_atlas.criteria.place import Place, matrix
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sparsify.attach import dropping, sparsified
from tiny_models import HIDDEN, WIDTH, Strange, tiny_model, token_ids


class Columns:
    """Stands for a place whose readers have columns of these norms."""

    layer, tensor = 0, "intermediate"

    def __init__(self, norms: list[float]) -> None:
        self.norms = norms

    def column_norms(self) -> Tensor:
        return torch.tensor(self.norms, dtype=torch.float32)


def kept(rule: str, values: list[float], norms: list[float], level: float) -> list[int]:
    bound = create({"rule": rule}).bind(Columns(norms), {})
    return bound.mask(torch.tensor([values]), level)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("rule", "values", "norms", "level", "expected"),
    [
        # Scores 4, 6, 3, 4: what is large and meets a small column goes first.
        ("wina", [1.0, -2, 3, -4], [4.0, 3, 1, 1], 0.25, [1]),
        ("wina", [1.0, -2, 3, -4], [4.0, 3, 1, 1], 0.5, [0, 1, 3]),
        ("wina", [1.0, -2, 3, -4], [4.0, 3, 1, 1], 0.75, [0, 1, 3]),
        ("wina", [1.0, -2, 3, -4], [4.0, 3, 1, 1], 0, []),
        ("weighted_topk", [1.0, -2, 3, -4], [1.0, 0, 1, 1], 0.75, [0, 2, 3]),
        # Scores 4, 6, 3, 4 of 17: running shares 6/17, 14/17 (a tie), 1.
        ("weighted_topp", [1.0, -2, 3, -4], [4.0, 3, 1, 1], 0.35, [1]),
        ("weighted_topp", [1.0, -2, 3, -4], [4.0, 3, 1, 1], 0.36, [0, 1, 3]),
        ("weighted_topp", [1.0, -2, 3, -4], [4.0, 3, 1, 1], 0.83, [0, 1, 2, 3]),
    ],
)
def test_weighted_by_hand(
    rule: str, values: list[float], norms: list[float], level: float, expected: list[int]
) -> None:
    assert kept(rule, values, norms, level) == expected


NORMS = st.lists(st.floats(0, 8, width=32), min_size=33, max_size=33)


def products(values: Tensor, norms: list[float]) -> Tensor:
    """The scores: each one float32 product, of weights whose largest is 1."""
    weights = torch.tensor(norms)
    return values.abs().float() * (weights / (weights.max() if weights.max() > 0 else 1.0))


@settings(max_examples=80, deadline=None)
@given(rows(), LEVEL, NORMS)
def test_wina_is_topk_of_the_products(values: Tensor, level: float, norms: list[float]) -> None:
    norms = norms[: values.shape[1]]
    mask = create({"rule": "wina"}).bind(Columns(norms), {}).mask(values, level)
    count = math.floor(Fraction(str(level)) * values.shape[1])
    for row, keep in zip(products(values, norms).tolist(), mask.tolist(), strict=True):
        threshold = sorted(row, reverse=True)[count - 1] if count else math.inf
        assert keep == [score >= threshold for score in row]


@settings(max_examples=60, deadline=None)
@given(rows(), LEVEL, st.floats(2**-10, 1024, width=32))
def test_equal_columns_weigh_nothing(values: Tensor, level: float, norm: float) -> None:
    place = Columns([norm] * values.shape[1])
    for rule, plain in (("wina", "topk"), ("weighted_topk", "topk")):
        mask = create({"rule": rule}).bind(place, {}).mask(values, level)
        assert torch.equal(mask, create({"rule": plain}).mask(values, level))


@settings(max_examples=60, deadline=None)
@given(rows(), LEVEL, NORMS)
def test_weighted_topp_is_topp_of_the_products(
    values: Tensor, level: float, norms: list[float]
) -> None:
    norms = norms[: values.shape[1]]
    mask = create({"rule": "weighted_topp"}).bind(Columns(norms), {}).mask(values, level)
    scores = products(values, norms)
    assert torch.equal(mask, create({"rule": "topp"}).mask(scores, level))
    for row, keep in zip(scores, mask, strict=True):
        assert keep.tolist() in smallest_supports(row, level)


# Column norms of whatever a projection is


@pytest.mark.parametrize("layout", ["gated", "gate_up", "maps", "ungated"])
@pytest.mark.parametrize("tensor", ["input", "intermediate"])
def test_a_place_s_weight_is_what_its_readers_compute(layout: str, tensor: str) -> None:
    for ffn in find_ffns(Strange(layout)):
        place = Place(ffn, tensor)
        values = torch.randn(5, HIDDEN if tensor == "input" else WIDTH)
        wanted = [
            reader.columns(reader.module.forward(values) - reader.module.forward(0 * values))
            for reader in place.readers()
        ]
        torch.testing.assert_close(values @ place.weight.T, torch.cat(wanted, -1))
        assert place.width == values.shape[1]
        assert len(place.readers()) == (2 if tensor == "input" and ffn.gated else 1)


def test_columns_of_a_module_that_is_no_linear() -> None:
    ffn = find_ffns(tiny_model("gpt2"))[0]  # transformers' Conv1D: transposed, with a bias
    weight = ffn.down.module.weight
    assert not isinstance(ffn.down.module, nn.Linear)
    found = matrix(ffn.down, ffn.width, ffn.down.like(ffn.model))
    torch.testing.assert_close(found, weight.T.float())


# Threshold


@pytest.mark.parametrize(
    ("values", "level", "expected"),
    [
        ([0.5, -2, 0, 1], 1, [1, 3]),
        ([0.5, -2, 0, 1], 1.0001, [1]),
        ([0.5, -2, 0, 1], 0, [0, 1, 2, 3]),
        ([0.5, -2, 0, 1], 1000, []),
    ],
)
def test_threshold_by_hand(values: list[float], level: float, expected: list[int]) -> None:
    mask = create({"rule": "threshold"}).mask(torch.tensor([values]), level)
    assert mask[0].nonzero().flatten().tolist() == expected


@settings(max_examples=60, deadline=None)
@given(rows(), st.just(0.0) | st.floats(1e-30, 4))
@example(torch.tensor([[0.43225981]]), 0.43225981)  # float32 rounds it down
@example(torch.tensor([[1 / 3]]), 1 / 3)  # and this one up
def test_threshold_compares_without_rounding(values: Tensor, level: float) -> None:
    mask = create({"rule": "threshold"}).mask(values, level)
    wanted = [
        [Fraction(v) >= Fraction(level) for v in row] for row in values.double().abs().tolist()
    ]
    assert mask.tolist() == wanted


# n:m


@pytest.mark.parametrize(
    ("group", "values", "level", "expected"),
    [
        (4, [1, -5, 3, 2, 9, 8, 7, 6], 0.5, [1, 2, 4, 5]),
        (4, [1, -5, 3, 2, 9, 8, 7, 6], 0.25, [1, 4]),
        (4, [1, -5, 3, 2, 9, 8, 7, 6], 0, []),
        (4, [1, -5, 3, 2, 9, 8, 7, 6], 1, list(range(8))),
        (8, [1, -5, 3, 2, 9, 8, 7, 6], 0.5, [4, 5, 6, 7]),
        # The hardware holds two of four: of ties, the first.
        (4, [2, 2, -2, 2], 0.5, [0, 1]),
        (4, [0, 0, 0, 0], 0.5, [0, 1]),
        # The last group has two entries, and room for both.
        (4, [1, -5, 3, 2, 0, 1], 0.5, [1, 2, 4, 5]),
    ],
)
def test_nm_by_hand(group: int, values: list[float], level: float, expected: list[int]) -> None:
    criterion = create({"rule": "nm", "group": group})
    mask = criterion.mask(torch.tensor([values], dtype=torch.float32), level)
    assert mask[0].nonzero().flatten().tolist() == expected


def test_a_weighted_threshold_is_of_what_a_neuron_adds() -> None:
    """Norms 1, 2 and 10: what the neurons add is 3, 4 and 5, and -4 and 0 likewise."""
    rule = create({"rule": "weighted_threshold"}).bind(Columns([1.0, 2.0, 10.0]), {})
    values = torch.tensor([[3.0, -2, 0.5], [-4, 0, 0]])
    assert rule.mask(values, 4).tolist() == [[False, True, True], [True, False, False]]
    assert rule.mask(values, 4.5).tolist() == [[False, False, True], [False] * 3]
    # One number for all: in a layer whose columns are twice as long it keeps more.
    longer = create({"rule": "weighted_threshold"}).bind(Columns([2.0, 4.0, 20.0]), {})
    assert longer.mask(values, 4.5).tolist() == [[True] * 3, [True, False, False]]


@settings(max_examples=80, deadline=None)
@given(rows(), LEVEL, st.sampled_from((2, 4, 8, 32)))
def test_nm_keeps_n_of_every_group(values: Tensor, level: float, group: int) -> None:
    mask = create({"rule": "nm", "group": group}).mask(values, level)
    count = math.floor(Fraction(str(level)) * group)
    for row, keep in zip(values.abs().tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), group):
            members = range(start, min(start + group, len(row)))
            best = sorted(members, key=lambda j: (-row[j], j))[:count]
            assert [j for j in members if keep[j]] == sorted(best)


@pytest.mark.parametrize("group", [1, 0, -4, 2.0, True, "4"])
def test_bad_group(group: object) -> None:
    with pytest.raises(AtlasError, match="nm: group: expected a whole number of at least 2, found"):
        create({"rule": "nm", "group": group})


# Random


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_random_has_its_sparsity(level: float) -> None:
    values = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    share = create({"rule": "random"}).mask(values, level).double().mean()
    assert abs(share - level) <= 3 * math.sqrt(level * (1 - level) / values.numel())


WORD = 2**64


def mixed(number: int) -> int:
    """SplitMix64's output function in Python's integers."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % WORD
    return number ^ (number >> 31)


def test_the_hash_gives_the_published_first_number() -> None:
    # Of the generator's state after one step from the seed 0.
    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


@settings(max_examples=60, deadline=None)
@given(rows(), LEVEL, st.integers(0, 2**31 - 1))
def test_random_against_whole_numbers(values: Tensor, level: float, seed: int) -> None:
    found = create({"rule": "random", "seed": seed}).mask(values, level)
    codes = [mixed(seed + channel) for channel in range(values.shape[1])]
    for row, keep in zip(values.double().tolist(), found.tolist(), strict=True):
        token = mixed(sum(code for code, v in zip(codes, row, strict=True) if v > 0) % WORD)
        draws = [mixed((token + code) % WORD) >> 11 for code in codes]
        assert keep == [Fraction(draw, 2**53) < Fraction(level) for draw in draws]


def test_random_draws_anew_for_each_token_place_and_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 200, generator=generator)
    ffns = find_ffns(tiny_model("llama"))
    bound = bind_all(create({"rule": "random"}), ffns, "all_inputs")
    masks = [one.mask(values, 0.5) for one in bound.values()]
    masks.append(create({"rule": "random", "seed": 1}).mask(values, 0.5))
    masks += [masks[0].roll(1, 0), masks[0].roll(1, 1)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            # Independent masks of 8,000 entries agree on half of them, up to four standard errors.
            assert abs((one == other).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(one.numel())


def test_random_is_the_same_whatever_the_last_bits() -> None:
    values = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    criterion = create({"rule": "random"})
    assert torch.equal(criterion.mask(values, 0.3), criterion.mask(values * (1 + 2e-7), 0.3))


@pytest.mark.parametrize("seed", [-1, 0.5, True, 2**31, "1"])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(AtlasError, match="random: seed: expected a whole number"):
        create({"rule": "random", "seed": seed})


# What every rule keeps


WEIGHTED = ("weighted_topk", "weighted_topp", "weighted_threshold")
RULES = ("threshold", "random", "nm", "wina", *WEIGHTED)


@settings(max_examples=60, deadline=None)
@given(rows(), st.sampled_from(RULES), st.data())
def test_sparsity_grows_away_from_the_dense_level(
    values: Tensor, rule: str, data: st.DataObject
) -> None:
    place = Columns(list(range(values.shape[1])))
    criterion = create({"rule": rule}).bind(place, {})
    assert criterion.mask(values, criterion.dense_level).all()
    mild, harsh = sorted(
        (data.draw(LEVEL), data.draw(LEVEL)), key=lambda one: abs(one - criterion.dense_level)
    )
    assert not (criterion.mask(values, harsh) & ~criterion.mask(values, mild)).any()


@settings(max_examples=60, deadline=None)
@given(rows(), LEVEL, st.sampled_from(RULES), st.randoms(use_true_random=False))
def test_rows_do_not_see_each_other(values: Tensor, level: float, rule: str, draw) -> None:
    criterion = create({"rule": rule}).bind(Columns(list(range(values.shape[1]))), {})
    order = list(range(len(values)))
    draw.shuffle(order)
    together = criterion.mask(torch.cat([values[order], values * 3]), level)[: len(order)]
    alone = torch.cat([criterion.mask(values[i : i + 1], level) for i in order])
    assert torch.equal(together, alone)


def test_each_layer_meets_its_own_columns() -> None:
    model = tiny_model("llama")
    ffns = find_ffns(model)
    before, after = {}, {}

    def watch(seen: dict) -> None:
        for ffn in ffns:
            ffn.down.module.register_forward_pre_hook(
                lambda module, args, layer=ffn.layer: seen.update({layer: args[0]})
            )

    watch(before)
    with torch.no_grad(), sparsified(model, ffns, "intermediate", create({"rule": "wina"}), 0.25):
        watch(after)
        model(token_ids())
    for ffn in ffns:
        norms = ffn.down.module.weight.norm(dim=0)
        scores = before[ffn.layer].abs() * (norms / norms.max())
        smallest_kept = scores.sort(-1, descending=True).values[..., WIDTH // 4 - 1, None]
        wanted = torch.where(scores >= smallest_kept, before[ffn.layer], 0)
        assert torch.equal(after[ffn.layer], wanted)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rule", ["threshold", "wina", *WEIGHTED])
def test_the_compiled_path_gives_the_same_bits(
    rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(40, 96, generator=draw).to(dtype)
    bound = create({"rule": rule}).bind(Columns(torch.rand(96, generator=draw).tolist()), {})
    for level in (0, 0.2, 0.5, 0.9, 1):
        found = []
        for path in ("reference", "compiled"):
            monkeypatch.setenv(kernels.VARIABLE, path)
            found.append(dropping(bound, level)(values, values))
        assert torch.equal(found[0].out, found[1].out)
        assert torch.equal(found[0].zeros.long(), found[1].zeros.long())
        assert torch.equal(found[1].out, torch.where(bound.mask(values, level), values, 0))
