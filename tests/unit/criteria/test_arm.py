"""ARM, the control that draws near-zero gates anew: against a loop, in any batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsity_atlas.criteria import create
from sparsity_atlas.errors import AtlasError


class Gate:
    """Stands for a place."""

    layer, tensor = 0, "gate"


def arm(values: Tensor, level: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Which entries stay, and what the gate becomes where the other factor is one."""
    rule = create({"rule": "arm", "seed": seed}).bind(Gate(), {})
    mask = rule.mask(values, level)
    replaced = rule.replace(values, values, mask, level)
    return mask, values if replaced is None else replaced


def test_arm_by_hand() -> None:
    """Eight entries, of which no more than a quarter are drawn anew: two."""
    row = torch.tensor([[0.01, -0.02, 1.0, -0.5, 0.0, 2.0, -1.5, 3.0]])
    # |g| sorted: 0, .01, .02, .5, 1, 1.5, 2, 3; the lower median .5, its deviations .5, .49, .48, 0, .5, 1,
    # 1.5, 2.5 with the lower median .5: ε = c · .7413. Of c = .1 it is .074: three entries, and a quarter
    # are two.
    mask, found = arm(row, 0.1)
    # The two smallest are 0 and .01, and an exact zero stays.
    assert (~mask).nonzero().tolist() == [[0, 0]]
    assert 0 <= float(found[0, 0]) <= 3
    assert torch.equal(found[mask], row[mask])
    assert arm(row, 0)[0].all()
    # So little is below ε that the least share decides: .02 of 8 are none.
    assert arm(row + 1, 1e-9)[0].all()


def brute(row: list[float], level: float) -> tuple[set[int], float, float]:
    """Which entries are drawn anew, and the ends of the two ranges."""
    sizes = [abs(one) for one in row]
    middle = sorted(sizes)[(len(row) - 1) // 2]
    deviation = sorted(abs(one - middle) for one in sizes)[(len(row) - 1) // 2]
    share = sum(one < level * 1.4826 * deviation for one in sizes) / len(row)
    count = math.floor(min(max(share, 0.02), 0.25) * len(row))
    if count == 0:
        return set(), 0, 0
    largest = sorted(sizes)[count - 1]
    anew = {i for i, one in enumerate(sizes) if one <= largest and one >= 1e-30}
    return anew, min(min(row), 0), max(sorted(row)[int(0.995 * len(row))], 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.13, 0.5, 2.0, 50.0]))
def test_arm_against_a_loop(seed: int, level: float) -> None:
    values = torch.randn(4, 120, generator=torch.Generator().manual_seed(seed))
    values[1] = torch.nn.functional.silu(values[1])
    mask, found = arm(values, level)
    for row, keep, new in zip(values.tolist(), mask, found.tolist(), strict=True):
        anew, low, high = brute([float(one) for one in row], level)
        assert set((~keep).nonzero().flatten().tolist()) == anew
        for place, (before, after) in enumerate(zip(row, new, strict=True)):
            if place not in anew:
                assert before == after
            elif before > 0:
                assert 0 <= after <= high * (1 + 1e-6)
            else:
                assert low * (1 + 1e-6) <= after <= 0


def test_arm_draws_the_whole_range_and_the_same_in_any_batch() -> None:
    values = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    mask, found = arm(values, 0.13)
    alone = torch.cat([arm(values[i : i + 1], 0.13)[1] for i in range(300)])
    assert torch.equal(found, alone)
    assert torch.equal(found, arm(values, 0.13)[1])
    assert not torch.equal(found, arm(values, 0.13, seed=1)[1])
    high = values.sort(-1).values[:, 199, None].expand_as(values)
    shares = (found / high)[~mask & (values > 0)]
    assert abs(float(shares.mean()) - 0.5) < 0.02
    assert abs(float((shares < 0.25).double().mean()) - 0.25) < 0.02
    # Gates are pushed away from zero: that is what it is for.
    assert found.abs().mean() > values.abs().mean()


def test_arm_writes_the_product_of_the_new_gate() -> None:
    gate = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    up = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    rule = create({"rule": "arm"}).bind(Gate(), {})
    mask = rule.mask(gate, 0.5)
    new = rule.replace(gate, gate, mask, 0.5)
    product = rule.replace(gate, up * gate, mask, 0.5)
    assert new is not None
    assert product is not None
    torch.testing.assert_close(product, up * new, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [-1, 0.5, True, "1"])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(AtlasError, match="arm: seed: expected a whole number"):
        create({"rule": "arm", "seed": seed})
