"""Matrices of maps whose class computes by itself: taken where numbers prove them, else refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.projection import Projection
from sparsity_atlas.speed.proved_matrix import matrix_of

pytestmark = pytest.mark.usefixtures("one_thread")
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Added(nn.Linear):
    """More than its matrix."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.01 * x.sum(-1, keepdim=True)


class Cut(nn.Linear):
    """Entries that are large are cut."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.clamp(-6, 6))


class Rounded(nn.Linear):
    """Multiplies by weights of eight bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = self.weight.abs().max() / 127
        return x @ ((self.weight / step).round() * step).T + self.bias


class RoundedVectors(nn.Linear):
    """Rounds its vectors to eight bits, which single entries do not show."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / step).round() * step)


class Turned(Conv1D):
    """Uses the square matrix the other way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Packed(nn.Module):
    """Holds bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)


class Other(nn.Module):
    """Of a class that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_what_numbers_prove(dtype: torch.dtype, bias: bool) -> None:
    """Of each type that weights have, with a bias and without."""
    falcon = FalconLinear(70, 300, bias=bias).to(dtype)
    assert torch.equal(matrix_of(Projection("m", falcon)), falcon.weight)
    conv = Conv1D(300, 70).to(dtype)
    conv.bias.normal_() if bias else conv.bias.zero_()
    assert torch.equal(matrix_of(Projection("m", conv)), conv.weight.T)
    assert torch.equal(matrix_of(Projection("m", conv, half=1)), conv.weight.T[150:])


def test_a_plain_map_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsity_atlas.speed.proved_matrix._is_map_of", None)
    linear = nn.Linear(5, 7)
    assert torch.equal(matrix_of(Projection("m", linear)), linear.weight)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", [Added, Cut, Rounded, RoundedVectors, Turned])
def test_what_computes_otherwise_is_refused(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = kind(64, 64).to(dtype)
    with torch.no_grad():
        module.weight.normal_()
    with pytest.raises(AtlasError, match=f"^m: {kind.__name__} makes another product than that of"):
        matrix_of(Projection("m", module))


def test_a_class_that_is_not_known_is_named() -> None:
    with pytest.raises(AtlasError, match=r"^m: Packed holds no plain matrix of numbers$"):
        matrix_of(Projection("m", Packed()))
    with pytest.raises(AtlasError, match=r"^m: Other is no class of maps whose matrix is known$"):
        matrix_of(Projection("m", Other()))
