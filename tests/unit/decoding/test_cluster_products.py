"""The kernel of clusters, compiled for the CPU, against dense products in float64 (it needs a C compiler)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emulated_device import launcher
from sparsity_atlas.decoding import cluster_products, cuda_sources
from sparsity_atlas.decoding.cluster_products import Plan
from sparsity_atlas.decoding.vector import Keep, Norm, Vector

# Of a result's largest entry: float32 sums of some hundred products, and one rounding of the type.
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
INPUTS = 301
# Columns that no tile divides, one tile for all, more blocks than there are chunks of rows, ...
PLANS = [Plan(64, 8, 2, 2, 1), Plan(128, 32, 4, 3, 1), Plan(32, 16, 16, 1, 1), Plan(96, 8, 1, 4, 1)]


@pytest.fixture(autouse=True)
def _on_this_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_sources, "launch", launcher(tmp_path))


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def vector_of(keep: str, dtype: torch.dtype) -> tuple[Vector, Tensor]:
    """A vector, and what is kept of it, in float64."""
    x = drawn(1, INPUTS, dtype=dtype, seed=1)
    if keep == "all":
        return Vector(x), x.double()
    if keep == "nonzero":
        x[drawn(1, INPUTS, dtype=dtype, seed=2).abs() < 1] = 0
        return Vector(x, Keep.NONZERO), x.double()
    constants = torch.tensor([0.6]) if keep == "fixed" else torch.linspace(0, 1.2, INPUTS)
    kept = torch.where(x.abs().float() >= constants, x, 0)
    return Vector(x, Keep.REACHES, constants), kept.double()


@pytest.mark.parametrize(
    ("dtype", "keep", "plan"),
    [
        (torch.bfloat16, "fixed", PLANS[0]),
        (torch.float32, "by channel", PLANS[1]),
        (torch.bfloat16, "nonzero", PLANS[2]),
        (torch.float32, "all", PLANS[3]),
    ],
)
def test_a_map_of_a_masked_vector(dtype: torch.dtype, keep: str, plan: Plan) -> None:
    vector, kept = vector_of(keep, dtype)
    weight, bias = drawn(INPUTS, 168, dtype=dtype, seed=3), drawn(168, dtype=dtype, seed=4)
    found = cluster_products.by_inputs(vector, weight, bias=bias, plan=plan)
    wanted = kept @ weight.double() + bias.double()
    assert found.dtype == dtype
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= CLOSE[dtype]


@pytest.mark.parametrize(
    ("dtype", "activation", "plan"),
    [(torch.bfloat16, "silu", PLANS[1]), (torch.float32, "relu", PLANS[0])],
)
def test_two_factors(dtype: torch.dtype, activation: str, plan: Plan) -> None:
    vector, kept = vector_of("fixed", dtype)
    up, gate = (drawn(INPUTS, 168, dtype=dtype, seed=seed) for seed in (3, 4))
    found = cluster_products.by_inputs(vector, up, gate, activation=activation, plan=plan)
    u, g = ((kept @ weight.double()).to(dtype) for weight in (up, gate))
    wanted = u * getattr(F, activation)(g)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 4 * CLOSE[dtype]


@pytest.mark.parametrize(
    ("dtype", "keep", "added", "plan"),
    [
        (torch.bfloat16, "fixed", True, PLANS[0]),
        (torch.float32, "by channel", True, PLANS[1]),
        (torch.float32, "all", False, PLANS[3]),
    ],
)
def test_a_map_of_a_norm(dtype: torch.dtype, keep: str, added: bool, plan: Plan) -> None:
    """A sum and its norm within the product are those that torch makes beforehand."""
    inputs, size = 296, 72
    x, more = (drawn(1, inputs, dtype=dtype, seed=seed) for seed in (1, 2))
    scale, weight = drawn(inputs, dtype=dtype, seed=5), drawn(inputs, size, dtype=dtype, seed=3)
    summed = x + more if added else x
    norm = F.rms_norm(summed.float(), (inputs,), eps=1e-5).to(dtype) * scale
    constants = {
        "all": None,
        "fixed": torch.tensor([0.6]),
        "by channel": torch.linspace(0, 1.2, inputs),
    }[keep]
    kept = norm if constants is None else torch.where(norm.abs().float() >= constants, norm, 0)
    vector = Vector(x, Keep.ALL if constants is None else Keep.REACHES, constants)
    total = torch.full_like(x, torch.nan)
    found = cluster_products.by_inputs(
        vector, weight, plan=plan, norm=Norm(more if added else None, scale, 1e-5), total=total
    )
    wanted = kept.double() @ weight.double()
    assert torch.equal(total, summed)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= CLOSE[dtype]


def test_what_is_not_finite_is_not_lost() -> None:
    vector, _ = vector_of("fixed", torch.bfloat16)
    vector.values[0, 77] = torch.nan
    weight = drawn(INPUTS, 168, dtype=torch.bfloat16, seed=3)
    assert cluster_products.by_inputs(vector, weight, plan=PLANS[0]).isnan().all()


def test_nothing_is_kept() -> None:
    x = drawn(1, INPUTS, dtype=torch.bfloat16, seed=1)
    vector = Vector(x, Keep.REACHES, torch.tensor([torch.inf]))
    weight = drawn(INPUTS, 168, dtype=torch.bfloat16, seed=3)
    assert not cluster_products.by_inputs(vector, weight, plan=PLANS[0]).any()


def test_blocks_have_places_at_once() -> None:
    """A product that was never tried: more outputs than any tile, fewer than one."""
    for outputs in (8, 4096, 14336, 128256):
        for gated in (False, True):
            plan = cluster_products.likely(outputs, 2, gated, 132)
            blocks = plan.split * -(-outputs // (plan.per_row * 8))
            assert blocks <= 0.9 * 132 * plan.blocks or plan.split == 1
    assert cluster_products.likely(14336, 2, False, 132).split == 8


def test_only_what_the_kernel_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of no whole 16 bytes, and lists that no shared memory holds, go another way."""
    monkeypatch.setattr(cuda_sources, "has_clusters", lambda device: True)
    monkeypatch.setattr(cuda_sources, "processors", lambda device: 132)
    device = torch.device("cuda", 0)
    assert cluster_products.plan_of(4096, 14336, 2, False, device) is not None
    assert cluster_products.plan_of(4096, 14338, 2, False, device) is None
    assert cluster_products.plan_of(1 << 20, 64, 2, False, device) is None


def test_a_cpu_has_no_clusters() -> None:
    assert not cuda_sources.has_clusters(torch.device("cpu"))
