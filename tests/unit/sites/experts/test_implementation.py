"""The implementation with taps, against a plain float64 loop over tokens and experts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtures import (
    EACH,
    EXPERTS,
    HIDDEN,
    WIDTH,
    Alone,
    by_hand,
    first_projection,
    product,
    routing,
    second_projection,
)
from sparsity_atlas import kernels
from sparsity_atlas.kernels.definition import Threshold
from sparsity_atlas.sites.experts.discovery import find_experts
from sparsity_atlas.sites.experts.gating import find_gating
from sparsity_atlas.sites.experts.grouping import Grouping, group
from sparsity_atlas.sites.experts.implementation import (
    NAME,
    Tap,
    grouped_product,
    installed,
    tapped,
)
from sparsity_atlas.sites.experts.routed import RoutedExperts, bind_routed, by_token

TOKENS = 12
# Gated, transposed with biases and interleaved, ungated, capped, with a norm behind.
KINDS = {
    "gated": ("olmoe", "OlmoeExperts"),
    "transposed, biased, interleaved": ("gpt_oss", "GptOssExperts"),
    "ungated": ("nemotron_h", "NemotronHExperts"),
    "capped": ("inkling2", "Inkling2Experts"),
    "with a norm": ("muse_spark", "MuseSparkExperts"),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Alone:
    return Alone(*KINDS[request.param])


def routed(model: Alone) -> RoutedExperts:
    experts, gating = model.experts, None
    if experts.has_gate:
        gating = find_gating(experts._apply_gate, WIDTH, torch.device("cpu"), "here")
    return RoutedExperts("experts", experts, EXPERTS, EACH, HIDDEN, WIDTH, gating)


def factor(experts: RoutedExperts, tensor: str, z: Tensor, i: Tensor) -> Tensor:
    if experts.gating is None or tensor == "intermediate":
        return i
    of = experts.gating.up if tensor == "up" else experts.gating.gate
    return of(experts.module._apply_gate, z)  # type: ignore[operator]


@pytest.mark.parametrize("tensor", ["input", "up", "gate", "intermediate"])
def test_taps_see_and_change(model: Alone, tensor: str) -> None:
    experts = routed(model)
    if tensor not in experts.tensors:
        assert experts.gating is None
        return
    x, index, weights = routing(TOKENS)
    rule = Threshold("fixed", constants=torch.tensor([0.4]))
    seen: list[tuple[Grouping, Tensor, Tensor]] = []

    def act(grouping: Grouping, read: Tensor, write: Tensor) -> Tensor:
        out, zeros, *_ = kernels.masked(rule, read, write)
        seen.append((grouping, read, zeros))
        return out

    with torch.no_grad(), installed(model), ExitStack() as stack:
        experts.tap(stack, tensor, act)
        found = model(x, index, weights)
    ((grouping, read, zeros),) = seen
    module = model.experts.double()
    dropped = torch.zeros(TOKENS, EACH)
    by_expert = torch.zeros(EXPERTS)

    def change(z: Tensor, i: Tensor, expert: int) -> Tensor:
        values = factor(experts, tensor, z, i)
        keep = values.abs() >= 0.4
        by_expert[expert] += float((~keep).sum())
        return torch.where(keep, i, 0)

    with torch.no_grad():
        if tensor == "input":
            keep = x.abs() >= 0.4
            expected = by_hand(module, torch.where(keep, x, 0), index, weights)
            assert torch.equal(read, x)
            assert torch.equal(zeros.long(), (~keep).sum(-1))
        else:
            expected = by_hand(module, x, index, weights, change)
            for token, ids in enumerate(index.tolist()):
                for place, expert in enumerate(ids):
                    z = first_projection(module, expert, x[token])
                    values = factor(experts, tensor, z, product(module, z))
                    dropped[token, place] = float((values.abs() < 0.4).sum())
                    torch.testing.assert_close(
                        grouping.ungrouped(read)[token, place].double(),
                        values,
                        rtol=1e-4,
                        atol=1e-5,
                    )
            assert torch.equal(grouping.ungrouped(zeros).float(), dropped)
            assert torch.equal(by_token(grouping, zeros).float(), dropped.sum(-1))
            counted = torch.zeros(EXPERTS).index_add_(0, grouping.experts, zeros.float())
            assert torch.equal(counted, by_expert)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_all_of_intermediate_zeroed_leaves_what_experts_make_of_nothing(model: Alone) -> None:
    experts, (x, index, weights) = routed(model), routing(TOKENS)
    with torch.no_grad(), installed(model), ExitStack() as stack:
        experts.tap(stack, "intermediate", lambda _, read, write: torch.zeros_like(write))
        found = model(x, index, weights)
        nothing = torch.zeros(WIDTH, dtype=torch.float64)
        made = torch.stack(
            [second_projection(model.experts.double(), e, nothing) for e in range(EXPERTS)]
        )
    expected = (made[index] * weights[..., None].double()).sum(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    if not model.experts.has_bias:
        assert not found.any()


def test_taps_that_change_nothing_change_no_bit(model: Alone) -> None:
    experts, given = routed(model), routing(TOKENS)
    with torch.no_grad(), installed(model):
        before = model(*given)
        with ExitStack() as stack:
            for tensor in experts.tensors:
                experts.tap(stack, tensor, lambda _, read, write: None)
                experts.tap(stack, tensor, lambda _, read, write: write.clone())
            during = model(*given)
    assert torch.equal(before, during)


def test_factors_are_taken_before_anything_changes_and_intermediate_after(model: Alone) -> None:
    experts, given = routed(model), routing(TOKENS)
    seen: dict[str, Tensor] = {}
    if experts.gating is None:
        assert experts.tensors == ("input", "intermediate")
        return

    def drop(_: Grouping, read: Tensor, write: Tensor) -> Tensor:
        seen["up"] = read.clone()
        return torch.where(read > 0, write, 0)

    def look(name: str) -> Any:
        return lambda _, read, write: seen.update({name: read.clone()})

    with torch.no_grad(), installed(model), ExitStack() as stack:
        experts.tap(stack, "up", drop)
        experts.tap(stack, "gate", look("gate"))
        experts.tap(stack, "intermediate", look("intermediate"))
        model(*given)
    kept = seen["up"] > 0
    torch.testing.assert_close(
        seen["intermediate"], torch.where(kept, seen["up"] * seen["gate"], 0), rtol=1e-4, atol=1e-6
    )


def test_what_ran_before_comes_back() -> None:
    model = Alone("olmoe", "OlmoeExperts")
    model.set_experts_implementation("batched_mm")

    def run() -> None:
        with installed(model), installed(model):
            assert model.get_experts_implementation() == {"": NAME}
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert model.get_experts_implementation() == {"": "batched_mm"}


def test_a_tap_is_gone_after_an_error() -> None:
    model, given = Alone("olmoe", "OlmoeExperts"), routing(TOKENS)

    def fail(*_: object) -> Tensor:
        raise KeyError

    with installed(model), torch.no_grad():
        before = model(*given)
        with pytest.raises(KeyError), tapped(model.experts, Tap("input", fail)):
            model(*given)
        assert torch.equal(model(*given), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 10, 25])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_of_any_width_and_type(dtype: torch.dtype, width: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(11, width, generator=generator).to(dtype)
    weight = torch.randn(3, width, 2 * width, generator=generator).to(dtype)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    made = grouped_product(rows, weight, torch.tensor([4, 4, 11], dtype=torch.int32))
    expected = torch.cat(
        [rows[:4].double() @ weight[0].double(), rows[4:].double() @ weight[2].double()]
    )
    close = {torch.bfloat16: 0.05, torch.float16: 0.01}.get(dtype, 1e-5)
    torch.testing.assert_close(made.double(), expected, rtol=close, atol=close)


def test_grouping() -> None:
    index = torch.tensor([[2, 0], [0, 3], [3, 2]])
    grouping = group(index, 5)
    assert grouping.experts.tolist() == [0, 0, 2, 2, 3, 3]
    assert grouping.offsets.tolist() == [2, 2, 4, 6, 6]
    assert torch.equal(index[grouping.tokens, grouping.order % 2], grouping.experts)
    assert torch.equal(grouping.ungrouped(grouping.experts), index)
    finite = torch.tensor([True, False, True, True, True, True])
    bad = int(grouping.tokens[1])
    assert by_token(grouping, finite).tolist() == [token != bad for token in range(3)]


def test_bound_again() -> None:
    model = Alone(*KINDS["transposed, biased, interleaved"])
    experts = routed(model)
    again = bind_routed(experts.describe(), model)
    assert again.module is model.experts
    assert again.describe() == experts.describe()
    assert [again.size(name) for name in again.tensors] == [HIDDEN, *[EACH * WIDTH] * 3]
    assert [again.outputs(name) for name in again.tensors] == [2 * EACH * WIDTH, *[HIDDEN] * 3]


def test_nothing_is_found_in_what_has_no_experts() -> None:
    assert find_experts(torch.nn.Linear(2, 2), torch.zeros(2, 3), lambda ids: None) == []
