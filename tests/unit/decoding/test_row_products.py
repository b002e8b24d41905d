"""The kernel of two factors, compiled for the CPU, against dense products in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from emulated_device import launcher
from sparsity_atlas.decoding import cuda_sources, row_products
from sparsity_atlas.decoding.row_products import Rows
from sparsity_atlas.decoding.vector import Keep, Vector

CLOSE = {torch.float32: 4e-6, torch.bfloat16: 2.0**-6}
INPUTS, OUTPUTS = 304, 77


@pytest.fixture(autouse=True)
def _on_this_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_sources, "launch", launcher(tmp_path))
    monkeypatch.setattr(cuda_sources, "processors", lambda device: 3)


@pytest.mark.parametrize(
    ("dtype", "decides", "activation", "rows", "by_channel"),
    [
        (torch.bfloat16, None, "silu", Rows(64, 1, 4), False),
        (torch.float32, None, "relu", Rows(64, 3, 2), False),
        (torch.bfloat16, "gate", "silu", Rows(32, 2, 2), False),
        (torch.float32, "gate", "relu", Rows(128, 4, 1), True),
        (torch.float32, "up", "silu", Rows(96, 2, 3), True),
    ],
)
def test_two_factors(
    dtype: torch.dtype, decides: str | None, activation: str, rows: Rows, by_channel: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, up, gate = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((1, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS, INPUTS))
    )
    constants = torch.linspace(0, 16, OUTPUTS) if by_channel else torch.tensor([4.0])
    u, g = (F.linear(x.double(), weight.double()).to(dtype) for weight in (up, gate))
    g = getattr(F, activation)(g)
    wanted = u * g
    if decides:
        wanted[{"up": u, "gate": g}[decides].abs() < constants] = 0
    found = row_products.factors(
        x,
        *((gate, up) if decides == "gate" else (up, gate)),
        activation,
        decides=decides,
        rule=Vector(x, Keep.REACHES, constants) if decides else None,
        rows=rows,
    )
    assert torch.equal(found == 0, wanted == 0)
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= CLOSE[dtype]


def test_only_what_the_kernel_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_sources, "has_clusters", lambda device: True)

    def cut(tokens: int, inputs: int, begin: int = 0) -> Rows | None:
        weight = torch.zeros(8 * inputs + begin, dtype=torch.bfloat16)[begin:].view(8, inputs)
        x = torch.zeros(tokens, inputs, dtype=torch.bfloat16)
        return row_products.rows_of(x, weight, weight, decides=False)

    assert cut(1, 2048) == Rows(128, 2, 6)
    assert cut(1, 4096) == Rows(256, 2, 3)
    assert cut(1, 8192) == Rows(256, 1, 3)
    assert cut(2, 4096) is None
    assert cut(1, 4097) is None
    assert cut(1, 4096, begin=1) is None  # whose rows begin at no 16 bytes
    assert cut(1, 16384) is None  # more than a thread's registers hold
