"""The factors of a gate: found where they are, refused where there are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.experts.gating import Columns, bind_gating, find_gating

WIDTH = 12
CPU = torch.device("cpu")
Two = Callable[[Tensor, Tensor], Tensor]


def halves(function: Two) -> Callable[[Tensor], Tensor]:
    return lambda z: function(*z.chunk(2, -1))


def in_turn(function: Two) -> Callable[[Tensor], Tensor]:
    return lambda z: function(z[..., ::2], z[..., 1::2])


# A(a, b), and the u(b) and g(a) that it is made of.
PRODUCTS: dict[str, tuple[Two, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (lambda a, b: F.silu(a) * b, lambda b: b, F.silu),
    "relu": (lambda a, b: F.relu(a) * b, lambda b: b, F.relu),
    "squared relu": (lambda a, b: F.relu(a) ** 2 * b, lambda b: b, lambda a: F.relu(a) ** 2),
    "sigmoid": (lambda a, b: torch.sigmoid(a) * b, lambda b: b, torch.sigmoid),
    "cut": (
        lambda a, b: F.silu(a.clamp(max=7)) * b.clamp(-7, 7),
        lambda b: b.clamp(-7, 7),
        lambda a: F.silu(a.clamp(max=7)),
    ),
    "shifted": (
        lambda a, b: (b.clamp(-7, 7) + 1) * a * torch.sigmoid(1.702 * a),
        lambda b: b.clamp(-7, 7) + 1,
        lambda a: a * torch.sigmoid(1.702 * a),
    ),
    "capped": (
        lambda a, b: F.silu(a) * 7 * torch.tanh(b / 7),
        lambda b: 7 * torch.tanh(b / 7),
        F.silu,
    ),
    "scaled": (lambda a, b: 3 * F.gelu(a) * b, lambda b: b, lambda a: 3 * F.gelu(a)),
}


@pytest.mark.parametrize("layout", [halves, in_turn])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_factors(
    layout: Callable[[Two], Callable[[Tensor], Tensor]], swapped: bool, kind: str
) -> None:
    both, up, gate = PRODUCTS[kind]
    function = layout((lambda a, b: both(b, a)) if swapped else both)
    gating = find_gating(function, WIDTH, CPU, "here")
    first, second = (
        (Columns(0, 1), Columns(WIDTH, 1)) if layout is halves else (Columns(0, 2), Columns(1, 2))
    )
    assert (gating.nonlinear, gating.linear) == ((second, first) if swapped else (first, second))
    assert gating.plain == (kind not in ("cut", "shifted", "capped"))
    z = torch.randn(20, 2 * WIDTH, generator=torch.Generator().manual_seed(2)) * 5
    before = z.clone()
    u, g = gating.up(function, z), gating.gate(function, z)
    torch.testing.assert_close(u, up(gating.linear.of(z)), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(g, gate(gating.nonlinear.of(z)), rtol=2e-5, atol=2e-5)
    assert torch.equal(z, before)
    assert bind_gating(gating.describe()) == gating


def in_place(a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        a.clamp_(max=7)
    return F.silu(a) * b


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (halves(lambda a, b: a * b), "both are affine"),
        (halves(lambda a, b: torch.sin(a * b)), "cannot be told"),
        (halves(lambda a, b: F.silu(a) + b), "no product"),
        (halves(lambda a, b: F.silu(a) * b + 0.01 * b**2), "no product"),
        (halves(lambda a, b: torch.softmax(a, -1) * b), "two entries"),
        (halves(lambda a, b: F.silu(a) * b.roll(1, -1) * b), "two entries"),
        (halves(lambda a, b: F.silu(a) * a), "two entries"),
        (halves(lambda a, b: F.silu(a.flip(-1)) * b), "regular order"),
        (halves(in_place), "overwrites"),
    ],
)
def test_refused(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(AtlasError, match=message):
        find_gating(function, WIDTH, CPU, "here")


def test_columns_that_are_of_different_functions_are_refused() -> None:
    scale = torch.linspace(1, 2, WIDTH, dtype=torch.float64)
    with pytest.raises(AtlasError, match=r"no product|cannot be told"):
        find_gating(halves(lambda a, b: F.silu(a * scale) * b), WIDTH, CPU, "here")
