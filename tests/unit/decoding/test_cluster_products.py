"""The kernel of clusters, compiled for the CPU, against dense products in float64 (it needs a C compiler)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from drawn_rows import LEVEL, rows
from emulated_device import launcher
from sparsity_atlas.decoding import cluster_products, cuda_sources
from sparsity_atlas.decoding.cluster_products import Plan
from sparsity_atlas.decoding.vector import Keep, Norm, Vector, fused_of
from sparsity_atlas.kernels.definition import Threshold

# Of a result's largest entry: float32 sums of some hundred products, and one rounding of the type.
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
INPUTS = 301
# Columns that no tile divides, one tile for all, more blocks than there are chunks of rows, ...
PLANS = [Plan(64, 8, 2, 2, 1), Plan(128, 32, 4, 3, 1), Plan(32, 16, 16, 1, 1), Plan(96, 8, 1, 4, 1)]
ONE_TILE = Plan(64, 64, 1, 1, 1)


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Each kernel is compiled once."""
    return launcher(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def _on_this_cpu(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., None]) -> None:
    monkeypatch.setattr(cuda_sources, "launch", launch)


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


def shared_out(values: Tensor, rule: Threshold, plan: Plan = ONE_TILE) -> Tensor:
    """What the kernel keeps of a vector [1, width] that it finds the threshold of: the identity of it."""
    found = cluster_products.by_inputs(
        Vector(values, Keep.SHARE, rule=rule),
        torch.eye(values.shape[1], dtype=values.dtype),
        plan=plan,
    )
    return found != 0


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "heavy tails": lambda x: x**5,
    "ties": lambda x: (2 * x).round() / 2,
    "alike": lambda x: 0 * x + 0.3,
    "alone": lambda x: torch.where(x == x.max(), x, 0),
    "zeros": lambda x: 0 * x,
    "an outlier": lambda x: torch.where(x == x.max(), 6e4, x),
    "denormal": lambda x: 1e-39 * x,
    "tiny": lambda x: 1e-25 * x,
    "huge": lambda x: 4e37 * x,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [264, 1040])
def test_a_share_of_the_mass_is_found_on_the_way(kind: str, dtype: torch.dtype, width: int) -> None:
    """The mask is that of the definition, also where sums of float32 leave it open, or none is held."""
    x = KINDS[kind](drawn(1, width, dtype=torch.float32, seed=9))
    values = (x.clamp(-6e4, 6e4) if dtype == torch.float16 else x).to(dtype)
    plan = ONE_TILE if width < 512 else Plan(160, 160, 1, 1, 1)
    for amount in (0.0, 0.07, 0.5, 0.9, 0.999, 0.9999999):
        rule = Threshold("share", amount)
        wanted = rule.mask(values) & (values != 0)
        assert torch.equal(shared_out(values, rule, plan), wanted), amount


@given(rows(), LEVEL.filter(lambda level: level < 1))
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)
def test_a_share_of_drawn_rows(drawn_rows: Tensor, level: float) -> None:
    """Rows of every kind, often enough behind each other."""
    rule = Threshold("share", level)
    for row in drawn_rows if drawn_rows.dtype != torch.float32 else drawn_rows.bfloat16():
        values = row.repeat(-(-264 // len(row)))[None, :264]
        if not values.isfinite().all():  # rounded up
            continue
        assert torch.equal(shared_out(values, rule), rule.mask(values) & (values != 0))


@pytest.mark.parametrize("added", [True, False])
def test_a_share_of_a_norm(added: bool) -> None:
    """The threshold is that of the norm which is made on the way."""
    inputs, size, dtype = 296, 72, torch.bfloat16
    x, more = (drawn(1, inputs, dtype=dtype, seed=seed) for seed in (1, 2))
    scale, weight = drawn(inputs, dtype=dtype, seed=5), drawn(inputs, size, dtype=dtype, seed=3)
    summed = x + more if added else x
    made = F.rms_norm(summed.float(), (inputs,), eps=1e-5).to(dtype) * scale
    norm = Norm(more if added else None, scale, 1e-5)
    total = torch.full_like(x, torch.nan)
    for amount in (0.5, 0.9):
        rule = Threshold("share", amount)
        kept = torch.where(rule.mask(made), made, 0)
        vector = Vector(x, Keep.SHARE, rule=rule)
        found = cluster_products.by_inputs(vector, weight, plan=PLANS[0], norm=norm, total=total)
        # The same sums in the same order.
        wanted = cluster_products.by_inputs(Vector(kept, Keep.NONZERO), weight, plan=PLANS[0])
        assert torch.equal(total, summed)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_kept_whole(broken: float) -> None:
    values = drawn(1, 264, dtype=torch.bfloat16, seed=9)
    values[0, 40] = broken
    weight = drawn(264, 72, dtype=torch.bfloat16, seed=3)
    found = cluster_products.by_inputs(
        Vector(values, Keep.SHARE, rule=Threshold("share", 0.5)), weight, plan=PLANS[0]
    )
    wanted = cluster_products.by_inputs(Vector(values), weight, plan=PLANS[0])
    assert torch.equal(found.nan_to_num(7), wanted.nan_to_num(7))


def test_what_no_search_was_made_for_is_found_first() -> None:
    """Weights, powers, everything, float32, odd and narrow widths."""
    x = drawn(1, 264, dtype=torch.bfloat16, seed=9)

    def finds(rule: Threshold, values: Tensor = x, plan: Plan = PLANS[0]) -> bool:
        made = fused_of(rule, values, 0.5)
        return made is not None and cluster_products.finds(made, plan)

    rule = Threshold("share", 0.5)
    assert finds(rule)
    assert finds(Threshold("fixed", constants=torch.ones(1)), x.float())
    assert not finds(Threshold("share", 0.5, weights=torch.ones(264)))
    assert not finds(Threshold("share", 0.5, 2.0))
    assert not finds(Threshold("share", 1.0))
    assert not finds(Threshold("rank", 9))
    assert not finds(rule, x.float())
    assert not finds(rule, x[:, :260])
    assert not finds(rule, x[:, 1:257])
    assert not finds(rule, x[:, :248])
    assert not finds(rule, x.repeat(1, 20))


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


def test_what_is_likely_dropped_chooses_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_sources, "has_clusters", lambda device: True)
    device = torch.device("cuda", 0)
    for (inputs, outputs, gated), known in cluster_products.PLANS.items():
        assert min(known) == 0
        for share in (0.0, 0.3, 0.5, 0.8, 1.0):
            plan = cluster_products.plan_of(inputs, outputs, 2, gated, device, share)
            assert plan == known[max(least for least in known if least <= share)]


def test_a_cpu_has_no_clusters() -> None:
    assert not cuda_sources.has_clusters(torch.device("cpu"))
