"""Criteria by a row's statistics, in another basis, or with a mean put back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from drawn_rows import LEVEL, TYPES, rows
from model_parts import find_ffns
from sparsity_atlas.criteria import create
from sparsity_atlas.criteria.place import Place
from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.ffn import FFN
from sparsity_atlas.sparsify.attach import dropping
from tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Given(dict):
    """A `place.Sample` of given tensors."""

    def read(self, tensor: str) -> Tensor:
        return self[tensor]


@pytest.fixture(scope="module")
def ffn() -> FFN:
    """A gated FFN of random weights."""
    return find_ffns(tiny_model("llama"))[0]


def kept(of: str, values: list[float], level: float) -> list[int]:
    mask = create({"rule": "stat_topk", "of": of}).mask(torch.tensor([values]), level)
    return mask[0].nonzero().flatten().tolist()


# Statistical top-k


@pytest.mark.parametrize(
    ("of", "values", "level", "expected"),
    [
        # |v| has mean 2.5 and deviation √1.25 = 1.118; Φ⁻¹(0.5) = 0, Φ⁻¹(0.84134) = 1, Φ⁻¹(0.15866) = -1.
        ("magnitude", [1.0, -2, 3, -4], 0.5, [2, 3]),
        ("magnitude", [1.0, -2, 3, -4], 0.15865, [3]),  # 3.618
        ("magnitude", [1.0, -2, 3, -4], 0.84135, [1, 2, 3]),  # 1.382
        ("signed", [1.0, -2, 3, -4], 0.5, [0, 2]),  # mean -0.5
        ("magnitude", [2.0, -2, 2, 2], 0.1, [0, 1, 2, 3]),  # all tie
        ("magnitude", [0.0, 0, 0, 0], 0.1, [0, 1, 2, 3]),
        ("magnitude", [1.0, -2, 3, -4], 0, []),
        ("signed", [1.0, -2, 3, -4], 1, [0, 1, 2, 3]),
    ],
)
def test_stat_topk_by_hand(of: str, values: list[float], level: float, expected: list[int]) -> None:
    assert kept(of, values, level) == expected


@pytest.mark.parametrize("dtype", TYPES)
def test_stat_topk_of_normal_rows_keeps_the_share(dtype: torch.dtype) -> None:
    values = torch.randn(8, 1 << 15, generator=torch.Generator().manual_seed(0)).to(dtype)
    for level in (0.05, 0.3, 0.8):
        mask = create({"rule": "stat_topk", "of": "signed"}).mask(values, level)
        # Five standard errors of a share of 2^18.
        assert mask.double().mean() == pytest.approx(level, abs=5 * 0.5 / 512)


def test_stat_topk_is_the_gate_of_gemma_3n() -> None:
    # The cut of transformers' Gemma 3n, whose gate is 0 wherever this rule drops.
    from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

    config = Gemma3nTextConfig(
        hidden_size=16, intermediate_size=256, num_hidden_layers=1, layer_types=["full_attention"],
        activation_sparsity_pattern=[0.9], num_kv_shared_layers=0,
    )  # fmt: skip
    mlp = Gemma3nTextMLP(config, layer_idx=0)
    values = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    theirs = mlp._gaussian_topk(values) > 0
    ours = create({"rule": "stat_topk", "of": "signed"}).mask(values, 0.1)
    assert torch.equal(theirs, ours)


@settings(max_examples=60, deadline=None)
@given(rows(), LEVEL)
def test_stat_topk_looks_at_one_row(values: Tensor, level: float) -> None:
    rule = create({"rule": "stat_topk"})
    together = rule.mask(torch.cat([values, values * 3]), level)[: len(values)]
    alone = torch.cat([rule.mask(values[i : i + 1], level) for i in range(len(values))])
    assert torch.equal(together, alone)


def test_stat_topk_refuses_what_it_does_not_know() -> None:
    with pytest.raises(AtlasError, match="of: expected magnitude or signed, found 'mean'"):
        create({"rule": "stat_topk", "of": "mean"})


# Bias compensation


def test_bias_compensation_by_hand(ffn: FFN) -> None:
    # Of eight entries half are dropped, those below 4: 1, 2, 3 and 0.5.
    seen = Given(input=torch.tensor([[1.0, -5.0], [2.0, 6.0], [4.0, 0.5], [8.0, -3.0]]))
    rule, place = create({"rule": "bias_compensation"}), Place(ffn, "input")
    bound = rule.bind(place, rule.calibrate(place, seen))
    values = torch.tensor([[3.0, 7.0], [-9.0, 1.0]])
    out, zeros, *_ = dropping(bound, 0.5)(values, values)
    # (1 + 2) / 4 and (0.5 - 3) / 4.
    assert out.tolist() == [[0.75, 7 - 0.625], [-9 + 0.75, -0.625]]
    assert zeros.tolist() == [1, 1]
    assert torch.equal(bound.export(0.5)["bias"], torch.tensor([0.75, -0.625]))


def test_bias_compensation_keeps_the_mean(ffn: FFN) -> None:
    values = torch.randn(500, ffn.hidden, generator=torch.Generator().manual_seed(2)) + 0.3
    rule, place = create({"rule": "bias_compensation"}), Place(ffn, "input")
    bound = rule.bind(place, rule.calibrate(place, Given(input=values)))
    for level in (0.0, 0.25, 0.8, 1.0):
        out, *_ = dropping(bound, level)(values, values)
        assert torch.allclose(out.double().mean(0), values.double().mean(0), atol=1e-6)
    # Between two per cent the vector is one between theirs.
    low, high, middle = (bound.export(level)["bias"] for level in (0.5, 0.51, 0.505))
    assert torch.allclose(middle, (low + high) / 2, atol=1e-7)


# In another basis


def bound_to(rule: str, place: Place, values: Tensor):
    criterion = create({"rule": rule})
    state = criterion.calibrate(place, Given(input=values)) if criterion.calibrated else {}
    return criterion.bind(place, state)


@pytest.mark.parametrize("rule", ["rotated_topk", "rotated_wina"])
def test_all_that_is_kept_stays_as_it_is(rule: str, ffn: FFN) -> None:
    values = torch.randn(20, ffn.hidden, generator=torch.Generator().manual_seed(3))
    bound = bound_to(rule, Place(ffn, "input"), values)
    out, zeros, *_ = dropping(bound, 1.0)(values, values)
    assert torch.equal(out, values)
    assert not zeros.any()
    out, zeros, *_ = dropping(bound, 0.0)(values, values)
    assert not out.any()
    assert (zeros == ffn.hidden).all()


@pytest.mark.parametrize("level", [0.25, 0.5, 0.9])
def test_rotated_wina_drops_what_costs_least(level: float, ffn: FFN) -> None:
    values = torch.randn(200, ffn.hidden, generator=torch.Generator().manual_seed(4))
    place = Place(ffn, "input")
    out, zeros, *_ = dropping(bound_to("rotated_wina", place, values), level)(values, values)
    dropped = ffn.hidden - math.floor(level * ffn.hidden)
    assert (zeros == dropped).all()
    # In float64, by the SVD itself: what is lost is the sum of the least squares.
    weight = place.weight.double()
    _, norms, axes = torch.linalg.svd(weight, full_matrices=False)
    squares = ((values.double() @ axes.T) * norms).square().sort(-1).values
    lost = (values.double() - out.double()) @ weight.T
    expected = squares[:, :dropped].sum(-1)
    assert torch.allclose(lost.square().sum(-1), expected, rtol=1e-4, atol=1e-9)


def test_rotated_topk_of_a_subspace_loses_nothing(ffn: FFN) -> None:
    generator = torch.Generator().manual_seed(5)
    few = torch.randn(ffn.hidden // 4, ffn.hidden, generator=generator)
    values = torch.randn(300, len(few), generator=generator) @ few
    bound = bound_to("rotated_topk", Place(ffn, "input"), values)
    out, zeros, *_ = dropping(bound, 0.25)(values, values)
    assert (zeros == ffn.hidden - ffn.hidden // 4).all()
    assert torch.allclose(out, values, atol=1e-3)
    # Top-k as it lies loses most of it.
    plain, *_ = dropping(create({"rule": "topk"}), 0.25)(values, values)
    assert (plain - values).norm() > 0.3 * values.norm()
