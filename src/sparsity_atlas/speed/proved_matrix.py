"""The matrix of a map whose class has a forward pass of its own, proved by what it makes of some vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsity_atlas.errors import AtlasError
from sparsity_atlas.sites.offloading import present
from sparsity_atlas.sites.projection import COMPUTED

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity_atlas.sites.projection import Projection

# Entries and outputs that are looked at, and vectors of many entries: small ones and large ones.
LOOKED_AT, SCALES = 256, (1e-2, 1.0, 1.0, 30.0)
# Roundings of the map's own type: of the product, and of its sum with the bias.
ROUNDINGS = 4


def matrix_of(reader: Projection) -> Tensor:
    """A map's weight [outputs, inputs], also of a class that is no plain nn.Linear.

    GPT-2's Conv1D holds it transposed; Falcon's Linear adds its bias by itself. Both are taken where the
    module's forward pass gives what the matrix does, of single entries (no sum is rounded) and of vectors.

    Raises:
        AtlasError: the map is packed, or makes something else; names its class.
    """
    weight = reader.weight()
    if weight is not None:
        return weight
    module: Any = reader.module
    kind = type(module).__name__
    held = getattr(module, "weight", None)
    if not isinstance(held, nn.Parameter) or held.dtype not in COMPUTED or held.dim() != 2:
        raise AtlasError(f"{reader.path}: {kind} holds no plain matrix of numbers")
    if not isinstance(module, nn.Linear | Conv1D):
        raise AtlasError(f"{reader.path}: {kind} is no class of maps whose matrix is known")
    with present(module), torch.no_grad():
        weight = module.weight.detach()
        if isinstance(module, Conv1D):
            weight = weight.T
        if not _is_map_of(module, weight):
            raise AtlasError(f"{reader.path}: {kind} makes another product than that of its weight")
    return reader.columns(weight.T).T


def _is_map_of(module: Any, weight: Tensor) -> bool:
    """Whether a module computes W x + b, to the rounding of its type."""
    outputs, inputs = weight.shape
    some = _spread(outputs, weight)
    entries = _spread(inputs, weight)[:: max(1, min(inputs, LOOKED_AT) // 8)]
    units = torch.zeros(len(entries), inputs).to(weight)
    units[torch.arange(len(entries), device=weight.device), entries] = 1
    drawn = torch.randn(len(SCALES), inputs, generator=torch.Generator().manual_seed(0))
    x = torch.cat([units, (drawn * torch.tensor(SCALES)[:, None]).to(weight)])
    found = module.forward(x)
    if not isinstance(found, torch.Tensor) or found.shape != (len(x), outputs):
        return False
    rows, wide = weight[some].double(), x.double()
    product = wide @ rows.T
    bias = torch.zeros_like(product[0]) if module.bias is None else module.bias[some].double()
    rounded = torch.finfo(weight.dtype).eps * ROUNDINGS * (product.abs() + bias.abs())
    # Sums are of float32 in the smaller types, too.
    summed = torch.finfo(torch.float32).eps * inputs * (wide.abs() @ rows.abs().T)
    summed[: len(units)] = 0
    wrong = (found[:, some].double() - product - bias).abs()
    # Written so that NaN is wrong.
    return bool((wrong <= rounded + summed).all())


def _spread(size: int, like: Tensor) -> Tensor:
    """Up to LOOKED_AT places of so many, from the first to the last."""
    return torch.linspace(0, size - 1, min(size, LOOKED_AT)).long().to(like.device)
